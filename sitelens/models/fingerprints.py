"""Fingerprints: what identifies a model's weights and what they compute."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sitelens.contexts import bound
from sitelens.models.facts import Facts
from sitelens.store.digests import content_digest, digest, tensor_bytes

SEVERAL_THREADS = 1 << 26  # bytes of tensors from which reading them is spread over threads
_BLOCK = 1 << 20  # 32-bit words of a tensor on an accelerator that are summed at a time


@dataclass(frozen=True)
class _Known:
    """A fingerprint, the facts and sums of tensors that it stands for, and the SHA-256 of each tensor by its sum.

    `weights` is a digest of the parameters alone.
    """

    plain: dict[str, Any]
    sums: dict[str, str]
    digests: dict[str, str]
    fingerprint: str
    weights: str


_known: weakref.WeakKeyDictionary[TransformerBridge, _Known] = weakref.WeakKeyDictionary()


def fingerprint(model: TransformerBridge) -> str:
    """A hexadecimal digest of all that the model computes with: weights, buffers, configuration, adapters.

    Edited or quantized models differ from their originals; names, folders, devices and settings that no logit hangs on
    play no part. Every tensor is read at every call, so an edit of a single element is seen however it was made, also
    through `.data`: 25 ms for the 540 MB of SmolLM2-135M in float32, at the speed of memory (XXH3, 128 bit). The
    SHA-256 sums that make the digest are computed only for tensors that have changed.
    """
    settled = _settled.get()
    if settled is not None and settled[0] is model:
        return settled[1]
    facts = Facts.of(model.original_model)
    sums = tensor_sums(facts.tensors)
    known = _known.get(model)
    if known is None or known.plain != facts.plain or known.sums != sums:
        digests = known.digests if known is not None else {}
        new = {total: facts.tensors[name] for name, total in sums.items() if total not in digests}
        fresh = dict(zip(new, _in_threads(content_digest, list(new.values())), strict=True))
        digests = {total: (fresh.get(total) or digests[total]) for total in sums.values()}
        named = {name: digests[total] for name, total in sums.items()}
        weights = {name: named[name] for name in sums if isinstance(facts.tensors[name], torch.nn.Parameter)}
        whole = digest([facts.plain, named])[:32]
        known = _known[model] = _Known(facts.plain, sums, digests, whole, digest(weights)[:32])
    return known.fingerprint


def weights_digest(model: TransformerBridge) -> str:
    """A hexadecimal digest of the model's parameters alone: the same on every machine, whatever the library versions.

    A fingerprint also covers what libraries and processors compute when a model is loaded (rotary frequencies, say).
    """
    fingerprint(model)
    return _known[model].weights


_settled: ContextVar[tuple[TransformerBridge, str] | None] = ContextVar("settled", default=None)


@contextmanager
def unchanged(model: TransformerBridge) -> Iterator[None]:
    """Look once at the weights for all that the block asks of their fingerprint: for calls that edit none."""
    with bound(_settled, (model, fingerprint(model))):
        yield


def text_config(model: TransformerBridge) -> Any:
    """The part of the configuration that speaks of the language model."""
    config: Any = model.original_model.config
    return config.get_text_config()


def tensor_sums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A checksum of each tensor's dtype, shape and every bit of its content, fast enough for every call."""
    return dict(zip(tensors, _in_threads(_sum, list(tensors.values())), strict=True))


def _in_threads(of: Any, tensors: Sequence[Tensor]) -> list[str]:
    """One text per tensor; hashing releases the interpreter lock."""
    cores = os.cpu_count() or 1
    if cores == 1 or sum(tensor.nbytes for tensor in tensors) < SEVERAL_THREADS:
        return [of(tensor) for tensor in tensors]
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(of, tensors))


def _sum(tensor: Tensor) -> str:
    value = tensor.detach().contiguous()
    if value.is_cpu:
        total = xxhash.xxh3_128_hexdigest(tensor_bytes(value))
    else:
        total = xxhash.xxh3_128_hexdigest(accelerator_sums(value).cpu().numpy().tobytes())
    return f"{value.dtype} {tuple(value.shape)} {total}"


def accelerator_sums(value: Tensor) -> Tensor:
    """Sums of a tensor's 32-bit words times fixed pseudo-random 64-bit weights, modulo 2**64, one per block.

    This is multilinear hashing (Lemire and Kaser 2014, arXiv 1202.4961): unequal contents agree with a chance of 2**-32
    per block. It runs where the tensor lies, so nothing is copied.
    """
    raw = value.reshape(-1).view(torch.uint8)
    whole = raw.numel() // 4 * 4
    words = raw[:whole].view(torch.int32)
    weights = _weights(value.device)
    parts = [(block * weights[: len(block)]).sum() for block in words.split(_BLOCK)]
    return torch.stack([*parts, *raw[whole:].to(torch.int64)]) if parts or whole < len(raw) else raw.to(torch.int64)


_random_weights: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    if device not in _random_weights:
        generator = torch.Generator().manual_seed(20906)
        weights = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), generator=generator, dtype=torch.int64)
        _random_weights[device] = weights.to(device)
    return _random_weights[device]
