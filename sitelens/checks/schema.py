"""Checks of file contents: JSON and tensors are checked against type hints before objects are made from them.

A dataclass is its own schema. `unpacked` makes an instance from the content of a file: every field must have the
declared type, fields without a default must be present, and there may be no others. The hint of a tensor, such as
`Float[Tensor, "layer head"]`, gives its number of dimensions; an axis must have the same length in every tensor that
names it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pandas as pd
import torch
from torch import Tensor

from sitelens.checks.frames import Column, packed_frame, unpacked_frame
from sitelens.errors import SitelensError

Made = TypeVar("Made")

DEEPEST = 100  # nested levels of JSON
LARGEST = 2**64  # integers must be smaller
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    dict: "an object",
}


def parsed_json(text: str | bytes, where: object) -> Any:
    """JSON in which each key occurs once and each number is finite.

    Args:
        text: the JSON text.
        where: what messages call it.

    Raises:
        SitelensError: saying what is wrong with it.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SitelensError(f"{where} is not readable JSON: {reason}") from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > DEEPEST:
            raise SitelensError(f"{where} is not readable JSON: it is nested too deeply")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated[:60]!r} occurs twice")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return float(text)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def conform(value: Any, hint: Any, what: str) -> Any:
    """A JSON value as its type hint declares it: lists become tuples, and objects dataclasses, if the hint says so.

    An integer is accepted as a float. There is no other conversion: neither true nor 1.0 is accepted as an integer.

    Args:
        value: parsed JSON.
        hint: the type hint.
        what: what messages call the value.

    Raises:
        SitelensError: if the value does not fit the hint.
    """
    kind, options = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if kind in (Union, types.UnionType):
        return _one_of(value, options, what)
    if kind is Literal:
        if any(type(value) is type(option) and value == option for option in options):
            return value
    elif kind is tuple and isinstance(value, list | tuple):
        inner = [options[0]] * len(value) if options[1:] == (...,) else list(options)
        if len(inner) == len(value):
            return tuple(conform(v, one, f"{what}[{i}]") for i, (v, one) in enumerate(zip(value, inner, strict=True)))
    elif kind is list and isinstance(value, list | tuple):
        return [conform(v, options[0], f"{what}[{i}]") for i, v in enumerate(value)]
    elif isinstance(kind, type) and issubclass(kind, Mapping) and isinstance(value, dict):
        return {key: conform(v, options[1], f"{what}.{key}") for key, v in value.items()}
    elif dataclasses.is_dataclass(hint):
        return unpacked(typing.cast(type, hint), value, {}, what)
    elif type(value) is int and hint in (int, float) and abs(value) >= LARGEST:
        raise SitelensError(f"{what} is too large: {_shown(value)}")
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is None:
        hint = type(None)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise SitelensError(f"{what} must be {_described(hint)}, not {_shown(value)}")


