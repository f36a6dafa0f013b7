"""Global settings: memory budget, dtype, progress bars, folders."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import platformdirs

from sitelens.contexts import bound
from sitelens.errors import SitelensError
from sitelens.suggestions import nearest

Value = TypeVar("Value")
DTYPES = ("float16", "bfloat16", "float32", "float64")  # for the weights of a model

_using: ContextVar[Mapping[str, Any]] = ContextVar("using", default=MappingProxyType({}))


def _checked_size(name: str, value: Any) -> int | str:
    if isinstance(value, str):
        size = parse_bytes(value)
    else:
        try:
            size = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            size = -1
        value = size if size > 0 else value
    if size <= 0:
        raise SitelensError(f"{name} must be a positive number of bytes, got {value!r} (for example '2GiB')")
    return value


def _checked_switch(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise SitelensError(f"{name} must be True, False or None, got {value!r}")
    return value


def _checked_folder(name: str, value: Any) -> str | Path | None:
    if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
        raise SitelensError(f"{name} must be a folder (a text or a Path) or None, got {value!r}")
    return value


def checked_dtype(name: str, value: Any) -> str | None:
    """The name of a floating-point dtype, from a name ("bfloat16") or a torch dtype; None is returned unchanged.

    Raises:
        SitelensError: for anything other than the dtypes in `DTYPES`.
    """
    text = str(value).removeprefix("torch.")
    if value is not None and text not in DTYPES:
        raise SitelensError(f"unknown {name} {value!r}; write for example 'float32' or 'bfloat16'")
    return None if value is None else text


class _Setting(Generic[Value]):
    """One setting: its value in the innermost `using` block of this context, otherwise its process-wide value."""

    def __init__(self, default: Value, check: Callable[[str, Any], Value]) -> None:
        self.default, self.check, self.name = default, check, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Value:
        overridden = _using.get()
        return overridden[self.name] if self.name in overridden else vars(instance).get(self.name, self.default)

    def __set__(self, instance: Any, value: Value) -> None:
        vars(instance)[self.name] = self.check(self.name, value)


class Settings:
    """The global settings; `sl.settings` is the only instance.

    `sl.settings.progress = False` sets a value for the whole process. `with sl.settings.using(progress=False):` sets it
    for one block, in the current thread or async task only (threads started inside the block see the process-wide
    value), and takes precedence over assignments.

    Attributes:
        memory_budget: bytes that training and evaluation may use in addition to the weights: an integer, or a text such
            as "2GiB".
        dtype: dtype in which `load_model` loads weights by default, as a name ("bfloat16") or a torch dtype; None:
            float32 for GGUF files, such as the packaged models, and otherwise the dtype of the checkpoint.
        progress: True draws progress bars, False shows no progress; None: bars in a terminal or a notebook only.
        cache_dir: folder of cached results and converted models; None: the environment variable SITELENS_CACHE, or the
            user's cache folder.
        data_dir: folder with data sets in their upstream layout; None: the environment variable SITELENS_DATA, or
            download.

    Raises:
        SitelensError: when a setting is assigned, for an unknown name or an invalid value.

    Example:
        >>> with sl.settings.using(memory_budget="4GiB", progress=False):
        ...     sl.settings.budget()
        4294967296
    """

    memory_budget = _Setting[int | str]("2GiB", _checked_size)
    dtype = _Setting[str | None](None, checked_dtype)
    progress = _Setting[bool | None](None, _checked_switch)
    cache_dir = _Setting[str | Path | None](None, _checked_folder)
    data_dir = _Setting[str | Path | None](None, _checked_folder)

    def using(self, **values: Any) -> AbstractContextManager[None]:
        """A context manager that changes settings for one block, in the current thread or async task only.

        Args:
            values: new values by name of the setting; the other settings are unchanged.

        Raises:
            SitelensError: for an unknown name or an invalid value.
        """
        checked = {name: self._setting(name).check(name, value) for name, value in values.items()}
        return bound(_using, {**_using.get(), **checked})

    def __setattr__(self, name: str, value: Any) -> None:
        self._setting(name).__set__(self, value)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={getattr(self, name)!r}' for name in self._settings())})"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(cls._settings())

    @classmethod
    def _settings(cls) -> dict[str, _Setting[Any]]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, _Setting)}

    @classmethod
    def _setting(cls, name: str) -> _Setting[Any]:
        known = cls._settings()
        if name not in known:
            near = nearest(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(known)}"
            raise SitelensError(f"there is no setting {name!r}: {hint}")
        return known[name]

    def budget(self) -> int:
        """The memory budget, in bytes."""
        value = self.memory_budget
        return parse_bytes(value) if isinstance(value, str) else int(value)

    def cache(self) -> Path:
        """The cache folder, which need not exist yet."""
        chosen = self.cache_dir or os.environ.get("SITELENS_CACHE")
        return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sitelens"))

    def data(self) -> Path | None:
        """The local data folder; None if data sets are downloaded.

        Raises:
            SitelensError: if the folder does not exist.
        """
        chosen = self.data_dir or os.environ.get("SITELENS_DATA")
        if not chosen:
            return None
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise SitelensError(f"the data folder {folder} does not exist (SITELENS_DATA or sl.settings.data_dir)")
        return folder


settings = Settings()


def parse_bytes(text: str) -> int:
    """The number of bytes in a size such as "2GiB", "512 MB" or "1e9".

    Raises:
        SitelensError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        number = float(match.group(1)) if match else float("nan")
    except ValueError:
        number = float("nan")
    if match is None or number != number:
        raise SitelensError(f"cannot read {text!r} as a size; write it like '2GiB' or '512MB'")
    base = 1024 if match.group(3) else 1000
    return int(number * base ** " kmgt".index(match.group(2) or " "))
