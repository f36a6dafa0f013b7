"""GGUF files, packaged or the user's own, converted once to folders of safetensors that load in seconds."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.folders import (
    CANNOT_WRITE,
    WORK,
    is_free,
    locked,
    read_bytes,
    reason,
    remove,
    share,
    size_of,
    sweep,
    unreadable,
    work_folder,
)
from sitelens.models.gguf.packaged import PACKAGED, PackagedModel, fetch
from sitelens.models.gguf.parts import digest_of, parts_of
from sitelens.settings import settings

__all__ = [
    "PACKAGED", "PackagedModel", "clear_models", "converted_models", "folder_of", "gguf_folder", "is_whole",
    "packaged_folder",
]  # fmt: skip

CONVERTER = 2  # version of the converter: folders of other versions are converted again
FIRST_EDITION = {spec.sha256 for spec in PACKAGED.values()}  # conversions by version 1 that are still valid
_elsewhere: dict[Path, Path] = {}  # folder of an unwritable cache -> the folder this process uses instead


def folder_of(sha256: str) -> Path:
    """Path of the converted model of a GGUF file, whether or not it exists."""
    return settings.cache() / "models" / f"gguf-{sha256[:16]}"


def packaged_folder(name: str) -> Path:
    """The converted folder of a packaged model, which is downloaded and converted at its first use.

    Raises:
        SitelensError: if it cannot be downloaded or converted, or its converted folder cannot be read.
    """
    spec = PACKAGED[name]

    def download(work: Path) -> tuple[Path, ...]:
        print(f"sitelens: downloading and converting {name} (first use only)", file=sys.stderr)
        return (fetch(name, spec, work),)

    return _converted(spec.sha256, name, download)


def gguf_folder(file: Path) -> Path:
    """The converted folder of a GGUF file and, if it is split, of its other parts.

    Raises:
        SitelensError: if it is incomplete or no language model, cannot be converted exactly, or cannot be read.
    """
    if not file.is_file():
        raise SitelensError(f"there is no file {file}")
    parts = parts_of(file)
    return _converted(digest_of(parts), file.name, lambda _: parts)


def converted_models() -> list[Path]:
    """The folders of converted models in the cache, including links."""
    try:
        return sorted(path for path in (settings.cache() / "models").glob("gguf-*") if _is_model(path))
    except OSError:
        return []


def clear_models() -> tuple[int, int, list[str]]:
    """Remove the converted models, except those being converted by another process or protected.

    Returns:
        The number of models removed, their bytes, and the names of those that remain.
    """
    count, size, busy = 0, 0, []
    for folder in converted_models():
        lock, aside = folder.with_suffix(".lock"), folder.with_name(f"{WORK}{secrets.token_hex(6)}")
        if lock.exists() and not is_free(lock):
            busy.append(folder.name)
            continue
        try:
            bytes_ = 0 if folder.is_symlink() else size_of(folder)
            os.rename(folder, aside)  # so that no process sees half a model
        except OSError:
            busy.append(folder.name)
            continue
        remove(aside)
        remove(lock)
        count, size = count + 1, size + bytes_
    parent = settings.cache() / "models"
    with contextlib.suppress(OSError):
        if not parent.is_symlink():
            parent.rmdir()  # if nothing is left
    return count, size, busy


def _is_model(path: Path) -> bool:
    return path.is_dir() and not path.name.endswith(".tmp")


def is_whole(folder: Path, full: bool = True) -> bool:
    """Whether a converted folder is complete and unchanged; `full` reads and checks every byte.

    Raises:
        SitelensError: if one of its files cannot be read, which does not mean that it is damaged.
    """
    return _state(folder, full) == "whole"


def _state(folder: Path, full: bool = True) -> str:
    """State of a converted folder: "whole", "damaged", "absent", or "outdated" if an older converter wrote it."""
    try:
        content = json.loads(read_bytes(folder / "sitelens.json"))
        listed = {str(name): (int(size), str(sum_)) for name, (size, sum_) in content["files"].items()}
        current = content.get("converter", 1) == CONVERTER or content["gguf_sha256"] in FIRST_EDITION
    except FileNotFoundError:
        return "damaged" if folder.is_dir() else "absent"
    except SitelensError:  # it is unreadable
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return "damaged"
    if not listed or not all(_is_file_whole(folder / name, *about, full) for name, about in listed.items()):
        return "damaged"
    return "whole" if current else "outdated"


def _is_file_whole(path: Path, size: int, sha256: str, full: bool) -> bool:
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if about.st_size != size or not full:
            return about.st_size == size
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def _converted(sha256: str, name: str, source: Callable[[Path], tuple[Path, ...]]) -> Path:
    """The model's folder, made if missing; `source` returns the GGUF files and may work in the folder it is given."""
    folder = folder_of(sha256)
    if folder in _elsewhere:
        return _elsewhere[folder]
    if is_whole(folder):  # without a lock, so that a read-only cache works
        return folder
    lock = folder.with_suffix(".lock")
    with locked(lock, f"converting {name}") as ours:
        if folder in _elsewhere:
            return _elsewhere[folder]
        if (state := _state(folder)) == "whole":
            return folder
        if state == "damaged":
            warnings.warn(f"{folder} is damaged; the model is converted again", SitelensWarning, stacklevel=3)
        if ours:
            sweep(folder.parent, lock)
        try:
            with work_folder(folder.parent) as work:
                return _publish(_convert(source(work), work, sha256), folder)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            return _converted_elsewhere(folder, source, sha256, name, error)


def _publish(new: Path, folder: Path) -> Path:
    """Move a new folder into place; a damaged folder or link there is removed once the new one is complete."""
    share(new)
    aside = new.with_name("old")
    if os.path.lexists(folder):
        if is_whole(folder):  # another process was quicker
            return folder
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except BaseException:
        if os.path.lexists(aside):
            os.rename(aside, folder)
        raise
    return folder


def _converted_elsewhere(
    folder: Path, source: Callable[[Path], tuple[Path, ...]], sha256: str, name: str, error: OSError
) -> Path:
    """A folder for this process only, if the cache cannot be written."""
    base = Path(tempfile.mkdtemp(prefix="sitelens-"))
    try:
        converted = _convert(source(base), base, sha256)
    except BaseException as failure:
        remove(base)
        if isinstance(failure, OSError):
            raise SitelensError(
                f"{name} could not be converted: neither {folder.parent} ({reason(error)}) nor {base.parent} "
                f"({reason(failure)}) can be written; set SITELENS_CACHE to a folder with free space"
            ) from failure
        raise
    atexit.register(remove, base)
    warnings.warn(
        f"{folder.parent} cannot be written ({reason(error)}): {name} was converted for this process only; "
        "SITELENS_CACHE or sl.settings.cache_dir names another cache folder", SitelensWarning, stacklevel=4,
    )  # fmt: skip
    _elsewhere[folder] = converted
    return converted


def _convert(files: tuple[Path, ...], work: Path, sha256: str) -> Path:
    from sitelens.models.gguf.convert import convert

    return convert(files, work, sha256, CONVERTER)
