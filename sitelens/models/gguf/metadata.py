"""The metadata of a GGUF file as a transformers configuration that computes the same, or an error that names the key.

Keys have llama.cpp's meaning. Every key of the architecture must be read, or have a value without effect; anything else
is an error, because a configuration that ignores it would describe another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sitelens.errors import SitelensError
from sitelens.models.gguf.keys import GO_ON, Metadata
from sitelens.models.gguf.rope import rope_parameters


@dataclass(frozen=True)
class Architecture:
    """Name and configuration in transformers of one of llama.cpp's architectures.

    Args:
        model_type: transformers' name.
        eps: the configuration's name for the norms' epsilon.
        rms: whether the norms are RMS norms.
        names: configuration names that differ from Llama's; None for an entry that does not exist.
        fixed: values in llama.cpp's code that the file does not contain.
        read: further keys of the file, with their configuration names.
        rope: whether there are rotary embeddings.
        partial_rotary: whether they may apply to a part of each head.
    """

    model_type: str
    eps: str = "rms_norm_eps"
    rms: bool = True
    names: Mapping[str, str | None] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, str] = field(default_factory=dict)
    rope: bool = True
    partial_rotary: bool = False


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_GEMMA = {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
ARCHITECTURES = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral", read={"attention.sliding_window": "sliding_window"}),
    "granite": Architecture(
        "granite",
        read={
            "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
        },
    ),
    "qwen2": Architecture("qwen2", names={"head_dim": None}),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        names={"head_dim": None},
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1},
        read=_EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3moe": Architecture("qwen3_moe", fixed={"norm_topk_prob": True, "decoder_sparse_step": 1}, read=_EXPERTS),
    "gemma2": Architecture("gemma2", read=_GEMMA | {"attn_logit_softcapping": "attn_logit_softcapping"}),
    "gemma3": Architecture("gemma3_text", read=_GEMMA),
    "phi3": Architecture("phi3", names={"head_dim": None}, partial_rotary=True),
    "gpt2": Architecture(
        "gpt2", "layer_norm_epsilon", rms=False, rope=False,
        names={
            "max_position_embeddings": "n_positions", "hidden_size": "n_embd", "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": None,
            "head_dim": None,
        },
    ),
    "starcoder2": Architecture("starcoder2", "norm_epsilon", rms=False, names={"head_dim": None}),
    "stablelm": Architecture(
        "stablelm", "layer_norm_eps", rms=False, names={"head_dim": None}, partial_rotary=True,
    ),
}  # fmt: skip
# Keys that say nothing about the computation.
SILENT = {"tensor_data_layout", "rope.scaling.finetuned", "decoder_start_token_id"}
# Values with which a key changes nothing, in any architecture that does not read it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "pooling_type": (0,),
    "use_parallel_residual": (False,), "expert_count": (0,), "expert_used_count": (0,), "logit_scale": (0, 1),
    "residual_scale": (0, 1), "embedding_scale": (0, 1), "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,), "router_logit_softcapping": (0,), "attention.sliding_window": (0,),
    "expert_weights_scale": (0, 1), "expert_shared_count": (0,), "leading_dense_block_count": (0,),
    "rescale_every_n_layers": (0,), "nextn_predict_layers": (0,), "attention.shared_kv_layers": (0,),
    "swin_norm": (False,), "attention.output_scale": (1,), "expert_group_count": (0, 1), "expert_weights_norm": (),
    "attention.temperature_length": (0,), "attention.temperature_scale": (0,),
}  # fmt: skip


def config_of(name: str, values: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], factors: Any) -> Any:
    """The configuration of the network in a GGUF file.

    `tensors` maps the file's tensor names to shapes (as torch has them); `factors` reads a tensor of rotary factors
    by its name.

    Raises:
        SitelensError: naming the architecture or the metadata key that cannot be rebuilt.
    """
    from transformers import CONFIG_MAPPING

    meta = Metadata(name, values)
    _check_kind(meta)
    kind = _architecture(meta)
    length, width, heads = meta.need("context_length"), meta.need("embedding_length"), meta.need("attention.head_count")
    head_dim = _head_dim(meta, width, heads)
    shape: dict[str, Any] = {
        "max_position_embeddings": length, "hidden_size": width, "num_hidden_layers": meta.need("block_count"),
        "intermediate_size": meta.get("feed_forward_length"), "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads), "head_dim": head_dim,
    }  # fmt: skip
    entries: dict[str, Any] = {
        own: value
        for key, value in shape.items()
        if value is not None and (own := kind.names.get(key, key)) is not None
    }
    entries[kind.eps] = meta.need("attention.layer_norm_rms_epsilon" if kind.rms else "attention.layer_norm_epsilon")
    entries["vocab_size"] = _vocabulary(meta, tensors)
    entries["tie_word_embeddings"] = "output.weight" not in tensors
    entries |= dict(kind.fixed)
    entries |= {own: value for key, own in kind.read.items() if (value := meta.get(key)) is not None}
    # None where the file names none: the class's own defaults are those of one checkpoint
    entries |= {
        f"{own}_token_id": values.get(f"tokenizer.ggml.{key}_token_id")
        for own, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    if (unknown := values.get("tokenizer.ggml.unknown_token_id")) is not None:
        entries["unk_token_id"] = unknown
    _particulars(meta, kind, entries, tensors, head_dim)
    if kind.rope:
        entries |= rope_parameters(meta, kind.partial_rotary, head_dim, length, tensors, factors)
    meta.get("rope.dimension_count")
    _check_rest(meta, head_dim, length)
    try:
        return CONFIG_MAPPING[kind.model_type](**entries)
    except Exception as error:  # transformers checks the values' types, by several libraries
        raise SitelensError(f"{name}: its metadata make no {kind.model_type} configuration: {error}") from error


def _check_kind(meta: Metadata) -> None:
    kind = meta.values.get("general.type", "model")
    if kind != "model" or any(key.startswith("adapter.") for key in meta.values):
        what = "adapter (LoRA)" if kind == "model" or kind == "adapter" else kind
        raise SitelensError(f"{meta.name} holds no language model but a file of type {what}")


def _architecture(meta: Metadata) -> Architecture:
    if not meta.arch:
        raise SitelensError(
            f"{meta.name} could not be read as a GGUF language model: it does not say its general.architecture"
        )
    if meta.arch not in ARCHITECTURES:
        raise SitelensError(
            f"{meta.name} is of llama.cpp's architecture {meta.arch!r}, which is not converted. {GO_ON}; "
            f"architectures that are converted: {', '.join(ARCHITECTURES)}"
        )
    window = meta.values.get("llama.attention.sliding_window", 0)
    if meta.arch == "llama" and isinstance(window, int) and window:  # Mistral's files are called llama
        return ARCHITECTURES["mistral"]
    return ARCHITECTURES[meta.arch]


def _head_dim(meta: Metadata, width: int, heads: int) -> int:
    size = meta.get("attention.key_length", width // heads)
    if (value := meta.get("attention.value_length", size)) != size:
        raise meta.refused("attention.value_length", value, f"is not its attention.key_length, {size}")
    return size


def _vocabulary(meta: Metadata, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Number of rows of the token embeddings."""
    tokens = meta.values.get("tokenizer.ggml.tokens", [])
    stated = meta.get("vocab_size", len(tokens))
    rows = tensors.get("token_embd.weight", (stated,))[0]
    if not stated <= rows or len(tokens) > rows:
        raise SitelensError(f"{meta.name}: its token embeddings have {rows} rows for {max(stated, len(tokens))} tokens")
    return rows


