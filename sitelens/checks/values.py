"""Conversion of one value to the type that its annotation declares, or a one-line error.

The following values are accepted in addition to the annotated type:

- numbers of NumPy, pandas and torch, and whole floats for integers; they become Python's int and float, so that they
  give the same cache keys, seeds and JSON as plain numbers;
- arrays, ranges, Series and other iterables for a list; a single text or task for a list of one;
- for a class with `_from_argument`, whatever that method accepts, for example a dict of its fields for a TrainConfig.
"""

from __future__ import annotations

import collections.abc as abc
import math
import os
import struct
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from sitelens.errors import SitelensError


@dataclass(frozen=True)
class Between:
    """A range of numbers from `low` to `high`, used in `Annotated` type hints.

    Args:
        low, high: the ends; None for no limit.
        open_ends: whether the ends themselves are excluded.
        words: description of the range in messages, if its ends would be unreadable.
    """

    low: int | float | None = None
    high: int | float | None = None
    open_ends: bool = False
    words: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise SitelensError for a number that is outside the range or not finite."""
        under = self.low is not None and (value <= self.low if self.open_ends else value < self.low)
        over = self.high is not None and (value >= self.high if self.open_ends else value > self.high)
        if under or over or not math.isfinite(value):
            raise UnusableValueError(f"{name} must {self._said(under)}, got {_shown(value)}")

    def _said(self, under: bool) -> str:
        if self.words:
            return f"be {self.words}"
        if self.open_ends and self.high is None:
            return "be positive"
        if self.low is not None and self.high is not None:
            ends = f"between {self.low} and {self.high}" if self.open_ends else f"in [{self.low}, {self.high}]"
            return f"lie {ends}"
        return f"be at least {self.low}" if under or self.high is None else f"be at most {self.high}"


class UnusableValueError(SitelensError):
    """A value of the right type that cannot be used: a number out of range, text that cannot be encoded."""


Count = Annotated[int, Between(1)]
CountOrZero = Annotated[int, Between(0)]
Positive = Annotated[float, Between(0, None, open_ends=True)]
Share = Annotated[float, Between(0, 1)]
Seed = Annotated[int, Between(-(2**63), 2**63 - 1, words="a whole number of at most 63 bits")]
SplitSeed = Annotated[int, Between(0, 2**32 - 1)]  # seeds that NumPy's RandomState accepts


def converted(name: str, value: Any, hint: Any) -> Any:
    """The value, converted to the type that its annotation declares.

    Args:
        name: what messages call it.
        value: the value as the user passed it.
        hint: the annotation.

    Raises:
        SitelensError: if it cannot be converted.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, str | TypeVar):
        return value
    if origin is Annotated:
        value = _as_class(name, value, float) if parts[0] is float else converted(name, value, parts[0])
        for rule in parts[1:]:
            if isinstance(rule, Between):
                rule.check(name, value)
        return value
    if hint is float:
        return _finite(name, _as_class(name, value, hint))
    if origin in (Union, types.UnionType):
        return _one_of(name, value, parts)
    if origin is Literal:
        for part in parts:
            if (type(part) is type(value) and part == value) or (isinstance(part, str) and str_of(value) == part):
                return part
    elif origin is not None and isinstance(origin, type) and issubclass(origin, abc.Mapping):
        if isinstance(value, abc.Mapping):
            return {converted(f"a name in {name}", key, parts[0]): converted(f"{name}[{key!r}]", each, parts[1])
                    for key, each in value.items()}  # fmt: skip
    elif origin is not None and isinstance(origin, type) and issubclass(origin, abc.Iterable):
        return _several(name, value, hint)
    elif origin in (abc.Callable, type):
        if callable(value):
            return value
    elif isinstance(hint, type):
        return _as_class(name, value, hint)
    else:
        return value
    raise _refusal(name, value, hint)


def str_of(value: Any) -> str | None:
    """A text as a plain `str` (not a subclass such as numpy.str_); None for any other value."""
    return str(value) if isinstance(value, str) else None


def _one_of(name: str, value: Any, parts: tuple[Any, ...]) -> Any:
    """The value converted to the first member of a union that accepts it, trying its own type first."""
    if value is None and types.NoneType in parts:
        return None
    plain = [part for part in parts if isinstance(part, type) and type(value) is part]
    reasons = []
    for part in [*plain, *(part for part in parts if part not in plain)]:
        try:
            return converted(name, value, part)
        except SitelensError as error:
            reasons.append(error)
    for reason in reasons:
        if isinstance(reason, UnusableValueError):
            raise reason
    inside = [reason for reason in reasons if str(reason).startswith(f"{name}[")]  # it names the invalid item
    if inside:
        raise inside[0]
    raise _refusal(name, value, Union[parts])  # noqa: UP007


def _several(name: str, value: Any, hint: Any) -> Any:
    """A list or tuple of converted items."""
    parts = get_args(hint)
    item = parts[0] if parts else Any
    make = tuple if get_origin(hint) is tuple else list
    if len(parts) == 2 and get_origin(hint) is tuple and parts[1] is not Ellipsis:
        return value
    if hasattr(value, "tolist") and not isinstance(value, str):  # NumPy, pandas and torch
        value = value.tolist() if getattr(value, "ndim", 1) else value.item()
    alone = isinstance(value, str | os.PathLike) or not isinstance(value, abc.Iterable)
    if isinstance(value, bytes | abc.Mapping) or (alone and _is_number(value)) or value is None:
        raise _refusal(name, value, hint)
    if alone:
        try:
            return make([converted(name, value, item)])
        except UnusableValueError:
            raise
        except SitelensError:
            raise _refusal(name, value, hint) from None
    items: Any = value
    return make(converted(f"{name}[{index}]", each, item) for index, each in enumerate(items))


