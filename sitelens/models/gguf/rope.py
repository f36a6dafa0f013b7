"""Rotary position embeddings of a GGUF file as transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sitelens.errors import SitelensError
from sitelens.models.gguf.keys import Metadata

FREQUENCIES = "rope_freqs.weight"  # divisor of each frequency: Llama 3.1 to 3.3
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # the same, by length: Phi 3 and 4
ROTARY_TENSORS = {FREQUENCIES, LONG, SHORT}
CLOSE = 1e-4  # relative, of frequencies kept in float32 (some converters wrote float16)


def rope_parameters(
    meta: Metadata, partial: bool, head_dim: int, length: int, tensors: Mapping[str, Any],
    factors: Callable[[str], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """The configuration entries that define the rotary embeddings.

    Args:
        meta: the file's metadata.
        partial: whether transformers' network can rotate a part of each head.
        head_dim: dimensions per head.
        length: context length in tokens.
        tensors: the file's tensors by name.
        factors: reads a tensor of rotary factors.

    Raises:
        SitelensError: naming the metadata key or tensor that transformers cannot express.
    """
    theta = float(meta.get("rope.freq_base", 10000.0))
    turned = meta.get("rope.dimension_count", head_dim)
    if turned != head_dim and not (partial and 0 < turned < head_dim):
        raise meta.refused("rope.dimension_count", turned, f"is not the heads' size, {head_dim}")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if partial:
        base["partial_rotary_factor"] = turned / head_dim
    scaled = base | _scaling(meta, base, turned, length, tensors, factors)
    original = {}
    if meta.arch == "phi3":  # also stored outside of its rotary parameters
        original = {"original_max_position_embeddings": scaled.get("original_max_position_embeddings", length)}
        if scaled["rope_type"] not in ("default", "longrope"):
            raise meta.refused("rope.scaling.type", scaled["rope_type"], "is not supported by Phi-3 networks")
    if meta.arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(meta.get("rope.freq_base_swa", 10000.0))}
        return {"rope_parameters": {"full_attention": scaled, "sliding_attention": local}}
    return {"rope_parameters": scaled, **original}


def _scaling(
    meta: Metadata, base: dict[str, Any], turned: int, length: int, tensors: Mapping[str, Any],
    factors: Callable[[str], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    kind, factor = meta.get("rope.scaling.type"), meta.get("rope.scaling.factor")
    old = meta.get("rope.scale_linear")  # older form of "linear" and its factor
    if kind is None and (factor or old):
        kind, factor = "linear", factor or old
    original = meta.get("rope.scaling.original_context_length") or length
    attention = meta.get("rope.scaling.attn_factor")
    both = LONG in tensors and SHORT in tensors
    if (LONG in tensors) != (SHORT in tensors):
        raise SitelensError(f"{meta.name} has only one of the tensors {LONG} and {SHORT}")
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise meta.refused("rope.scaling.type", kind, "is unknown")
    if FREQUENCIES in tensors and (both or (kind in ("linear", "yarn") and (factor or 1) != 1)):
        raise SitelensError(f"{meta.name} has the tensor {FREQUENCIES} and another scaling of its rotary embeddings")
    if both:
        return _longrope(meta, base, turned, original, length, attention, factors)
    if kind == "longrope":
        raise SitelensError(f"{meta.name} says rope.scaling.type longrope without the tensors {LONG} and {SHORT}")
    if kind == "yarn" and (factor or 1) != 1:
        return _yarn(meta, float(factor), original, attention)
    if attention not in (None, 0, 1):
        raise meta.refused("rope.scaling.attn_factor", attention, "has no counterpart in transformers")
    if FREQUENCIES in tensors:
        return _frequencies(meta, base, turned, length, _checked(meta, FREQUENCIES, turned, factors))
    if kind == "linear" and (factor or 1) != 1:
        return {"rope_type": "linear", "factor": float(factor)}
    return {}


def _yarn(meta: Metadata, factor: float, original: int, attention: float | None) -> dict[str, Any]:
    keys = {name: meta.get(f"rope.scaling.yarn_{name}") for name in ("ext_factor", "log_multiplier", "attn_factor")}
    for name, usual in {"ext_factor": (None, 1, -1), "log_multiplier": (None, 0), "attn_factor": (None, 1, -1)}.items():
        if keys[name] not in usual:
            raise meta.refused(f"rope.scaling.yarn_{name}", keys[name], "has no counterpart in transformers")
    parameters = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        "beta_fast": float(meta.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(meta.get("rope.scaling.yarn_beta_slow", 1.0)),
    }  # fmt: skip
    if attention not in (None, 0, 1):  # llama.cpp multiplies its own rule by it
        parameters["attention_factor"] = float(attention) * (0.1 * math.log(factor) + 1.0)
    return parameters


def _longrope(
    meta: Metadata, base: dict[str, Any], turned: int, original: int, length: int, attention: float | None,
    factors: Callable[[str], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    # llama.cpp takes the attention factor from the file, or 1
    return {
        "rope_type": "longrope", "original_max_position_embeddings": original, "factor": length / original,
        "short_factor": _shortest(_checked(meta, SHORT, turned, factors)),
        "long_factor": _shortest(_checked(meta, LONG, turned, factors)), "attention_factor": float(attention or 1.0),
    }  # fmt: skip


def _frequencies(meta: Metadata, base: dict[str, Any], turned: int, length: int, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling if four numbers reproduce the factors; otherwise the factors themselves (equivalent)."""
    if np.allclose(factors, 1.0, rtol=CLOSE):
        return {}
    plain = base["rope_theta"] ** -(np.arange(0, turned, 2) / turned)
    for numbers in _llama3_candidates(plain, factors):
        if np.allclose(_llama3(plain, **numbers), factors, rtol=CLOSE):
            return {
                "rope_type": "llama3", "factor": numbers["factor"], "low_freq_factor": numbers["low"],
                "high_freq_factor": numbers["high"], "original_max_position_embeddings": numbers["original"],
            }  # fmt: skip
    return {
        "rope_type": "longrope", "short_factor": _shortest(factors), "long_factor": _shortest(factors), "factor": 1.0,
        "attention_factor": 1.0, "original_max_position_embeddings": length,
    }  # fmt: skip


