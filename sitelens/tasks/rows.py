"""Rows of a data set, from a JSON Lines file in the local data folder or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sitelens.errors import SitelensError
from sitelens.files.folders import read_bytes, unreadable
from sitelens.settings import settings

Row = tuple[str, Any]
"""Where a row stands, to begin an error's text with, and what stands there."""


def local_file(place: str) -> Path | None:
    """The path of a file in the local data folder; None if the folder or the file does not exist."""
    folder = settings.data()
    return folder / place if folder is not None and (folder / place).is_file() else None


def file_rows(path: Path) -> Sequence[Row]:
    """The objects in a JSON Lines file; blank lines are ignored.

    The last file is kept in memory and is parsed again only if it has changed.

    Raises:
        SitelensError: naming the line that is not JSON, or if the file is not UTF-8 or cannot be read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return _parsed(path, state.st_mtime_ns, state.st_size)


def hub_rows(task: str, address: str, split: str, files: str) -> Sequence[Row]:
    """The rows of one split of a data set on the Hugging Face hub; the last split is kept in memory.

    Args:
        task: name of the task, for messages.
        address: name of the data set on the hub, "owner/name".
        split: name of the split.
        files: the files that the local data folder could hold instead, for messages.

    Raises:
        SitelensError: if it cannot be loaded.
    """
    try:
        return _loaded(address, split)
    except Exception as error:  # datasets, the hub client and its HTTP library have no common error class
        raise SitelensError(
            f"{task} could not be loaded from https://huggingface.co/datasets/{address} ({split}): {error}. Without "
            f"a network, put {files} into a folder and set SITELENS_DATA to it."
        ) from error


@lru_cache(maxsize=1)
def _parsed(path: Path, _changed: int, _size: int) -> Sequence[Row]:
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")  # texts may contain other line separators
    except FileNotFoundError as error:
        raise SitelensError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise SitelensError(f"{path} is not UTF-8 text: {error}") from error
    places = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return tuple((where, _json(line, where)) for where, line in places)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SitelensError(f"{where} is not JSON: {error}") from error


@lru_cache(maxsize=1)
def _loaded(address: str, split: str) -> Sequence[Row]:
    from datasets import load_dataset

    rows = load_dataset(address, split=split)
    return tuple((f"{address}, {split} item {number}", row) for number, row in enumerate(rows, start=1))
