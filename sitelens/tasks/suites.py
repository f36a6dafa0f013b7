"""The registry of suites, and lists of tasks; nothing is downloaded for them."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from sitelens.errors import SitelensError
from sitelens.registry import Registry
from sitelens.tasks.benchmarks import BENCHMARKS
from sitelens.tasks.builtin import BuiltIn
from sitelens.tasks.files import ENDINGS
from sitelens.tasks.function_vectors import FunctionVectors
from sitelens.tasks.suite import Suite

OWN = "own"  # the group of tasks that belong to no suite


def _check_names(suite: Suite) -> None:
    """Raise SitelensError if the name of a task is invalid, repeated, used by another suite, or looks like a file."""
    names = list(suite.names())
    for name in names:
        if not isinstance(name, str) or not name.strip() or name.lower().endswith(ENDINGS):
            raise SitelensError(f"suite {suite.name!r}: the name of a task must be text that is not empty and does "
                                f"not end like a file, not {name!r}")  # fmt: skip
        if names.count(name) > 1:
            raise SitelensError(f"suite {suite.name!r} has {names.count(name)} tasks {name!r}")
        other = suite_of(name)
        if other is not None and other.name != suite.name:
            raise SitelensError(f"suite {suite.name!r}: {name!r} is a task of the suite {other.name!r}; "
                                f"names such as {suite.name + '/' + name!r} tell them apart")  # fmt: skip


SUITES: Registry[Suite] = Registry("suite", Suite, [BuiltIn(), FunctionVectors(), *BENCHMARKS], check=_check_names)


def register_suite(suite: Suite | type[Suite]) -> Suite | type[Suite]:
    """Register a suite, so that it and its tasks are found by name; returns the argument, so it can decorate a class.

    An installed package registers suites through entry points of the group "sitelens.suites".

    Args:
        suite: a suite, or a subclass of `Suite` that takes no arguments.

    Raises:
        SitelensError: if it is not a `Suite`, or another suite or task has one of its names.

    Example:
        >>> @sl.register_suite
        ... class Numbers(sl.Suite):
        ...     name = "numbers"
        ...     def names(self):
        ...         return ["numbers/next"]
        ...     def load(self, name):
        ...         return sl.Task.from_pairs(name, {str(n): str(n + 1) for n in range(50)})
        >>> sl.load_task("numbers/next").test[0].answers
        ('...',)
    """
    return SUITES.register(suite)


def the_suite(suite: str | Suite) -> Suite:
    """The suite with this name; a `Suite` is returned unchanged.

    Raises:
        SitelensError: for an unknown name, suggesting the most similar one and listing all.
    """
    return suite if isinstance(suite, Suite) else SUITES.named(suite)


def suite_of(task: str) -> Suite | None:
    """The suite that contains the task with this name; None if there is none."""
    for suites in (SUITES.own, SUITES):
        for suite in suites.values():
            if task in suite.names():
                return suite
    return None


def task_names() -> list[str]:
    """The names of all tasks that `load_task` finds by name."""
    return [name for suite in SUITES.values() for name in suite.names()]


def suite_names(suite: str | Suite) -> list[str]:
    """The names of a suite's tasks.

    Raises:
        SitelensError: as `the_suite`.
    """
    return list(the_suite(suite).names())


def list_tasks() -> pd.DataFrame:
    """One row per task: name, kind (its group), items (missing if not known beforehand), source, description.

    Example:
        >>> tasks = sl.list_tasks().set_index("name")
        >>> int(tasks.loc["antonym", "items"])
        240
    """
    rows = [
        (name, suite.group(name), suite.n_items(name), suite.source, suite.describe(name))
        for suite in SUITES.values()
        for name in suite.names()
    ]
    frame = pd.DataFrame(rows, columns=["name", "kind", "items", "source", "description"])
    return frame.astype({"items": "Int64"})


def groups_of(names: Iterable[str]) -> dict[str, str]:
    """The group of each task by name, for the tasks that belong to a suite."""
    return {name: suite.group(name) for name in names if (suite := suite_of(name)) is not None}


def group_of(name: str) -> str:
    """The group under which result tables list a task: "extractive", "abstractive", a benchmark, or "own"."""
    return groups_of([name]).get(name, OWN)
