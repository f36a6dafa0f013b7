"""Artifacts: one checksummed safetensors file each, with JSON in its metadata.

An artifact is a kind (for example "embedding"), a `spec` (everything its content depends on, plain JSON), tensors, and
`meta` (further information, which is not part of its address). Files are written under a temporary name, flushed and
renamed, so that a reader sees a complete artifact or none, even if other processes write or crash. A SHA-256 checksum
over metadata and tensors is verified at every read. No pickle is read or written.

A file counts as damaged only if its content differs from what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sitelens.checks.schema import parsed_json, unpacked
from sitelens.errors import SitelensError
from sitelens.files.folders import read_bytes, size_of
from sitelens.files.writing import write_bytes
from sitelens.store.digests import canonical_json, tensor_bytes
from sitelens.version import __version__

Value = TypeVar("Value")

FORMAT = 1


class DamagedArtifactError(SitelensError):
    """A file that is truncated, was changed, or is not an artifact."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """The content of one artifact file.

    Args:
        kind: the kind of artifact, usually one of `Kind`.
        spec: everything that the content depends on, plain JSON.
        tensors: tensors by name.
        meta: further information, plain JSON.
        path: the file it was read from; None if it was not read from a file.
    """

    kind: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def where(self) -> str:
        """The path of the file, or what the artifact is, for messages."""
        return str(self.path or f"the {self.kind}")

    def made(self, kind: type[Value], **more: Any) -> Value:
        """An instance of a dataclass, made from the tensors, the meta and `more` (see `sitelens.checks.schema`).

        Args:
            kind: the dataclass.
            more: further fields; they take precedence over the meta.

        Raises:
            SitelensError: naming the file and the field that does not match the dataclass.
        """
        return unpacked(kind, {**self.meta, **more}, self.tensors, self.where)

    def save(self, path: str | Path) -> Path:
        """Write the artifact to `path` atomically and return the path; the folder is created if it is missing.

        Raises:
            OSError: if it cannot be written; an existing file is unchanged.
        """
        tensors = {  # copies, because safetensors rejects tensors that share memory
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
        """The artifact in a file, verified.

        Args:
            path: the file.
            kind: the kind that is required; None accepts any.

        Raises:
            SitelensError: if the file does not exist, cannot be read, was written by a newer version of sitelens, or
                holds another kind of artifact.
            DamagedArtifactError: if it is damaged or not an artifact.
        """
        path = Path(path)
        try:
            data = read_bytes(path)  # read only once: another process may replace the file meanwhile
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
    """The JSON metadata in the file of an artifact."""

    format: int
    kind: str
    spec: dict[str, Any]
    meta: dict[str, Any]
    sitelens: str


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in the JSON header of a safetensors file's bytes."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors."""
    with open(path, "rb") as file:
        start = file.read(8)
        return _metadata(start + file.read(min(int.from_bytes(start, "little"), size_of(path.resolve()))))


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()
