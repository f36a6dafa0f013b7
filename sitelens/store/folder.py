"""Store: a folder of artifacts addressed by what they depend on; `Cache.cached` loads a result or computes it.

A store that cannot be written to, or an artifact that cannot be read (missing permission, an offline network folder),
causes a warning but never the loss of a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from torch import Tensor

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files.folders import make_folder, reason, remove, scratch_folder, size_of, warn_once
from sitelens.settings import settings
from sitelens.store.artifact import FORMAT, Artifact, DamagedArtifactError, metadata_of
from sitelens.store.digests import canonical_json, digest

Value = TypeVar("Value")
Contents = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and meta of an artifact

STALE_TEMPORARY_SECONDS = 3600
DAMAGED = ".damaged"  # suffix of damaged files that are set aside


class Cache(ABC):
    """A place that stores artifacts by kind and spec."""

    @abstractmethod
    def get(self, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None = None) -> Any:
        """The stored artifact, or the result of `read` for it; None if there is none."""

    @abstractmethod
    def put(self, artifact: Artifact) -> Path | None:
        """Store an artifact and return its path, or None if it could not be stored."""

    def cached(
        self,
        kind: str,
        spec: Mapping[str, Any],
        make: Callable[[], Contents],
        read: Callable[[Artifact], Value],
    ) -> Value:
        """The result of `read` for the stored artifact; if there is none, it is computed by `make` and stored first.

        Args:
            kind: the kind of artifact.
            spec: everything that decides the result, plain JSON.
            make: computes the tensors and the meta of the artifact.
            read: returns the result in an artifact; if it raises SitelensError for a stored one, a new one is made.

        Raises:
            SitelensError: from `make`, or from `read` for the new artifact.
        """
        return self.cached_all(kind, [spec], lambda _: [(0, make())], [read])[0]

    def cached_all(
        self,
        kind: str,
        specs: Sequence[Mapping[str, Any]],
        make: Callable[[list[int]], Iterable[tuple[int, Contents]]],
        reads: Sequence[Callable[[Artifact], Value]],
    ) -> list[Value]:
        """The results of several specs, in their order, as `cached` returns them one at a time.

        Args:
            kind: the kind of the artifacts.
            specs: one spec per result.
            make: called once with the indices of the missing results; yields each index with its contents, in any
                order. Each is stored immediately, so that an interruption loses only the remaining ones.
            reads: one `read` function per result.

        Raises:
            SitelensError: from `make`, or from `reads` for a new artifact.
        """
        results = [self.get(kind, spec, read) for spec, read in zip(specs, reads, strict=True)]
        missing = [i for i, result in enumerate(results) if result is None]
        for i, (tensors, meta) in make(missing) if missing else ():
            artifact = Artifact(kind, dict(specs[i]), tensors, meta)
            self.put(artifact)
            results[i] = reads[i](artifact)
        return results


@dataclass(frozen=True)
class Store(Cache):
    """A folder of artifacts, `root/kind/<digest of spec>.safetensors`."""

    root: Path

    def path(self, kind: str, spec: Mapping[str, Any]) -> Path:
        """The path of the artifact of this kind and spec, whether or not it exists."""
        return self.root / kind / f"{digest({'kind': kind, 'format': FORMAT, 'spec': spec})[:40]}.safetensors"

    def get(self, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None = None) -> Any:
        """The stored artifact, or the result of `read` for it; None if there is none.

        An artifact that is damaged, or for which `read` raises SitelensError, is named in a warning and set aside until
        a new one is complete. A file that cannot be opened is left unchanged, with one warning.
        """
        path = self.path(kind, spec)
        try:
            return self._checked(path, kind, spec, read)
        except DamagedArtifactError as error:
            warnings.warn(f"{error}; it is computed again", SitelensWarning, stacklevel=2)
            self._set_aside(path, kind, spec, read)
        except SitelensError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                warn_once(path, f"{error}; the work continues without it")
        return None

    def put(self, artifact: Artifact) -> Path | None:
        """Store an artifact and return its path; if it cannot be written, issue one warning and return None.

        No partial file remains. If several processes store the same artifact, one complete file remains.
        """
        path = self.path(artifact.kind, artifact.spec)
        try:
            make_folder(path.parent)
            artifact.save(path)
        except OSError as error:
            warn_once(
                self.root,
                f"results cannot be stored in the cache {self.root}: {reason(error)}. The work continues; "
                "SITELENS_CACHE or sl.settings.cache_dir names another cache folder",
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
        """Rename a damaged file; rename it back if another process has replaced it with a valid one meanwhile."""
        aside = path.with_suffix(DAMAGED)
        with contextlib.suppress(OSError):
            os.replace(path, aside)
            with contextlib.suppress(SitelensError):
                self._checked(aside, kind, spec, read)
                os.replace(aside, path)

    def remove(self, kind: str, spec: Mapping[str, Any]) -> None:
        """Remove the artifact of this kind and spec, if it exists and permissions allow it."""
        with contextlib.suppress(OSError):
            self.path(kind, spec).unlink(missing_ok=True)

    def entries(self) -> pd.DataFrame:
        """One row per file: kind (also "damaged" or "unreadable"), task, model (fingerprint), bytes, modified, path."""
        rows = []
        for path in sorted([*self.root.glob("*/*.safetensors"), *self.root.glob(f"*/*{DAMAGED}")]):
            try:
                content = json.loads(metadata_of(path)["sitelens"])
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
        """Remove artifacts and stale temporary files; return the number of artifacts removed.

        A warning counts the artifacts that could not be removed.

        Args:
            kind: the kind to remove; "damaged" for damaged files of any kind; None for all artifacts.
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


def _is_damaged(path: Path) -> bool:
    try:
        Artifact.load(path)
    except DamagedArtifactError:
        return True
    except SitelensError:  # removed meanwhile, unreadable, or of a newer version
        return False
    return False


def default_store() -> Store:
    """The store in the user's cache folder (see `sl.settings.cache_dir`)."""
    return Store(settings.cache() / "artifacts")


@contextmanager
def empty_cache() -> Iterator[None]:
    """A context manager in which the cache is empty; what is stored in it is removed at the end."""
    with scratch_folder(settings.cache()) as folder, settings.using(cache_dir=folder):
        yield
