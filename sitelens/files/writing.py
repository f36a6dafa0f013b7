"""Atomic writing of files, portable file names, and the record of what could not be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.escaping import csv_text
from sitelens.files.folders import reason

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 120  # bytes without the ending: file systems allow 255 with it, some encrypted ones 143
PROBE_BYTES = 1 << 16
TEMPORARY = ".sitelens-*.tmp"  # a file that is being written
_FORBIDDEN = re.compile(r'[<>:"/\\|?*`$%#]')  # by Windows, or special in shells and URLs
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\.|$)", re.IGNORECASE)  # devices of Windows


class MissingOutputWarning(SitelensWarning):
    """A requested file could not be written; all others were."""


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file atomically: readers see the old file or the whole new one, and a failure keeps the old one.

    The folder is created if it is missing; permissions follow the umask. Returns the path.

    Raises:
        OSError: if it cannot be written; no temporary file remains.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / TEMPORARY.replace("*", secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text as UTF-8, like `write_bytes`; a lone surrogate is written as its escape."""
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_csv(path: str | Path, frame: pd.DataFrame, **options: Any) -> Path:
    """Write a frame as CSV without its index, like `write_bytes`.

    Cells and column names that a spreadsheet would run as a formula are prefixed with an apostrophe (`csv_text`);
    numbers are unchanged. `options` are those of `DataFrame.to_csv`.
    """
    plain = frame.rename(columns=lambda name: csv_text(name) if isinstance(name, str) else name)
    for index, kind in enumerate(frame.dtypes):
        if kind.kind == "O":
            cells = [csv_text(cell) if isinstance(cell, str) else cell for cell in frame.iloc[:, index]]
            plain.isetitem(index, cells)
    buffer = io.StringIO(newline="")
    plain.to_csv(buffer, index=False, lineterminator="\n", **options)
    return write_text(path, buffer.getvalue())


def file_name(name: str) -> str:
    """A portable file name (without ending) for any text: the text itself if possible.

    "/" becomes "-", as in "fv/antonym". After any other change (characters that file systems refuse or that leave the
    folder, names of Windows devices, more than 120 bytes) a digest of `name` is appended, so that different names give
    different files. For several files in one folder, use `file_names`.
    """
    plain = unicodedata.normalize("NFC", name)
    parts = plain.split("/")
    if len(parts) == 2 and all(part and _as_file(part) == part for part in parts):
        plain = "-".join(parts)
    changed = _as_file(plain)
    return changed if changed == plain else _with_digest(changed, name)


def file_names(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """`file_name` of each name, all different, also where a file system takes "A" for "a".

    Args:
        taken: file names in the same folder that none of them may have.
    """
    files = {name: file_name(name) for name in names}
    folded = [_folded(file) for file in (*files.values(), *taken)]
    return {
        name: file if folded.count(_folded(file)) == 1 else _with_digest(file, name) for name, file in files.items()
    }


def check_file_name(name: Any, what: str) -> str:
    """The name, if it is a valid file name on every file system.

    Raises:
        SitelensError: if it is not; `what` is how messages call it.
    """
    if not isinstance(name, str) or file_name(name) != unicodedata.normalize("NFC", name):
        hint = f", for example {file_name(name)!r}" if isinstance(name, str) and name else ""
        raise SitelensError(f"{what} must be a plain file name without its ending{hint}; got {name!r}")
    return name


def check_folder(folder: str | Path) -> None:
    """Check that files can be written to a folder; a missing one is created for the check and removed again.

    Raises:
        SitelensError: with the reason if they cannot.
    """
    created: list[Path] = []
    try:
        path = Path(folder)
        missing = [path, *path.parents]
        for directory in reversed(missing[: next((i for i, p in enumerate(missing) if p.exists()), len(missing))]):
            directory.mkdir(exist_ok=True)
            created.append(directory)
        write_bytes(path / TEMPORARY.replace("*", f"probe-{secrets.token_hex(4)}"), bytes(PROBE_BYTES)).unlink()
    except (OSError, ValueError) as error:
        raise SitelensError(f"cannot write to the folder {str(folder)!r}: {why_not_written(error)}") from error
    finally:
        for directory in reversed(created):
            with contextlib.suppress(OSError):  # another process has put something into it
                directory.rmdir()


def why_not_written(error: Exception) -> str:
    """Why a file could not be written, in a few words."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is a file, not a folder"
    return reason(error)


class Outputs:
    """The files of one result in one folder; each is written separately, and a failure does not stop the others.

    Use it in a `with` block. At its end a `MissingOutputWarning` says what is missing and why.

    Attributes:
        paths: files written.
        missing: files not written, with the reason.

    Raises:
        SitelensError: at the end of the block, if nothing could be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths: list[Path] = []
        self.missing: dict[str, str] = {}

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """Call `writer` with the path of the file `name`, and record the outcome."""
        path = self.folder / name
        try:
            writer(path)
        except SitelensError as error:
            self.missing[name] = str(error).removeprefix(f"{name} ")
        except OSError as error:
            self.missing[name] = f"cannot be written: {why_not_written(error)}"
        else:
            self.missing.pop(name, None)
            if path not in self.paths:
                self.paths.append(path)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self.missing:
            return
        why: dict[str, list[str]] = {}
        for name, text in self.missing.items():
            why.setdefault(text, []).append(name)
        texts = "; ".join(f"{', '.join(names)} {text}" for text, names in why.items())
        if not self.paths:
            raise SitelensError(f"nothing was written to {self.folder}: {texts}")
        warnings.warn(f"not everything was written to {self.folder}: {texts}", MissingOutputWarning, stacklevel=3)


def _as_file(name: str) -> str:
    """The valid file name closest to a name."""
    letters = (letter if letter == " " or unicodedata.category(letter)[0] not in "CZ" else "-" for letter in name)
    plain = _FORBIDDEN.sub("-", "".join(letters)).rstrip(" .")
    plain = re.sub(r"^[\s.~-]+", lambda match: "_" * bool(match), plain)
    plain = f"_{plain}" if _RESERVED.match(plain) else plain
    return plain.encode()[:LONGEST_NAME].decode(errors="ignore") or "unnamed"


def _with_digest(file: str, name: str) -> str:
    """A changed name with a digest of the original, still short enough."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{file.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def _folded(file: str) -> str:
    return unicodedata.normalize("NFKC", file).casefold()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and user-space file systems have none
            raise
