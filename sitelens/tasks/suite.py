"""Suite: a named collection of tasks. Subclass it to define a suite of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sitelens.tasks.task import Task


class Suite(ABC):
    """A named collection of tasks.

    A suite can be passed to `run_suite` directly. After `sl.register_suite` (a function, also usable as a class
    decorator) its tasks are also available by name: in `sl.load_task("mine/first")`, `sl.list_tasks()` and commands.

    Attributes:
        name: name of the suite, as in `run_suite` and in commands.
        source: where its data come from, for listings.

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
        """The names of all its tasks, under which `load_task` finds them. It must not download anything."""

    @abstractmethod
    def load(self, name: str) -> Task:
        """The task with this name.

        Raises:
            SitelensError: if its data are not available.
        """

    def describe(self, name: str) -> str:
        """A one-line description of a task, for listings."""
        return ""

    def group(self, name: str) -> str:
        """The group under which result tables list a task; by default the name of the suite."""
        return self.name

    def n_items(self, name: str) -> int | None:
        """The number of items of a task; None if it is unknown before the task is loaded."""
        return None
