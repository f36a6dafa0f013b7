"""Checks of arguments against their annotations: `checked` decorates public functions and dataclasses.

Each argument is converted by `sitelens.checks.values`, or the call fails with a one-line SitelensError before anything
is computed. For an unknown argument, the error suggests similar names.
"""

from __future__ import annotations

import collections.abc as abc
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_origin

from sitelens.checks.values import UnusableValueError, converted
from sitelens.errors import SitelensError
from sitelens.settings import Settings
from sitelens.suggestions import did_you_mean

T = TypeVar("T")


class Arguments:
    """The parameters of a function or dataclass, with their resolved annotations.

    Args:
        target: the function or dataclass.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        self.name = target.__name__
        self.prefix = f"{self.name}." if inspect.isclass(target) else ""
        function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        self.hints: dict[str, Any] = {}
        self.positional: list[str] = []
        self.open = False  # whether any keyword is accepted
        for parameter in parameters:
            hint = _resolved(parameter.annotation, _namespace(target, parameter.name))
            if parameter.kind is parameter.VAR_KEYWORD:
                unpacked = get_args(hint)[0] if get_origin(hint) is typing.Unpack else None
                if unpacked is None:
                    self.open = True
                else:
                    origin = vars(sys.modules[unpacked.__module__])
                    self.hints |= {key: _resolved(value, origin) for key, value in unpacked.__annotations__.items()}
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                self.hints[parameter.name] = hint
                if parameter.kind is not parameter.KEYWORD_ONLY and parameter.name != "self":
                    self.positional.append(parameter.name)
        self.hints.pop("self", None)

    def bound(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, converted to plain values.

        Raises:
            SitelensError: for a missing, surplus or unknown argument, or a value that cannot be used.
        """
        for name in keywords:
            if name not in self.hints and not self.open:
                if name in Settings.names():
                    raise SitelensError(f"{self.name} takes no argument {name!r}: it is a setting, as in "
                                        f"`with sl.settings.using({name}={keywords[name]!r}):`")  # fmt: skip
                raise SitelensError(f"{self.name} takes no argument {name!r}: {_nearest(name, self.hints)}")
        try:
            bound = self.signature.bind(*args, **keywords)
        except TypeError as error:
            order = f" ({', '.join(self.positional)} come in this order)" if len(self.positional) > 1 else ""
            raise SitelensError(f"{self.name}: {error}{order}") from None
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._converted(key, each) for key, each in value.items()}
            elif name in self.hints:
                bound.arguments[name] = self._converted(name, value)
        return bound.args, bound.kwargs

    def options(self, title: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for a later call, converted to plain values.

        Args:
            title: name of the function in messages.
            values: the keyword arguments.

        Raises:
            SitelensError: for an unknown option, suggesting similar names, or a value that cannot be used.
        """
        for name in values:
            if name not in self.hints and not self.open:
                raise SitelensError(f"{title} has no option {str(name)!r}: {_nearest(str(name), self.hints)}")
        return {name: converted(f"{title}.{name}", value, self.hints.get(name, Any)) for name, value in values.items()}

    def _converted(self, name: str, value: Any) -> Any:
        try:
            return converted(self.prefix + name, value, self.hints.get(name, Any))
        except UnusableValueError:
            raise
        except SitelensError as error:
            if name not in self.positional or not _is_misplaced(value):
                raise
            order = f"{self.name}({', '.join(self.positional)})"
            raise SitelensError(f"{error}; the order is {order}, or give arguments by name") from None


def checked(target: T) -> T:
    """Decorate a public function or dataclass so that its arguments are checked against their annotations.

    Args:
        target: the function or dataclass.
    """
    decorated: Any = target
    is_class = inspect.isclass(decorated)
    function = decorated.__init__ if is_class else decorated
    arguments: list[Arguments] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        if not arguments:  # at the first call, because annotations may refer to later definitions
            arguments.append(Arguments(decorated))
        args, keywords = arguments[0].bound(args, keywords)
        return function(*args, **keywords)

    if is_class:
        wrapper.__no_type_check__ = True  # type: ignore[attr-defined] # it accepts more than its annotations say
        decorated.__init__ = wrapper
        return target
    return typing.cast(T, wrapper)


@functools.cache
def arguments_of(target: Callable[..., Any]) -> Arguments:
    """The parameters of a function or dataclass, decorated or not."""
    return Arguments(target if inspect.isclass(target) else inspect.unwrap(target))


def _is_misplaced(value: Any) -> bool:
    """Whether a value was probably meant for another parameter: a model, a condition, a configuration."""
    return type(value).__module__.split(".")[0] in ("sitelens", "transformer_lens")


def _namespace(target: Any, name: str) -> Mapping[str, Any]:
    """The module namespace in which the annotation of a parameter was written (a base class's for inherited fields)."""
    bases = target.__mro__ if inspect.isclass(target) else ()
    owner = next((base for base in bases if name in vars(base).get("__annotations__", {})), target)
    return vars(sys.modules[owner.__module__])


def _resolved(annotation: Any, namespace: Mapping[str, Any]) -> Any:
    """The type of an annotation; Any if it cannot be resolved at run time or is a jaxtyping shape."""
    if annotation is inspect.Parameter.empty:
        return Any
    annotation = getattr(annotation, "__forward_arg__", annotation)
    if not isinstance(annotation, str):
        return annotation
    try:
        hint = eval(annotation, dict(namespace))
    except NameError:
        return Any
    return Any if getattr(hint, "__module__", "").startswith("jaxtyping") else hint


def _nearest(name: str, known: abc.Iterable[str]) -> str:
    known = list(known)
    return did_you_mean(name, known) or (f"there are {', '.join(known)}" if known else "it takes none")
