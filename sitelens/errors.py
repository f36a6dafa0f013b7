"""The error and the warning class of sitelens, and warnings that are issued only once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sitelens.contexts import bound

_warned: ContextVar[set[str] | None] = ContextVar("warned", default=None)


class SitelensError(ValueError):
    """Input that cannot be used; the message names the input and says what would be valid."""


class SitelensWarning(UserWarning):
    """Something that affects how results should be interpreted, but does not stop the computation."""


def warn_once(text: str, *keys: str) -> None:
    """Issue a SitelensWarning; inside `warned_once`, only if at least one of `keys` is new.

    Args:
        text: the message.
        keys: what the warning is about, such as names of tasks.
    """
    if any(map(not_yet_warned, keys)):
        warnings.warn(text, SitelensWarning, stacklevel=4)
    if (known := _warned.get()) is not None:
        known |= set(keys)


def not_yet_warned(key: str) -> bool:
    """Whether `warn_once` has not yet warned about `key`."""
    return key not in (_warned.get() or ())


@contextmanager
def warned_once() -> Iterator[None]:
    """A context manager and decorator; inside, `warn_once` warns once per key. Nested blocks share their keys."""
    keys = _warned.get()
    with bound(_warned, set() if keys is None else keys):
        yield
