"""Registry of methods: those of sitelens by name, a user's by MODULE:CLASS or, if it is unique, by name.

A method is registered when its class is defined. Packages provide methods through the entry-point group
`sitelens.methods`, which is read once, when a name is not found or all methods are listed.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterable, Mapping
from inspect import isabstract
from pathlib import Path
from typing import Any

from sitelens.checks.arguments import arguments_of
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.suggestions import did_you_mean

ENTRY_POINTS = "sitelens.methods"
CLASSES: dict[str, Any] = {}  # by key
ALL = (
    "zero-shot", "10-shot", "many-shot", "FV", "TV", "ICV", "MTV", "I2CL", "LTV", "LoFiT", "LoRA", "SITE",
)  # fmt: skip


def is_own(kind: type) -> bool:
    """Whether a class belongs to sitelens."""
    return kind.__module__.split(".")[0] == "sitelens"


def register(kind: Any) -> str:
    """Adds a method class and returns its key; redefining a class, as in a notebook, replaces the old one.

    Raises:
        SitelensError: if the class's name is not a non-empty string.
    """
    if not isinstance(kind.name, str) or not kind.name:
        raise SitelensError(f"the name of the method {kind.__qualname__} must be text, not {kind.name!r}")
    key = kind.name if is_own(kind) else f"{kind.__module__}:{kind.__qualname__}"
    CLASSES[key] = kind
    return key


def method_classes() -> dict[str, Any]:
    """All method classes by key, including those from entry points."""
    _load_entry_points()
    return {key: kind for key, kind in CLASSES.items() if not isabstract(kind)}


def method_class(name: str) -> Any:
    """The method class with this key or name.

    Raises:
        SitelensError: if there is none (with the nearest names), or if several classes share the name.
    """
    known = {key: kind for key, kind in CLASSES.items() if not isabstract(kind)}
    if name not in known and not any(kind.accepts(name) for kind in known.values()):
        known = method_classes()
    if name in known:
        return known[name]
    matches = {key: kind for key, kind in known.items() if kind.accepts(name)}
    if len(matches) > 1:
        raise SitelensError(f"several methods are called {name!r}: write {' or '.join(matches)}")
    if not matches:
        names = dict.fromkeys([kind.name for kind in known.values()])
        hint = did_you_mean(name, names) or f"there are {', '.join(names)}"
        raise SitelensError(f"unknown method {name!r}: {hint}")
    return next(iter(matches.values()))


def method_named(name: str, values: Mapping[str, Any] | None = None) -> Any:
    """The method with this key or name.

    Args:
        name: for example "SITE", "5-shot" or "my_module:MyMethod".
        values: fields to set; the others keep their defaults.

    Raises:
        SitelensError: for an unknown method or field, or an invalid value.

    Example:
        >>> sl.methods.method_named("TV") == sl.methods.TV()
        True
    """
    kind = method_class(name)
    fields = arguments_of(kind).options(name, values or {})
    try:
        return kind.from_name(name, **fields)
    except TypeError as error:
        raise SitelensError(f"the method {name!r}: {error}") from error


def load_methods(path: str | Path) -> list[str]:
    """Keys of the methods that a Python file defines; the file is imported as a module unless it already has been.

    Raises:
        SitelensError: if the file does not exist, fails or defines no method, or if another module has its name.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise SitelensError(f"{path} is no Python file")
    module = sys.modules.get(path.stem)
    known = importlib.util.find_spec(path.stem) if module is None else getattr(module, "__spec__", None)
    home = None if known is None else known.origin
    if (module is not None or known is not None) and (home is None or Path(home).resolve() != path.resolve()):
        raise SitelensError(f"{path}: there is a module {path.stem!r} already; rename the file")
    if module is None:
        loader = importlib.machinery.SourceFileLoader(path.stem, str(path.resolve()))
        spec = importlib.util.spec_from_loader(path.stem, loader)
        assert spec is not None  # a loader is given
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        try:
            loader.exec_module(module)
        except Exception as error:
            del sys.modules[path.stem]
            raise SitelensError(f"{path} fails: {type(error).__name__}: {error}") from error
    keys = [key for key, kind in CLASSES.items() if kind.__module__ == path.stem and not isabstract(kind)]
    if not keys:
        raise SitelensError(f"{path} defines no method: a subclass of sl.Method")
    return keys


@functools.cache
def _load_entry_points() -> None:
    """Imports the methods of installed packages, once; one that fails gives a warning."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            kind = point.load()
            if not (isinstance(kind, type) and kind in CLASSES.values()):
                raise TypeError(f"{point.value} is no subclass of sl.Method")
        except Exception as error:
            warnings.warn(
                f"the method {point.name!r} of the entry point {point.value} cannot be loaded: "
                f"{type(error).__name__}: {error}",
                SitelensWarning,
                stacklevel=2,
            )


def methods_by_label(methods: Iterable[Any] | str) -> dict[str, Any]:
    """Methods, given as values or names, by their label in tables; "all" means every method of sitelens.

    Raises:
        SitelensError: for an unknown name, or if two different methods have the same label.
    """
    if isinstance(methods, str):
        methods = ALL if methods == "all" else [methods]
    return labelled(method_named(method) if isinstance(method, str) else method for method in methods)


def labelled(methods: Iterable[Any]) -> dict[str, Any]:
    """Distinct methods by their label in tables; methods of the same name also show their non-default fields.

    Raises:
        SitelensError: if two different methods have the same label.
    """
    distinct: list[Any] = []
    for method in methods:
        if method not in distinct:
            distinct.append(method)
    names = [method.label for method in distinct]
    labels: dict[str, Any] = {}
    for name, method in zip(names, distinct, strict=True):
        label = name if names.count(name) == 1 else method.full_label
        if label in labels:
            raise SitelensError(f"two methods are called {label!r}: give one of them another name")
        labels[label] = method
    return labels
