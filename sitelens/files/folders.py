"""Folders and files shared by processes and users: complete or absent, locked while they are made, cleaned up later."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sitelens.errors import SitelensError, SitelensWarning

WORK = ".sitelens-work-"  # prefix of the names of work folders
CANNOT_WRITE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.EIO,
    errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
}  # fmt: skip
REPORT_AFTER, GIVE_UP_AFTER = 5.0, 3600.0  # seconds of waiting for a lock
BEING_MADE = 60.0  # seconds for which a new work folder may be without its lock
OLD = 24 * 3600.0  # seconds after which a folder whose lock cannot be tested counts as abandoned
_warned: set[tuple[str, str]] = set()


def warn_once(place: Path, text: str) -> None:
    """A SitelensWarning, given once per process for each place and text."""
    if (key := (str(place), text)) not in _warned:
        _warned.add(key)
        warnings.warn(text, SitelensWarning, stacklevel=3)


def reason(error: BaseException) -> str:
    """The operating system's reason for a failure, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def make_folder(path: Path) -> Path:
    """The folder, created if missing, also at the target of a dangling link; permissions follow the umask."""
    if not path.is_dir():
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    return path


def read_bytes(path: Path) -> bytes:
    """A file's content, read once and therefore of one version even if the file is replaced meanwhile.

    Raises:
        FileNotFoundError: if there is no such file.
        SitelensError: if it exists but cannot be read; it does not count as damaged.
    """
    for retry in (True, False):  # network file systems report ESTALE for a replaced file: retry by name
        try:
            with open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(error.errno, reason(error), str(path)) from error
        except OSError as error:
            if error.errno != errno.ESTALE or not retry:
                raise unreadable(path, error) from error
    raise AssertionError


def unreadable(path: Path, error: OSError) -> SitelensError:
    """The error for a file that exists but cannot be read."""
    what = "it is a folder, not a file" if error.errno == errno.EISDIR else reason(error)
    return SitelensError(f"{path} cannot be read: {what}. It was left unchanged; try again when it is readable")


def share(path: Path) -> None:
    """Give a file, or everything in a folder, the permissions of the umask: some libraries create private files."""
    mask = _umask()
    for target in [path, *(path.rglob("*") if path.is_dir() else ())]:
        with contextlib.suppress(OSError):
            if not target.is_symlink():
                target.chmod((0o777 if target.is_dir() else 0o666) & ~mask)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; files that cannot be inspected count as 0."""
    total = 0
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            return path.lstat().st_size
    for folder, _, files in os.walk(path, onerror=None):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content, as far as permissions allow."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# Locks


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[bool]:
    """Run the block in one process at a time; yields whether the lock was obtained.

    A lock only saves duplicate work; what is made under it is complete without it, too. So if the file system has no
    locks, or the file cannot be opened, the block runs with False. A lock file that no process holds has no effect,
    however old: the system releases a lock when its process ends.

    Raises:
        SitelensError: after waiting for an hour.
    """
    descriptor = _opened(path)
    started, reported, held = time.monotonic(), False, False
    try:
        while descriptor is not None and not held:
            held = _try_lock(descriptor)
            if held is None:
                break
            waited = time.monotonic() - started
            if not held and waited > GIVE_UP_AFTER:
                raise SitelensError(
                    f"another process ({_holder(path)}) has been {purpose} for an hour and holds the lock {path}: "
                    "end that process, or use another cache folder (SITELENS_CACHE)"
                )
            if not held and waited > REPORT_AFTER and not reported:
                print(f"sitelens: waiting for another process ({_holder(path)}) that is {purpose}; its lock is {path}",
                      file=sys.stderr)  # fmt: skip
                reported = True
            if not held:
                time.sleep(0.05)
        if held and descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()}{_host()}\n".encode())
        yield bool(held)
    finally:
        if descriptor is not None:
            os.close(descriptor)  # releases the lock


def is_free(path: Path) -> bool:
    """Whether no process holds a lock; if that cannot be determined, whether the file is old."""
    descriptor = _opened(path, create=False)
    if descriptor is None:
        return _age(path) > OLD
    try:
        free = _try_lock(descriptor)
    finally:
        os.close(descriptor)
    return _age(path) > OLD if free is None else free


def _opened(path: Path, create: bool = True) -> int | None:
    """A descriptor for locking; reading suffices for another user's file that cannot be written."""
    flags = getattr(os, "O_CLOEXEC", 0)
    with contextlib.suppress(OSError):
        if create:
            make_folder(path.parent)
        return os.open(path, os.O_RDWR | flags | (os.O_CREAT if create else 0), 0o666)
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | flags)
    return None


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was obtained at once; None if there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        if text := path.read_text("utf-8", errors="replace").strip():
            return text.splitlines()[0][:80]
    return "process number unknown"


def _host() -> str:
    import socket

    return f" on {name}" if (name := socket.gethostname()) else ""


# Work


@contextmanager
def work_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder for the duration of the block, in `parent` or in the system's temporary folder.

    A lock inside marks it as in use: `sweep` removes those of processes that were killed.
    """
    base = Path(tempfile.gettempdir()) if parent is None else make_folder(parent)
    folder = base / f"{WORK}{secrets.token_hex(6)}"
    folder.mkdir(mode=0o700 if parent is None else 0o777)
    try:
        with locked(folder / ".lock", "at work"):
            yield folder
    finally:
        remove(folder)


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """An empty folder for the duration of the block: in the cache, or in the temporary folder if the cache is
    read-only.

    What killed processes left in the cache is removed first.
    """
    sweep(cache)
    parent: Path | None = cache
    try:
        make_folder(cache)
        if not os.access(cache, os.W_OK):
            parent = None
    except OSError:
        parent = None
    with work_folder(parent) as folder:
        yield folder


def sweep(parent: Path, ours: Path | None = None) -> int:
    """Remove what killed processes left in `parent`. Returns the number of bytes removed.

    Args:
        parent: the folder to clean up.
        ours: the lock of a model that this process holds.
    """
    removed = 0
    for folder in leftovers(parent, ours):
        removed += size_of(folder)
        remove(folder)
    return removed


def leftovers(parent: Path, ours: Path | None = None) -> list[Path]:
    """The folders that `sweep` would remove: work folders whose lock is free, and those of sitelens 0.1.

    The latter had no lock of their own, so they are removed only while no model in `parent` is being converted.
    """
    try:
        paths = [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
    abandoned = [
        path for path in paths
        if path.name.startswith(WORK)
        and (is_free(path / ".lock") if (path / ".lock").exists() else _age(path) > BEING_MADE)
    ]  # fmt: skip
    older = [path for path in paths if _is_of_first_edition(path)]
    if older and all(lock == ours or is_free(lock) for lock in parent.glob("gguf-*.lock")):
        abandoned += older
    return abandoned


def _is_of_first_edition(place: Path) -> bool:
    if re.fullmatch(r"gguf-[0-9a-f]{16}\..+\.tmp", place.name):
        return True
    return bool(re.fullmatch(r"tmp[a-z0-9_]{8}", place.name)) and (
        next(place.glob("*.gguf"), None) is not None or next(place.glob("*/*.whl"), None) is not None
    )


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _umask() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)  # there is no other way to ask
    os.umask(mask)
    return mask