def _particulars(
    meta: Metadata, kind: Architecture, found: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], head_dim: int
) -> None:
    """Settings that single architectures store differently, or that are fixed in llama.cpp's code."""
    layers, own = found.get("num_hidden_layers", 0), kind.model_type
    if own in ("llama", "granite"):
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
        found["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if own in ("qwen3", "qwen3_moe"):
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if own == "granite":
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            found[name] = found.get(name) or 1.0
        found["attention_multiplier"] = found.get("attention_multiplier") or head_dim**-0.5
    if own in ("gemma2", "gemma3_text"):
        large = {"gemma2": 46, "gemma3_text": 62}[own]  # the 27B model's layers: its queries are scaled otherwise
        usual = found["hidden_size"] // found["num_attention_heads"] if layers == large else head_dim
        scale = meta.get("attention.scale") or usual**-0.5
        found["query_pre_attn_scalar"] = round(scale**-2)
        if not math.isclose(found["query_pre_attn_scalar"] ** -0.5, scale, rel_tol=1e-5):
            raise meta.refused("attention.scale", scale, "is not one over the square root of a whole number")
        _window_pattern(meta, own, layers)
    if own == "mistral":
        found["sliding_window"] = found.get("sliding_window") or None
    if own == "phi3":
        window = meta.get("attention.sliding_window", 0)
        found["sliding_window"] = window if 0 < window < found["max_position_embeddings"] else None
    if own == "starcoder2":
        found["sliding_window"] = meta.get("attention.sliding_window", 0) or None
        found["use_bias"] = "blk.0.attn_q.bias" in tensors
    if own == "gpt2":
        kv = meta.get("attention.head_count_kv", found["n_head"])
        if kv != found["n_head"]:
            raise meta.refused("attention.head_count_kv", kv, "differs from its attention.head_count")
    if own == "stablelm":
        found["use_parallel_residual"] = bool(meta.get("use_parallel_residual", "blk.0.ffn_norm.weight" not in tensors))
        found["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
        if "blk.0.attn_q_norm.weight" in tensors:
            raise SitelensError(f"{meta.name}: its norms per head (attn_q_norm) are not converted. {GO_ON}")


def _window_pattern(meta: Metadata, own: str, layers: int) -> None:
    """Every second (sixth) layer of Gemma attends to all tokens; a file with another pattern is an error."""
    key, every = "attention.sliding_window_pattern", 2 if own == "gemma2" else 6
    meta.unread.discard(key)
    value = meta.values.get(f"{meta.arch}.{key}", every)
    usual = [bool((layer + 1) % every) for layer in range(layers)]
    if value != every and value != usual:
        raise meta.refused(key, value, "is not this architecture's own")


def _check_rest(meta: Metadata, head_dim: int, length: int) -> None:
    neutral = NEUTRAL | {"attention.scale": (0, head_dim**-0.5), "attention.layer_norm_epsilon": ()}
    for key in sorted(meta.unread - SILENT):
        value = meta.values[f"{meta.arch}.{key}"]
        if key in neutral and any(np.isclose(value, usual, rtol=1e-5) for usual in neutral[key] if _number(value)):
            continue
        if key == "attention.sliding_window" and isinstance(value, int) and value >= length:
            continue
        raise meta.refused(key, value, "is not converted")


def _number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