def _one_of(value: Any, options: tuple[Any, ...], what: str) -> Any:
    errors: list[str] = []
    for option in sorted(options, key=lambda option: option is float):  # float last, to keep 1 an int
        try:
            return conform(value, option, what)
        except SitelensError as error:
            errors.append(str(error))
    inner = [error for error in errors if not error.startswith(f"{what} must be")]
    named = " or ".join(_described(option) for option in options)
    raise SitelensError(inner[0] if inner else f"{what} must be {named}, not {_shown(value)}")


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "an object"
    name = _NAMES.get(type(None) if hint is None else hint)
    kinds: dict[Any, str] = {tuple: "a list", list: "a list"}
    return name or kinds.get(get_origin(hint), "an object")


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= LARGEST:  # Python refuses to print more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unpacked(kind: type[Made], content: Any, tensors: Mapping[str, Tensor], where: str) -> Made:
    """An instance of a dataclass, made from the JSON object and the tensors of a file.

    Args:
        kind: the dataclass.
        content: the JSON object.
        tensors: tensors by field name; for a field that is a dataclass, a dict or a DataFrame, by "FIELD.NAME".
        where: what messages call the file.

    Raises:
        SitelensError: naming the file and the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(content, dict):
        raise SitelensError(f"{where} must be an object, not {_shown(content)}")
    hints = hints_of(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind)) if field.init}
    check_names([*content, *(name.split(".")[0] for name in tensors)], fields, where)
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, field in fields.items():
        hint, what = hints.get(name, Any), f"{where}: {name}"
        inner = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if hint is pd.DataFrame and name in content:
            if name in tensors:
                raise SitelensError(f"{what} occurs twice")
            values[name] = unpacked_frame(conform(content[name], list[Column], what), inner, what)
        elif name in tensors:
            if name in content or inner:
                raise SitelensError(f"{what} occurs twice")
            values[name] = checked_tensor(tensors[name], hint, what, sizes)
        elif inner and get_origin(hint) is dict:
            values[name] = {key: checked_tensor(tensor, Tensor, f"{what}.{key}") for key, tensor in inner.items()}
        elif inner:
            values[name] = unpacked(_dataclass_in(hint, what), content.get(name), inner, what)
        elif name in content:
            value = conform(content[name], hint, what)
            values[name] = tuple(value) if isinstance(value, list) and name not in hints else value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SitelensError(f"{what} is missing")
    try:
        return kind(**values)
    except SitelensError as error:
        raise SitelensError(f"{where}: {error}") from error


def packed(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON object from which `unpacked` restores a dataclass.

    Fields that are None are omitted if None is their default.
    """
    tensors: dict[str, Tensor] = {}
    content: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if isinstance(one, Tensor):
            tensors[field.name] = one
        elif isinstance(one, pd.DataFrame):
            inner, content[field.name] = packed_frame(one)
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in inner.items()}
        elif dataclasses.is_dataclass(one):
            inner, content[field.name] = packed(one)
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in inner.items()}
        elif isinstance(one, dict) and one and all(isinstance(inner, Tensor) for inner in one.values()):
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in one.items()}
        elif not (one is None and field.default is None):
            content[field.name] = one
    return tensors, content


def hints_of(kind: type) -> dict[str, Any]:
    """The type hints of a class; empty if they cannot be read (a class defined inside a function)."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError, AttributeError):
        return {}


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise SitelensError for the first name that is not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SitelensError(f"{where} holds {unknown[0][:60]!r}, which is unknown; it may hold {', '.join(known)}")


def checked_tensor(
    tensor: Tensor, hint: Any, what: str, sizes: dict[str, int] | None = None, *, finite: bool = True
) -> Tensor:
    """The tensor unchanged, if it matches its hint.

    Args:
        tensor: the tensor as read from a file.
        hint: its type hint, such as `Float[Tensor, "layer head"]`.
        what: what messages call it.
        sizes: lengths of the axes seen so far, by name; those of this tensor are added.
        finite: whether all numbers must be finite.

    Raises:
        SitelensError: for a wrong dtype, number of dimensions or length of an axis, or numbers that are not finite.
    """
    options = [option for option in get_args(hint) or (hint,) if hasattr(option, "dim_str")]
    if not options:
        if hint in (Any, Tensor):
            return tensor
        raise SitelensError(f"{what} must be {_described(hint)}, not a tensor")
    floating, axes = "float32" in options[0].dtypes, options[0].dim_str.split()
    if (tensor.dtype in FLOATS) != floating or (not floating and tensor.dtype != torch.int64):
        raise SitelensError(f"{what} must be a tensor of {'floats' if floating else 'int64'}, not {tensor.dtype}")
    if tensor.ndim != len(axes) or (axes and not tensor.numel()):
        raise SitelensError(f"{what} must be a tensor [{' '.join(axes)}], not of shape {tuple(tensor.shape)}")
    known = {} if sizes is None else sizes
    for axis, length in zip(axes, tensor.shape, strict=True):
        if known.setdefault(axis, length) != length:
            raise SitelensError(f"{what} has {length} entries along {axis!r}, where others have {known[axis]}")
    if floating and finite and not bool(torch.isfinite(tensor).all()):
        raise SitelensError(f"{what} holds numbers that are not finite")
    return tensor


def _dataclass_in(hint: Any, what: str) -> type:
    options = [option for option in get_args(hint) or (hint,) if dataclasses.is_dataclass(option)]
    if not options:
        raise SitelensError(f"{what} must be {_described(hint)}, not an object with tensors")
    return typing.cast(type, options[0])
