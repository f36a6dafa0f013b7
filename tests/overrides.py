"""Settings changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sitelens.defaults import settings


@contextmanager
def overridden(**values: object) -> Iterator[None]:
    """The named settings at these values, put back afterwards."""
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
