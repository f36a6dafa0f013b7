"""Artifacts on disk: one safetensors file each, JSON in its metadata, addressed by what went into it.

An artifact is a kind (say "embedding"), a `spec` (everything its content depends on, plain JSON), tensors, and
`meta` (what a reader wants to know but the content does not depend on). Files are written to a temporary name,
flushed and renamed, so a reader sees a whole artifact or none, whoever else writes and whenever a process dies.
A SHA-256 over metadata and tensors is checked at every read. No pickle is read or written.

A file counts as damaged only if its content is not what was written. One that cannot be read (no permission, a network
folder that is away) is left as it is, and a store that cannot be written to costs a warning, never a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sitelens.checks.schema import parsed_json, unpacked
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.folders import make_folder, read_bytes, reason, remove, size_of, warn_once
from sitelens.files.writing import write_bytes
from sitelens.settings import settings
from sitelens.version import __version__

Value = TypeVar("Value")

FORMAT = 1
STALE_TEMPORARY_SECONDS = 3600
DAMAGED = ".damaged"  # what the name of a file that was set aside ends with


class DamagedArtifactError(SitelensError):
    """A file that is not what was written: truncated, changed, or no artifact at all."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """What one file holds.

    `spec` and `meta` are plain JSON; `tensors` maps names to tensors; `path` is the file that it was read from.
    """

    kind: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.path or f"the {self.kind}")

    def made(self, kind: type[Value], **more: Any) -> Value:
        """The dataclass that tensors and meta describe, with `more` beside them (see `sitelens.checks.schema`).

        Raises:
            SitelensError: naming the file and the field that is not what the dataclass declares.
        """
        return unpacked(kind, {**self.meta, **more}, self.tensors, self.where)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, atomically; the folder is made where it is missing. Returns the path.

        Raises:
            OSError: if it cannot be written; what was there stays.
        """
        tensors = {  # copies, for safetensors refuses tensors that share memory
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors.items()
        }
        header = canonical_json(
            {"format": FORMAT, "kind": self.kind, "spec": self.spec, "meta": self.meta, "sitelens": __version__}
        )
        data = safetensors.torch.save(tensors, {"sitelens": header, "sha256": _checksum(header, tensors)})
        return write_bytes(path, data)

    @staticmethod
    def load(path: str | Path, kind: str | None = None) -> Artifact:
        """Read and verify a file.

        Raises:
            SitelensError: if there is no such file, it cannot be read, or it holds another kind of artifact.
            DamagedArtifactError: if its content is not what was written.
        """
        path = Path(path)
        try:
            data = read_bytes(path)  # once: another process may replace the file meanwhile
        except FileNotFoundError as error:
            raise SitelensError(f"there is no file {path}") from error
        try:
            tensors = safetensors.torch.load(data)
            metadata = _metadata(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedArtifactError(f"{path} is damaged or no safetensors file: {error}") from error
        header = metadata.get("sitelens")
        if header is None:
            raise DamagedArtifactError(f"{path} is a safetensors file, but not one of sitelens")
        if metadata.get("sha256") != _checksum(header, tensors):
            raise DamagedArtifactError(f"{path} is damaged: its checksum does not match its content")
        try:
            content = unpacked(_Header, parsed_json(header, f"the header of {path}"), {}, f"the header of {path}")
        except SitelensError as error:
            raise DamagedArtifactError(str(error)) from error
        if content.format > FORMAT:
            raise SitelensError(f"{path} was written by a newer sitelens ({content.sitelens}): upgrade to read it")
        if kind is not None and content.kind != kind:
            raise SitelensError(f"{path} holds a {content.kind}, not a {kind}")
        return Artifact(content.kind, content.spec, tensors, content.meta, path)


@dataclass(frozen=True)
class _Header:
    """The JSON beside an artifact's tensors."""

    format: int
    kind: str
    spec: dict[str, Any]
    meta: dict[str, Any]
    sitelens: str


@dataclass(frozen=True)
class Store:
    """A folder of artifacts, `root/kind/<digest of spec>.safetensors`."""

    root: Path

    def path(self, kind: str, spec: Mapping[str, Any]) -> Path:
        """Where the artifact of this kind and spec lies, or would lie."""
        return self.root / kind / f"{digest({'kind': kind, 'format': FORMAT, 'spec': spec})[:40]}.safetensors"

    def get(self, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None = None) -> Any:
        """The stored artifact, or what `read` makes of it; None if there is none.

        A damaged one, or one that `read` refuses with a SitelensError, is named in a warning and set aside until one
        made anew is whole. One that cannot be read stays as it is; that is said once, and the work goes on without it.
        """
        path = self.path(kind, spec)
        try:
            return self._checked(path, kind, spec, read)
        except DamagedArtifactError as error:
            warnings.warn(f"{error}; it is made anew", SitelensWarning, stacklevel=2)
            self._set_aside(path, kind, spec, read)
        except SitelensError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                warn_once(path, f"{error}; the work goes on without it")
        return None

    def put(self, artifact: Artifact) -> Path | None:
        """Keep an artifact; concurrent writers of the same one leave one whole file.

        Returns its path, or None where it could not be written: that is said once, and nothing half-written stays.
        """
        path = self.path(artifact.kind, artifact.spec)
        try:
            make_folder(path.parent)
            artifact.save(path)
        except OSError as error:
            warn_once(
                self.root,
                f"results cannot be kept in the cache {self.root}: {reason(error)}. The work goes on; SITELENS_CACHE "
                "or sl.settings.cache_dir names another cache folder",
            )
            return None
        remove(path.with_suffix(DAMAGED))
        return path

    def _checked(self, path: Path, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None) -> Any:
        artifact = Artifact.load(path, kind)
        if canonical_json(artifact.spec) != canonical_json(spec):
            raise DamagedArtifactError(f"{path} does not hold what its name says")
        try:
            return artifact if read is None else read(artifact)
        except SitelensError as error:
            raise DamagedArtifactError(str(error)) from error

    def _set_aside(
        self, path: Path, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None
    ) -> None:
        """Rename a damaged file, and back if another process has just put a good one in its place."""
        aside = path.with_suffix(DAMAGED)
        with contextlib.suppress(OSError):
            os.replace(path, aside)
            with contextlib.suppress(SitelensError):
                self._checked(aside, kind, spec, read)
                os.replace(aside, path)

    def remove(self, kind: str, spec: Mapping[str, Any]) -> None:
        """Remove the artifact of this kind and spec, if it is there and may be removed."""
        with contextlib.suppress(OSError):
            self.path(kind, spec).unlink(missing_ok=True)

    def entries(self) -> pd.DataFrame:
        """One row per file: kind, task, model, bytes, modified, path. Kinds also: "damaged", "unreadable"."""
        rows = []
        for path in sorted([*self.root.glob("*/*.safetensors"), *self.root.glob(f"*/*{DAMAGED}")]):
            try:
                content = json.loads(_metadata_of(path)["sitelens"])
                about = {name: content["spec"].get(name) or content["meta"].get(name) for name in ("task", "model")}
                kind = "damaged" if path.suffix == DAMAGED else content["kind"]
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError:
                kind, about = "unreadable", {}
            except (KeyError, ValueError, TypeError, AttributeError):
                kind, about = "damaged", {}
            modified = pd.NaT
            with contextlib.suppress(OSError):
                modified = pd.Timestamp(path.stat().st_mtime, unit="s").round("s")
            rows.append({"kind": kind, "task": about.get("task"), "model": about.get("model"),
                         "bytes": size_of(path.resolve()), "modified": modified, "path": str(path)})  # fmt: skip
        return pd.DataFrame(rows, columns=["kind", "task", "model", "bytes", "modified", "path"])

    def clear(self, kind: str | None = None) -> int:
        """Remove the artifacts of one kind, all, or those that are "damaged"; and stale temporary files.

        Returns how many artifacts went. Those that may not be removed are counted in a warning.
        """
        removed, failures = 0, []
        folder = kind if kind not in (None, "damaged") else "*"
        for path in [*self.root.glob(f"{folder}/*.safetensors"), *self.root.glob(f"{folder}/*{DAMAGED}")]:
            if kind != "damaged" or path.suffix == DAMAGED or _is_damaged(path):
                try:
                    path.unlink(missing_ok=True)
                    removed += 1
                except OSError as error:
                    failures.append(f"{path}: {reason(error)}")
        for path in self.root.glob("*/.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > STALE_TEMPORARY_SECONDS:
                    path.unlink()
        if failures:
            warnings.warn(f"{len(failures)} files could not be removed ({failures[0]})", SitelensWarning, stacklevel=2)
        return removed


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in the JSON header of a safetensors file's bytes."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})


def _metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors."""
    with open(path, "rb") as file:
        start = file.read(8)
        return _metadata(start + file.read(min(int.from_bytes(start, "little"), size_of(path.resolve()))))


def _is_damaged(path: Path) -> bool:
    try:
        Artifact.load(path)
    except DamagedArtifactError:
        return True
    except SitelensError:  # gone, not to be read, or of a newer version
        return False
    return False


def default_store() -> Store:
    """The store in the user's cache folder (see `sl.settings.cache_dir`)."""
    return Store(settings.cache() / "artifacts")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def content_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and content, in hexadecimal."""
    value = tensor.detach().contiguous().cpu()
    total = hashlib.sha256(canonical_json([str(value.dtype), list(value.shape)]).encode())
    total.update(tensor_bytes(value))
    return total.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The raw bytes of a contiguous CPU tensor, whatever its dtype, as a buffer without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()
