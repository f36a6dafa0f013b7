"""The package's own error and warning, and warnings that are given once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sitelens.contexts import bound

_warned: ContextVar[set[str] | None] = ContextVar("warned", default=None)


class SitelensError(ValueError):
    """Input that cannot be used; the message names the thing and says what would have been right."""


class SitelensWarning(UserWarning):
    """Something a careful reader of the results would want to know."""


def warn_once(text: str, *keys: str) -> None:
    """A SitelensWarning about the things called `keys`; within `warned_once`, only if one of them is new."""
    if any(map(not_yet_warned, keys)):
        warnings.warn(text, SitelensWarning, stacklevel=4)
    if (known := _warned.get()) is not None:
        known |= set(keys)


def not_yet_warned(key: str) -> bool:
    """Whether `warn_once` would still warn about `key`."""
    return key not in (_warned.get() or ())


@contextmanager
def warned_once() -> Iterator[None]:
    """Within it, `warn_once` warns once per key; also a decorator. Nested ones count as one."""
    keys = _warned.get()
    with bound(_warned, set() if keys is None else keys):
        yield
