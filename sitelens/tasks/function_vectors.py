"""The 57 tasks of Todd et al., "Function Vectors in Large Language Models", ICLR 2024 (MIT licence).

Files come from the authors' repository at a pinned commit and are checked against known SHA-256 sums, or from
`SITELENS_DATA/function_vectors` in the same layout.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sitelens.defaults import SitelensError, SitelensWarning, settings

COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
UPSTREAM = f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{COMMIT}/dataset_files/"
SOURCE = f"ericwtodd/function_vectors@{COMMIT[:7]}"


@cache
def registry() -> dict[str, dict[str, Any]]:
    """name -> category, sha256 (None: not known), bytes, examples, of every task."""
    text = resources.files("sitelens.tasks").joinpath("data/function_vectors.json").read_text("utf-8")
    return {row["name"]: row for row in json.loads(text)}


def items(name: str) -> list[dict[str, Any]]:
    """The task's examples as upstream wrote them.

    Raises:
        SitelensError: if the file can neither be found nor downloaded, or is not the expected one.
    """
    return _parsed(name, local_path(name) or _download(name))


def local_path(name: str) -> Path | None:
    """The task's file in the local data folder, checked; None where there is no such file."""
    folder = settings.data()
    if folder is None:
        return None
    path = folder / "function_vectors" / registry()[name]["category"] / f"{name}.json"
    if not path.exists():
        return None
    expected, found = registry()[name]["sha256"], hashlib.sha256(path.read_bytes()).hexdigest()
    if expected not in (None, found):
        raise SitelensError(f"{path} is not the upstream file of fv/{name}: SHA-256 {found}, expected {expected}")
    return path


def _download(name: str) -> Path:
    import pooch

    row = registry()[name]
    url = f"{UPSTREAM}{row['category']}/{name}.json"
    folder = settings.cache() / "data" / "function_vectors" / COMMIT[:12]
    pooch.utils.get_logger().setLevel("WARNING")
    try:
        path = Path(pooch.retrieve(url, known_hash=_known_hash(name, folder), fname=f"{name}.json", path=folder))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        raise SitelensError(
            f"fv/{name} could not be downloaded from {url}: {error}. Without a network, put the authors' files into "
            "a folder as function_vectors/abstractive/*.json and function_vectors/extractive/*.json and set "
            "SITELENS_DATA to it."
        ) from error
    if row["sha256"] is None:
        try:
            _parsed(name, path)
        except SitelensError:
            path.unlink()  # whatever came instead is not worth keeping
            raise
        _record_hash(name, path, folder)
    return path


def _parsed(name: str, path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if found and all(isinstance(item["input"], str) and isinstance(item["output"], str) for item in found):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise SitelensError(f"fv/{name}: {path} holds no list of inputs and outputs")


def _known_hash(name: str, folder: Path) -> str | None:
    recorded = folder / f"{name}.sha256"
    return registry()[name]["sha256"] or (recorded.read_text().strip() if recorded.exists() else None)


def _record_hash(name: str, path: Path, folder: Path) -> None:
    recorded = folder / f"{name}.sha256"
    if not recorded.exists():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        recorded.write_text(found)
        warnings.warn(f"fv/{name} has no known checksum; from now on SHA-256 {found} is expected of it",
                      SitelensWarning, stacklevel=2)  # fmt: skip
