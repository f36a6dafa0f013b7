"""What a user sets once (memory, progress bars, folders), and the package's own error and warning."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import platformdirs

Item = TypeVar("Item")
_watcher: ContextVar[Callable[[float], None] | None] = ContextVar("watcher", default=None)


class SitelensError(ValueError):
    """Input that cannot be used; the message names the thing and says what would have been right."""


class SitelensWarning(UserWarning):
    """Something a careful reader of the results would want to know."""


@dataclass
class Settings:
    """Defaults for every call; `sl.settings` is the one instance.

    memory_budget: extra bytes that training and evaluation may take beside the weights, an int or "2GiB".
    progress: True, False, or None for bars only where a person is looking (a terminal or a notebook).
    cache_dir: where artifacts and converted models lie; None means SITELENS_CACHE or the user's cache folder.
    data_dir: a folder with data sets in their upstream layout; None means SITELENS_DATA, or download.
    """

    memory_budget: int | str = "2GiB"
    progress: bool | None = None
    cache_dir: str | Path | None = None
    data_dir: str | Path | None = None

    def budget(self, override: int | str | None = None) -> int:
        """The memory budget in bytes, `override` first.

        Raises:
            SitelensError: if it is not a positive size.
        """
        value = self.memory_budget if override is None else override
        size = parse_bytes(value) if isinstance(value, str) else int(value)
        if size <= 0:
            raise SitelensError(f"memory_budget must be positive, got {value!r} (for example '2GiB')")
        return size

    def cache(self) -> Path:
        """The cache folder (it need not exist yet)."""
        chosen = self.cache_dir or os.environ.get("SITELENS_CACHE")
        return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sitelens"))

    def data(self) -> Path | None:
        """The local data folder, or None where data sets are to be downloaded.

        Raises:
            SitelensError: if a folder is named that is not there.
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
    """Bytes in a size like "2GiB", "512 MB" or "1e9".

    Raises:
        SitelensError: if the text is no size.
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


def tracked(items: Sequence[Item], label: str, progress: bool | None = None) -> Iterator[Item]:
    """`items`, with a progress bar on standard error where `progress` (default: `settings.progress`) wants one.

    Under `watched` there is no bar; the watcher is told instead.
    """
    watcher = _watcher.get()
    if watcher is not None:
        for done, item in enumerate(items, 1):
            yield item
            watcher(done / len(items))
        return
    from tqdm.auto import tqdm

    wanted = settings.progress if progress is None else progress
    yield from tqdm(items, desc=label, disable=None if wanted is None else not wanted, leave=False)


@contextmanager
def watched(watcher: Callable[[float], None]) -> Iterator[None]:
    """Here within, whatever is `tracked` tells `watcher` the share that is done, for a bar over more than it."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def overridden(**values: object) -> Iterator[None]:
    """The named settings at these values, put back afterwards."""
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
