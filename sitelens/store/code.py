"""A digest of what a user's own function or class computes, so that its results can be cached on disk.

It covers the compiled code, the defaults, the variables of the closure and, recursively, the values of all global names
that the code refers to. Code from installed libraries and from sitelens is identified by its name and version.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sitelens.store.digests import content_digest, digest

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_FORMAL = frozenset({  # attributes of a class that do not affect what it computes
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl",
    "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__hash__", "__firstlineno__",
    "__static_attributes__",
})  # fmt: skip


class _Untold(Exception):  # noqa: N818
    """A value for which no digest can be computed."""


def code_digest(value: object) -> str | None:
    """SHA-256 of what functions, classes and plain values compute; None if they refer to a value without a digest.

    Values without a digest are objects whose state is not described by their class, such as an open file.
    """
    try:
        described = _Description().of(value)
    except (_Untold, RecursionError):
        return None
    return digest([list(sys.version_info[:2]), described])


class _Description:
    """Descriptions of values as plain JSON. A repeated value is described by its index, so that cycles end."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        self.alive: list[object] = []  # keeps values alive, so that no id is reused

    def of(self, value: Any) -> Any:
        if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex | str | bytes):
            return [type(value).__name__, repr(value)]
        if isinstance(value, types.CodeType):
            return [hashlib.sha256(value.co_code).hexdigest(), list(value.co_names), self._all(value.co_consts)]
        if id(value) in self.places:
            return ["again", self.places[id(value)]]
        self.places[id(value)] = len(self.places)
        self.alive.append(value)
        return self._new(value)

    def _new(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [type(value).__name__, *self._all(value)]
        if isinstance(value, set | frozenset):
            return ["set", *self._all(sorted(value, key=repr))]
        if isinstance(value, dict | types.MappingProxyType):
            return ["dict", *([self.of(key), self.of(inner)] for key, inner in value.items())]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, Tensor):
            return ["tensor", content_digest(value)]
        if isinstance(value, types.ModuleType):
            return _module(value)
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__self__), self.of(value.__func__)]
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self._all(value.args), self.of(value.keywords)]
        if isinstance(value, property):
            return ["property", *self._all((value.fget, value.fset))]
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self.of(value.__func__)]
        if isinstance(value, functools.cached_property):
            return ["cached_property", self.of(value.func)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType):
            return ["builtin", value.__qualname__, self.of(value.__self__)]
        if isinstance(value, types.MethodDescriptorType | types.WrapperDescriptorType):
            return ["descriptor", value.__objclass__.__qualname__, value.__name__]
        held = getattr(value, "__dict__", {})
        if dataclasses.is_dataclass(value) and held.keys() == {field.name for field in dataclasses.fields(value)}:
            return ["instance", self.of(type(value)), self.of(held)]
        raise _Untold

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self.of(value) for value in values]

    def _function(self, function: types.FunctionType) -> Any:
        if _installed(function.__module__) and "<" not in function.__qualname__:
            return ["function", function.__qualname__, *_version(function.__module__)]
        known = function.__globals__
        names = sorted(name for name in set(_globals_of(function.__code__)) if name in known)
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a variable without a value yet
            raise _Untold from None
        return [
            "function", self.of(function.__code__), self.of(function.__defaults__), self.of(function.__kwdefaults__),
            self._all(cells), [[name, self.of(known[name])] for name in names],
        ]  # fmt: skip

    def _class(self, kind: type) -> Any:
        if _installed(kind.__module__):
            return ["class", kind.__qualname__, *_version(kind.__module__)]
        made = hasattr(kind, "__dataclass_fields__")  # __init__ and other generated methods follow from its fields
        parts = [
            [name, self.of(part)]
            for name, part in vars(kind).items()
            if name not in _FORMAL
            and not (made and _is_made(part))
            and not isinstance(part, types.MemberDescriptorType)
        ]
        return ["class", kind.__qualname__, self._all(kind.__bases__), parts]


def _globals_of(code: types.CodeType) -> Iterable[str]:
    """The global names that code refers to, including code of functions defined inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _is_made(part: object) -> bool:
    """Whether a function was generated by the dataclass decorator."""
    inner = getattr(part, "__wrapped__", part)
    return isinstance(inner, types.FunctionType) and inner.__code__.co_filename == "<string>"


def _module(module: types.ModuleType) -> Any:
    if _installed(module.__name__):
        return ["module", *_version(module.__name__)]
    try:
        return ["module", module.__name__, hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()]
    except OSError:
        raise _Untold from None


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module belongs to sitelens, the standard library, or an installed package."""
    top = module.partition(".")[0]
    if top == "sitelens" or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and any(folder in Path(file).resolve().parents for folder in _INSTALLED)


def _version(module: str) -> tuple[str, str]:
    """The name of a module and the version of its package ("" if it has none)."""
    held: Mapping[str, Any] = vars(sys.modules.get(module.partition(".")[0], types.ModuleType("none")))
    return module, str(held.get("__version__", ""))
