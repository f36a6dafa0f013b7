"""Temporary values of context variables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Value = TypeVar("Value")


@contextmanager
def bound(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """A context manager that sets `variable` to `value` for one block, in the current context only.

    The former value is restored even if Ctrl-C interrupts the clean-up itself.

    Args:
        variable: must have a value or a default.
        value: the value inside the block.
    """
    before = variable.get()
    try:
        try:
            variable.set(value)
            yield
        finally:
            variable.set(before)
    finally:
        variable.set(before)
