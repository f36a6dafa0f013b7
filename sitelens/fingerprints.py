"""Fingerprints: what identifies a model's weights and what they compute."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from sitelens.store import digest, tensor_bytes

SAMPLED = 64  # elements of each tensor that are looked at to see whether a fingerprint is still valid


_fingerprints: weakref.WeakKeyDictionary[TransformerBridge, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: TransformerBridge) -> str:
    """A hexadecimal digest of the model's weights, dtype and rotary and window settings included.

    Edited or quantised models differ from their originals.

    It is computed once and kept while no tensor has been replaced, changed in place or differs in a sample of its
    elements; so a change of single elements through `.data` may go unseen.
    """
    settled = _settled.get()
    if settled is not None and settled[0] is model:
        return settled[1]
    architecture = _architecture(model)
    state = hashlib.sha256(digest(architecture).encode())
    samples = []
    for tensor in _tensors(model.original_model):
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED])
        version = 0 if tensor.is_inference() else tensor._version  # those of inference mode do not count changes
        state.update(f"{tensor.data_ptr()} {version} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for dtype, device in dict.fromkeys((sample.dtype, sample.device) for sample in samples):
        alike = [sample for sample in samples if (sample.dtype, sample.device) == (dtype, device)]
        state.update(tensor_bytes(torch.cat(alike).cpu()))
    key = state.hexdigest()
    known = _fingerprints.get(model)
    if known is None or known[0] != key:
        tensors = _weights(model)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the interpreter lock
            sums = list(pool.map(_tensor_digest, tensors.values()))
        named = [[name, *rest] for name, rest in zip(tensors, sums, strict=True)]
        known = key, digest([named, architecture])[:32]
        _fingerprints[model] = known
    return known[1]


_settled: ContextVar[tuple[TransformerBridge, str] | None] = ContextVar("settled", default=None)


@contextmanager
def unchanged(model: TransformerBridge) -> Iterator[None]:
    """Look once at the weights for all that the block asks of their fingerprint: for calls that edit none."""
    token = _settled.set((model, fingerprint(model)))
    try:
        yield
    finally:
        _settled.reset(token)


def text_config(model: TransformerBridge) -> Any:
    """The part of the configuration that speaks of the language model."""
    config: Any = model.original_model.config
    return config.get_text_config()


def _tensors(network: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and persistent buffers in their order, each once, as `_weights` finds them in ten times the time."""
    found: dict[int, torch.Tensor] = {}
    modules, seen = [network], {id(network)}
    while modules:
        module = modules.pop()
        buffers = module._buffers.items()
        kept = [buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *kept):
            if tensor is not None:
                found[id(tensor)] = tensor
        for child in module._modules.values():
            if child is not None and id(child) not in seen and type(child) is not HookPoint:
                seen.add(id(child))
                modules.append(child)
    return list(found.values())


def _weights(model: TransformerBridge) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names they have outside of the bridge, each once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(model.original_model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen and isinstance(tensor, torch.Tensor):
            seen.add(id(tensor))
            found[name.replace("._original_component", "")] = tensor
    return found


def _architecture(model: TransformerBridge) -> dict[str, str]:
    """What the same weights compute differently with."""
    config = text_config(model)
    facts = (
        "rope_parameters", "sliding_window", "layer_types", "num_experts_per_tok", "attn_logit_softcapping",
        "final_logit_softcapping", "query_pre_attn_scalar", "rms_norm_eps", "layer_norm_eps", "hidden_act",
    )  # fmt: skip
    return {fact: json.dumps(getattr(config, fact, None), sort_keys=True, default=str) for fact in facts}


def _tensor_digest(tensor: torch.Tensor) -> list[Any]:
    value = tensor.detach().contiguous().cpu()
    return [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]
