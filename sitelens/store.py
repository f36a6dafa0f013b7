"""Artifacts on disk: one safetensors file each, JSON in its metadata, addressed by what went into it.

An artifact is a kind (say "embedding"), a `spec` (everything its content depends on, plain JSON), tensors, and
`meta` (what a reader wants to know but the content does not depend on). Files are written to a temporary name,
flushed and renamed, so a reader sees a whole artifact or none, whoever else writes and whenever a process dies.
A SHA-256 over metadata and tensors is checked at every read. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sitelens.defaults import SitelensError, SitelensWarning, settings
from sitelens.version import __version__
from sitelens.writing import write_bytes

FORMAT = 1
STALE_TEMPORARY_SECONDS = 3600


class DamagedArtifactError(SitelensError):
    """A file that is not what was written: truncated, changed, or no artifact at all."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """What one file holds.

    `spec` and `meta` are plain JSON; `tensors` maps names to tensors.
    """

    kind: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, atomically; the folder is made where it is missing. Returns the path."""
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
            SitelensError: if there is no such file, or it holds another kind of artifact.
            DamagedArtifactError: if its content is not what was written.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError as error:
            raise SitelensError(f"there is no file {path}") from error
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise DamagedArtifactError(f"{path} is damaged or no safetensors file: {error}") from error
        header = metadata.get("sitelens")
        if header is None:
            raise DamagedArtifactError(f"{path} is a safetensors file, but not one of sitelens")
        if metadata.get("sha256") != _checksum(header, tensors):
            raise DamagedArtifactError(f"{path} is damaged: its checksum does not match its content")
        content = json.loads(header)
        if content["format"] > FORMAT:
            raise SitelensError(f"{path} was written by a newer sitelens ({content['sitelens']}): upgrade to read it")
        if kind is not None and content["kind"] != kind:
            raise SitelensError(f"{path} holds a {content['kind']}, not a {kind}")
        return Artifact(content["kind"], content["spec"], tensors, content["meta"])


@dataclass(frozen=True)
class Store:
    """A folder of artifacts, `root/kind/<digest of spec>.safetensors`."""

    root: Path

    def path(self, kind: str, spec: Mapping[str, Any]) -> Path:
        """Where the artifact of this kind and spec lies, or would lie."""
        return self.root / kind / f"{digest({'kind': kind, 'format': FORMAT, 'spec': spec})[:40]}.safetensors"

    def get(self, kind: str, spec: Mapping[str, Any]) -> Artifact | None:
        """The stored artifact, or None. A damaged one is named in a warning and set aside, to be made anew."""
        path = self.path(kind, spec)
        if not path.exists():
            return None
        try:
            artifact = Artifact.load(path, kind)
            if canonical_json(artifact.spec) != canonical_json(spec):
                raise DamagedArtifactError(f"{path} does not hold what its name says")
        except DamagedArtifactError as error:
            warnings.warn(f"{error}; it is made anew", SitelensWarning, stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        except SitelensError:  # removed by another process between the look and the read
            return None
        return artifact

    def put(self, artifact: Artifact) -> Path:
        """Keep an artifact; concurrent writers of the same one leave one whole file."""
        return artifact.save(self.path(artifact.kind, artifact.spec))

    def entries(self) -> pd.DataFrame:
        """One row a file: kind, task, model, bytes, modified, path. Damaged files have kind "damaged"."""
        rows = []
        for path in sorted(self.root.glob("*/*.safetensors")):
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    content = json.loads((file.metadata() or {})["sitelens"])
                about = {name: content["spec"].get(name) or content["meta"].get(name) for name in ("task", "model")}
                kind = content["kind"]
            except (safetensors.SafetensorError, OSError, KeyError, ValueError):
                kind, about = "damaged", {}
            stat = path.stat()
            modified = pd.Timestamp(stat.st_mtime, unit="s").round("s")
            rows.append({"kind": kind, "task": about.get("task"), "model": about.get("model"),
                         "bytes": stat.st_size, "modified": modified, "path": str(path)})  # fmt: skip
        return pd.DataFrame(rows, columns=["kind", "task", "model", "bytes", "modified", "path"])

    def clear(self, kind: str | None = None) -> int:
        """Remove the artifacts of one kind, all, or those that are "damaged"; and stale temporary files.

        Returns how many artifacts went.
        """
        removed = 0
        for path in self.root.glob(f"{kind if kind not in (None, 'damaged') else '*'}/*.safetensors"):
            if kind != "damaged" or _is_damaged(path):
                path.unlink(missing_ok=True)
                removed += 1
        for path in self.root.glob("*/.*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_TEMPORARY_SECONDS:
                path.unlink(missing_ok=True)
        return removed


def _is_damaged(path: Path) -> bool:
    try:
        Artifact.load(path)
    except DamagedArtifactError:
        return True
    except SitelensError:  # gone, or of a newer version
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
