"""Registries: values by name, from sitelens itself, registered by the user, or provided by installed packages.

A package provides a suite, for example, through an entry point in its pyproject.toml:

    [project.entry-points."sitelens.suites"]
    mine = "my_package.tasks:MySuite"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.suggestions import did_you_mean

Value = TypeVar("Value")  # has an attribute `name`


class Registry(Mapping[str, Value]):
    """A read-only mapping from names to values, with sitelens's own values first.

    Entry points (of the group "sitelens.suites" for suites) are loaded when a name is not one of sitelens's own, or
    when all names are listed. An entry point names a value, a class, or a module that registers values when it is
    imported. One that cannot be loaded causes a warning; the others are still loaded.

    Args:
        what: what a value is called in messages, such as "suite".
        kind: the class of the values; a subclass in place of a value is instantiated without arguments.
        own: sitelens's own values; their names cannot be registered again.
        plural: plural of `what`, if it is not formed with an s.
        definition: returns the class or function that defines a value. A value whose definition has the same module
            and name as an earlier one's replaces it, as when a notebook cell is run again.
        check: called with each new value; raises SitelensError for a value that cannot be used.
    """

    def __init__(
        self,
        what: str,
        kind: type,
        own: Iterable[Any] = (),
        *,
        plural: str = "",
        definition: Callable[[Any], Any] = type,
        check: Callable[[Any], object] = lambda value: None,
    ) -> None:
        self.what, self.kind, self.definition, self.check = what, kind, definition, check
        self.group = f"sitelens.{plural or what + 's'}"
        self.own: dict[str, Any] = {value.name: value for value in own}
        self._added: dict[str, Any] = {}
        self._asked = False  # whether the entry points have been loaded

    def register(self, value: Any) -> Any:
        """Add a value and return the argument unchanged, so that it can also decorate a class.

        Args:
            value: a value, or a class whose instance is added.

        Raises:
            SitelensError: if it is not of the right class, its name is empty, another value has that name, or `check`
                rejects it.
        """
        self._add(value)
        return value

    def named(self, name: object) -> Value:
        """The value with this name.

        Raises:
            SitelensError: for an unknown name, suggesting the most similar one and listing all.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        hint = did_you_mean(name, self, n=1)
        raise SitelensError(f"unknown {self.what} {name!r}{hint and f' ({hint})'}; there are: {', '.join(self)}")

    def __getitem__(self, name: str) -> Value:
        return self.own[name] if name in self.own else self._others()[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *self._others()])

    def __len__(self) -> int:
        return len(self.own) + len(self._others())

    def _others(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True  # set first, because a module that is loaded may register values itself
            for entry in entry_points(group=self.group):
                try:
                    value = entry.load()
                    if not isinstance(value, ModuleType):
                        self._add(value)
                except Exception as error:  # code of other packages can raise anything
                    warnings.warn(
                        f"the {self.what} {_told(entry)} cannot be used: {type(error).__name__}: {error}",
                        SitelensWarning, stacklevel=4,
                    )  # fmt: skip
        return self._added

    def _add(self, value: Any) -> None:
        if isinstance(value, type) and issubclass(value, self.kind):
            value = value()
        if not isinstance(value, self.kind):
            raise SitelensError(f"a {self.what} must be a sitelens.{self.kind.__name__}, not {value!r}")
        name = value.name
        if not isinstance(name, str) or not name.strip():
            raise SitelensError(f"the name of a {self.what} must be text and not empty, not {name!r}")
        other = self.own.get(name) or self._added.get(name)
        if other is not None and (name in self.own or self._place(other) != self._place(value)):
            raise SitelensError(f"there is a {self.what} {name!r} already, {self._place(other)}; choose another name")
        self.check(value)
        self._added[name] = value

    def _place(self, value: Any) -> str:
        definition = self.definition(value)
        return f"{definition.__module__}:{definition.__qualname__}"


def _told(entry: EntryPoint) -> str:
    """An entry point and its package, for messages."""
    return f"{entry.name!r} ({entry.value})" + (f" of {entry.dist.name}" if entry.dist is not None else "")
