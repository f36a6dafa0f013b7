"""The tensors of a GGUF file, or of all its parts, under transformers' names: none missing, none left over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sitelens.errors import SitelensError
from sitelens.models.gguf.parts import open_gguf
from sitelens.models.gguf.rope import ROTARY_TENSORS
from sitelens.models.networks import several


@dataclass(frozen=True)
class GGUF:
    """The content of a GGUF file and its other parts.

    Args:
        files: the parts in order.
        values: the metadata.
        tensors: the reader's entries by name.
    """

    files: tuple[Path, ...]
    values: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes in torch's order."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        from gguf import dequantize

        tensor = self.tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(self.shapes[name])


def read_gguf(files: tuple[Path, ...]) -> GGUF:
    """Metadata and tensors of a model in one file or several; tensors are read when they are needed.

    Raises:
        SitelensError: if a file is no GGUF file, or the parts do not belong together.
    """
    values: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for number, file in enumerate(files):
        reader = open_gguf(file)
        own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        if len(files) > 1 and (own.get("split.no"), own.get("split.count")) != (number, len(files)):
            raise SitelensError(
                f"{file} says that it is part {own.get('split.no', -1) + 1} of {own.get('split.count')}"
            )
        values = own | values
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise SitelensError(f"{file} holds the tensor {tensor.name} a second time")
            tensors[tensor.name] = tensor
    expected = values.get("split.tensors.count")
    if len(files) > 1 and expected not in (None, len(tensors)):
        raise SitelensError(f"the {len(files)} parts of {files[0].name} hold {len(tensors)} tensors, not {expected}")
    return GGUF(files, values, tensors)


def state_dict(gguf: GGUF, network: Any) -> dict[str, Tensor]:
    """The weights of `network` (which may be on the meta device) from the file, under the network's names.

    Raises:
        SitelensError: naming tensors that are missing, have another shape, are not finite, or have no place in the
            network.
    """
    name, arch = gguf.files[0], str(gguf.values["general.architecture"])
    tied = network.config.tie_word_embeddings
    keys = [key for key in network.state_dict() if not (tied and key == "lm_head.weight")]
    sources = _sources(keys, arch, network.config)
    if missing := [source for key in keys for source in sources[key] if source not in gguf.tensors]:
        raise SitelensError(
            f"{name} is not a whole model: it lacks the tensors {several(missing)}. Get the complete file"
        )
    used = {source for key in keys for source in sources[key]}
    if surplus := sorted(set(gguf.tensors) - used - ROTARY_TENSORS):
        raise SitelensError(
            f"{name} holds tensors that transformers' {type(network).__name__} has no place for, so that it would "
            f"compute something else: {several(surplus)}. Load the original Hugging Face checkpoint instead"
        )
    state = {}
    for key, parameter in network.state_dict().items():
        if key not in sources:
            continue
        arrays = [_as_transformers_has_it(arch, source, gguf.array(source), network.config) for source in sources[key]]
        tensor = torch.from_numpy(np.array(np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0], order="C"))
        if tensor.shape != parameter.shape:
            raise SitelensError(
                f"{name}: its tensor {sources[key][0]} has shape {tuple(gguf.shapes[sources[key][0]])}, which does not "
                f"fit its metadata: they make {key} {tuple(parameter.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise SitelensError(f"{name}: its tensor {sources[key][0]} holds numbers that are not finite")
        state[key] = tensor
    return state


def _sources(keys: list[str], arch: str, config: Any) -> dict[str, tuple[str, ...]]:
    """The names of the GGUF tensors that make up each weight."""
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    sources = {}
    for key in keys:
        stem, _, suffix = key.rpartition(".")
        layer = re.search(r"\.layers\.(\d+)\.", key)
        if key.endswith(".mlp.experts.gate_up_proj") and layer:
            sources[key] = tuple(f"blk.{layer[1]}.ffn_{half}_exps.weight" for half in ("gate", "up"))
        elif key.endswith(".mlp.experts.down_proj") and layer:
            sources[key] = (f"blk.{layer[1]}.ffn_down_exps.weight",)
        else:
            own = names.get_name(stem) if suffix in ("weight", "bias") else None
            if own is None:
                raise SitelensError(f"the weight {key} has no counterpart in GGUF files of architecture {arch!r}")
            sources[key] = (f"{own}.{suffix}",)
    return sources


def _as_transformers_has_it(arch: str, name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """Undo changes that llama.cpp's converter made to a tensor's layout or values."""
    if arch in ("llama", "granite") and (turned := re.search(r"\.attn_([qk])\.", name)):
        heads = config.num_attention_heads if turned[1] == "q" else config.num_key_value_heads
        return rearrange(array, "(head half two) ... -> (head two half) ...", head=heads, two=2)
    if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return array - np.float32(1.0)
    if arch == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$", name):
        return array.T
    if name.endswith(".ffn_gate_inp_shexp.weight") and array.ndim == 1:
        return array[None]
    return array