def _as_class(name: str, value: Any, kind: type) -> Any:
    value = value if kind is bool or isinstance(value, kind) else _plain(value)
    if kind is bool and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if kind is int and _is_number(value) and math.isfinite(value) and int(value) == value:
        return int(value)
    if kind is float and _is_number(value):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if kind is str and isinstance(value, str | os.PathLike):
        return _text(name, str(value))
    if kind in (int, float, bool, str):
        raise _refusal(name, value, kind)
    if isinstance(value, kind):
        return value
    if (make := getattr(kind, "_from_argument", None)) is not None and (made := make(value)) is not None:
        return made
    raise _refusal(name, value, kind)


def _plain(value: Any) -> Any:
    """A number of NumPy, pandas or torch as a Python number; any other value unchanged."""
    if not hasattr(value, "item") or getattr(value, "ndim", None) != 0:
        return value
    try:
        plain = value.item()
    except (TypeError, ValueError, RuntimeError):
        return value
    return _shortest(plain) if isinstance(plain, float) and str(value.dtype).endswith("float32") else plain


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to a 32-bit float: 0.1, not 0.10000000149011612."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in candidates if struct.pack("f", short) == struct.pack("f", value)), value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise UnusableValueError(f"{name} must be a finite number, got {value}")
    return value


def tensor(name: str, value: Any, axes: str) -> Any:
    """Numbers as a floating-point tensor on the CPU, without gradient.

    Args:
        name: what messages call it.
        value: a tensor, list, array or DataFrame of real numbers.
        axes: names of its axes, for example "layer head".

    Raises:
        SitelensError: for other values, another number of axes, or no numbers at all.
    """
    import torch

    try:
        result = value if isinstance(value, torch.Tensor) else torch.tensor(getattr(value, "to_numpy", lambda: value)())
        result = (result.to_dense() if result.layout is not torch.strided else result).detach().cpu()
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        result = None
    if (
        result is None
        or result.is_complex()
        or result.is_quantized
        or result.ndim != len(axes.split())
        or not result.numel()
    ):
        kind = _shown(value) if result is None else f"{result.dtype} of shape {tuple(result.shape)}"
        raise SitelensError(f"{name} must be numbers of shape [{axes}], not {kind}")
    return result if result.is_floating_point() else result.float()


def _text(name: str, value: str) -> str:
    """The text unchanged, if it can be written to a file.

    Raises:
        SitelensError: if it contains half of a surrogate pair.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableValueError(f"{name} must be text that can be written as UTF-8, not {value!r}: it holds half of a "
                            "surrogate pair") from None  # fmt: skip
    return value


def _shown(value: Any) -> str:
    """A value for a message: its repr, at most 80 characters, for simple types; otherwise its type."""
    if isinstance(value, str | bytes | int | float | list | tuple | dict | os.PathLike) or value is None:
        try:
            text = repr(value)
        except Exception:  # the repr of an item may raise anything
            return type(value).__name__
        return text if len(text) <= 80 else f"{text[:77]}..."
    kind = type(value)
    if kind.__module__.startswith("transformers"):
        return f"a {kind.__name__} of transformers"
    return _with_article(kind.__name__) if not isinstance(value, type) else f"the class {value.__name__}"


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}


def _refusal(name: str, value: Any, hint: Any) -> SitelensError:
    *others, last = dict.fromkeys(_said(hint))
    text = f"{name} must be {', '.join(others) + ' or ' if others else ''}{last}, not {_shown(value)}"
    kind = type(value)
    if kind.__module__.startswith("transformers") and "TransformerBridge" in text:
        text += ": load_model(folder or hub id), or wrap it with TransformerLens's build_bridge_from_module"
    elif isinstance(value, type):
        text += f": write {value.__name__}()"
    elif _is_number(value) and any(get_origin(part) is abc.Sequence for part in [hint, *get_args(hint)]):
        text += f": write [{value}]"
    return SitelensError(text)


def _said(hint: Any) -> list[str]:
    """The alternatives that a type hint allows, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _said(parts[0])
    if origin in (Union, types.UnionType):
        words = [word for part in parts if part is not types.NoneType for word in _said(part)]
        if "a TransformerBridge" in words:
            words = ["a model's name", "a TransformerBridge"]
        return [*words, "None"] if types.NoneType in parts else words
    if origin is Literal:
        return [repr(part) for part in parts]
    if origin is not None and isinstance(origin, type) and issubclass(origin, abc.Mapping):
        return [f"a dict of names and {'values' if parts[1] is Any else _plural(parts[1])}"]
    if origin is not None and isinstance(origin, type) and issubclass(origin, abc.Iterable):
        return [f"a list of {_plural(parts[0])}" if parts else "a list"]
    if hint in _NAMES:
        return [_NAMES[hint]]
    if isinstance(hint, type):
        return [_with_article(hint.__name__)]
    return ["a function"] if origin is abc.Callable else ["something else"]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _plural(hint: Any) -> str:
    words = {"a whole number": "whole numbers", "a number": "numbers", "a text": "texts"}
    return " or ".join(words.get(word, f"{word.split(' ', 1)[-1]}s" if word.startswith(("a ", "an ")) else word)
                       for word in dict.fromkeys(_said(hint)))  # fmt: skip
