"""Interruption (Ctrl-C) at every line of some functions, one line per run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType, ModuleType
from typing import Any


def at_every_line(work: Callable[[], Any], where: Sequence[Any], step: int = 1) -> Iterator[int]:
    """Run `work` repeatedly, interrupted at the first, second, ... executed line inside `where`; yield after each run.

    Ends when a run finishes before its line is reached; fails if no line was ever executed.

    Args:
        work: what to run.
        where: functions, classes or modules; a module stands for all code in its file.
        step: lines to advance per run; more than 1 for long loops.
    """
    codes, files = set[CodeType](), set[str]()
    for thing in where:
        if isinstance(thing, ModuleType):
            files.add(str(thing.__file__))
        elif isinstance(thing, type):
            members = (inspect.unwrap(getattr(m, "__func__", m)) for m in vars(thing).values() if callable(m))
            codes |= {member.__code__ for member in members if inspect.isfunction(member)}
        else:
            function: Any = inspect.unwrap(getattr(thing, "__func__", thing))
            codes.add(function.__code__)
    line = 0
    while _interrupted(work, codes, files, line):
        yield line
        line += step
    assert line, "no line of these functions was run"


def _interrupted(work: Callable[[], Any], codes: set[CodeType], files: set[str], line: int) -> bool:
    """Run `work` and interrupt it after `line` lines; return whether that many lines were executed."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code not in codes and frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert left >= 0, "the interrupt was swallowed"
    return False
