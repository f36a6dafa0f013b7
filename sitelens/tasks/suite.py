"""A suite: tasks that belong together, by name. One of a user's own is a subclass, in any file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sitelens.tasks.task import Task


class Suite(ABC):
    """Tasks that belong together.

    name: what `run_suite` and the commands call the suite.
    source: where its data come from, for listings.

    Passed to `run_suite` as a value, a suite needs nothing else. After `sl.register_suite` (a function, or a decorator
    of the class) its tasks are also found by name: `sl.load_task("mine/first")`, `sl.list_tasks()`, the commands.

    Example:
        >>> class Numbers(sl.Suite):
        ...     name = "numbers"
        ...     def names(self):
        ...         return ["numbers/next", "numbers/previous"]
        ...     def load(self, name):
        ...         step = 1 if name == "numbers/next" else -1
        ...         return sl.Task.from_pairs(name, {str(n): str(n + step) for n in range(50)})
        >>> len(Numbers().load("numbers/next").train)
        35
    """

    name: str
    source: str = "own"

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The names of all its tasks, as `load_task` is to know them. Nothing is downloaded for them."""

    @abstractmethod
    def load(self, name: str) -> Task:
        """One of its tasks, under that name.

        Raises:
            SitelensError: if its data cannot be had.
        """

    def describe(self, name: str) -> str:
        """A task in one line, for listings."""
        return ""

    def group(self, name: str) -> str:
        """What a table of results counts the task to; by default all tasks belong to one group, the suite."""
        return self.name

    def n_items(self, name: str) -> int | None:
        """How many items the task has; None if that is not known before it is loaded."""
        return None
