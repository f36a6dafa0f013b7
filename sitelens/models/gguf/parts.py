"""The files of a GGUF model: one, or the parts of a split one."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sitelens.errors import SitelensError
from sitelens.files.folders import unreadable
from sitelens.models.networks import several

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error, UnicodeDecodeError)


def parts_of(file: Path) -> tuple[Path, ...]:
    """All parts of the model that a GGUF file belongs to, in order; usually the file alone.

    Raises:
        SitelensError: if it is one part of several and others are not in the same folder.
    """
    count, number = _split(file)
    if count <= 1:
        return (file,)
    match = PART.fullmatch(file.name)
    if match is None or int(match[3]) != count:
        example = f"NAME-{number:05}-of-{count:05}.gguf"
        raise SitelensError(
            f"{file} is part {number} of {count} of a model: name it {example} and put the others into the same folder"
        )
    parts = tuple(file.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SitelensError(
            f"{file} is part {number} of {count} of a model, and {several(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in {file.parent}"
        )
    return parts


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of a file, or of the SHA-256 of all parts of a model."""
    sums = []
    for file in files:
        try:
            with open(file, "rb") as opened:
                sums.append(hashlib.file_digest(opened, "sha256").hexdigest())
        except OSError as error:
            raise unreadable(file, error) from error
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def open_gguf(file: Path) -> Any:
    """The gguf library's reader of one file.

    Raises:
        SitelensError: if it cannot be read or is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        return GGUFReader(file)
    except UNREADABLE as error:
        raise SitelensError(f"{file} could not be read as a GGUF language model: {error}") from error


def _split(file: Path) -> tuple[int, int]:
    """The number of parts of the model, and which one this file is, from 1; (1, 1) if it is not split."""
    fields = open_gguf(file).fields
    count = int(fields["split.count"].contents()) if "split.count" in fields else 1
    number = int(fields["split.no"].contents()) + 1 if "split.no" in fields else 1
    return count, number