def _llama3(plain: np.ndarray, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The factors by which Llama 3's rule divides each frequency."""
    turns = original * plain / (2 * math.pi)  # within the original context
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(turns > high, 1.0, np.where(turns < low, factor, between))


def _llama3_candidates(plain: np.ndarray, factors: np.ndarray) -> list[dict[str, Any]]:
    """Meta's own numbers with the file's factor first; then numbers solved from the file's factors."""
    factor = float(np.round(factors.max(), 4))
    usual = [{"factor": factor, "low": 1.0, "high": 4.0, "original": 2**power} for power in (13, 12, 14, 11, 15, 10)]
    between = (factors > 1 + CLOSE) & (factors < factor * (1 - CLOSE))
    if factor <= 1 or between.sum() < 2:
        return usual if factor > 1 else []
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(plain[between] / (2 * math.pi), smooth, 1)
    if slope <= 0 or start >= 0:
        return usual
    spread = -1 / start  # of high over low, for low = 1 as in all models of this kind
    return [*usual, {"factor": factor, "low": 1.0, "high": float(np.round(1 + spread, 3)),
                     "original": round(slope * spread)}]  # fmt: skip


def _checked(meta: Metadata, name: str, turned: int, factors: Callable[[str], np.ndarray]) -> np.ndarray:
    values = np.asarray(factors(name), dtype=np.float64).reshape(-1)
    if len(values) != turned // 2 or not np.isfinite(values).all() or (values <= 0).any():
        raise SitelensError(f"{meta.name}: its tensor {name} does not hold {turned // 2} positive factors")
    return values


def _shortest(values: np.ndarray) -> list[float]:
    """Python floats with no more digits than float32 has."""
    return [float(str(np.float32(value))) for value in values]
