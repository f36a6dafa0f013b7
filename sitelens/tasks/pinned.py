"""Task files from a GitHub repository, pinned to one commit and checked against known SHA-256 checksums.

They are downloaded once, or read from a folder with the same layout in `SITELENS_DATA`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.folders import CANNOT_WRITE, read_bytes, share, warn_once, work_folder
from sitelens.files.folders import reason as why
from sitelens.files.writing import write_text
from sitelens.settings import settings


@dataclass(frozen=True)
class PinnedFiles:
    """The task files of one repository: one JSON file per task, all with the same fields.

    Attributes:
        suite: prefix of the task names, such as "fv".
        repository, commit: GitHub repository and commit of the files.
        address: URL of their folder, ending in a slash.
        folder: their folder in the local data folder; `data/<folder>.json` in this package holds their checksums.
        fields: keys of an item's input and answer.
        key: key of the list of items in a file; None if the file is the list itself.
    """

    suite: str
    repository: str
    commit: str
    address: str
    folder: str
    fields: tuple[str, str]
    key: str | None = None

    @property
    def source(self) -> str:
        """Repository and short commit, such as "owner/name@1234567"."""
        return f"{self.repository}@{self.commit[:7]}"

    @cached_property
    def registry(self) -> dict[str, dict[str, Any]]:
        """By task: name, category (if any), sha256 (None if unknown), bytes and examples (their number)."""
        text = resources.files("sitelens.tasks").joinpath(f"data/{self.folder}.json").read_text("utf-8")
        return {row["name"]: row for row in json.loads(text)}

    def items(self, name: str) -> list[dict[str, Any]]:
        """The items of a task, as in the upstream file.

        Raises:
            SitelensError: if the file can neither be found nor downloaded, or is not the expected one.
        """
        path, data = self._local(name) or self._download(name)
        return self._parsed(name, path, data)

    def local_path(self, name: str) -> Path | None:
        """The file of a task in the local data folder, verified; None if there is none.

        Raises:
            SitelensError: if the file differs from the upstream file, or cannot be read.
        """
        found = self._local(name)
        return found[0] if found else None

    def _local(self, name: str) -> tuple[Path, bytes] | None:
        folder = settings.data()
        if folder is None:
            return None
        path = folder / self.folder / self._place(name)
        try:
            data = read_bytes(path)
        except FileNotFoundError:
            return None
        expected, found = self.registry[name]["sha256"], hashlib.sha256(data).hexdigest()
        if expected not in (None, found):
            raise SitelensError(
                f"{path} is not the upstream file of {self.suite}/{name}: SHA-256 {found}, expected {expected}"
            )
        return path, data

    def _place(self, name: str) -> str:
        category = self.registry[name].get("category")
        return f"{category}/{name}.json" if category else f"{name}.json"

    def _download(self, name: str) -> tuple[Path, bytes]:
        """Path and content of the file of a task in the cache; it is downloaded if it is missing."""
        import pooch
        import requests

        url = f"{self.address}{self._place(name)}"
        folder = settings.cache() / "data" / self.folder / self.commit[:12]
        pooch.utils.get_logger().setLevel("WARNING")

        def retrieved(place: Path) -> tuple[Path, bytes]:
            # Not streamed, so that the connection is closed even if the server returns an error.
            whole: Any = pooch.HTTPDownloader(stream=False)
            known = self._known_hash(name, folder)
            path = Path(pooch.retrieve(url, known, fname=f"{name}.json", path=place, downloader=whole))
            share(path)  # pooch creates files that only their owner can read
            return path, read_bytes(path)

        try:
            try:
                path, data = retrieved(folder)
            except OSError as error:
                if error.errno not in CANNOT_WRITE:
                    raise
                with work_folder() as elsewhere:
                    path, data = retrieved(elsewhere)
                warn_once(folder, f"data cannot be kept in {folder}: {why(error)}; it is downloaded each time")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            layout = sorted({f"{self.folder}/{self._place(one)}".replace(f"/{one}.", "/*.") for one in self.registry})
            reason = "no connection" if isinstance(error, requests.ConnectionError) else error
            raise SitelensError(
                f"{self.suite}/{name} could not be downloaded from {url}: {reason}. Without a network, put the "
                f"authors' files into a folder as {' and '.join(layout)} and set SITELENS_DATA to it."
            ) from error
        if self.registry[name]["sha256"] is None:
            try:
                self._parsed(name, path, data)
            except SitelensError:
                path.unlink(missing_ok=True)  # not a task file
                raise
            self._record_hash(name, data, folder)
        return path, data

    def _parsed(self, name: str, path: Path, data: bytes) -> list[dict[str, Any]]:
        try:
            content = json.loads(data.decode("utf-8"))
            found = content if self.key is None else content[self.key]
            if found and all(isinstance(item[field], str) for item in found for field in self.fields):
                return found
        except (ValueError, TypeError, KeyError):
            pass
        kinds = " and ".join(f"{field}s" for field in self.fields)
        raise SitelensError(f"{self.suite}/{name}: {path} holds no list of {kinds}")

    def _known_hash(self, name: str, folder: Path) -> str | None:
        recorded = folder / f"{name}.sha256"
        return self.registry[name]["sha256"] or (recorded.read_text().strip() if recorded.exists() else None)

    def _record_hash(self, name: str, data: bytes, folder: Path) -> None:
        recorded = folder / f"{name}.sha256"
        if not recorded.exists():
            found = hashlib.sha256(data).hexdigest()
            with contextlib.suppress(OSError):
                write_text(recorded, found)
            warnings.warn(
                f"{self.suite}/{name} has no known checksum; from now on SHA-256 {found} is expected of it",
                SitelensWarning,
                stacklevel=2,
            )
