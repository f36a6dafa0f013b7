"""Identities: fingerprints of models, by the content of their tensors and configurations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from sitelens.models.facts import Facts
from sitelens.store.digests import content_digest, digest, tensor_bytes

SEVERAL_THREADS = 1 << 26  # bytes of tensors from which several threads read them
_BLOCK = 1 << 20  # 32-bit words that are summed at a time on an accelerator


@dataclass(frozen=True)
class Identity:
    """The identity of a network: its fingerprint, and the facts and tensor sums behind it.

    Attributes:
        plain: the plain facts of the network (`Facts.plain`).
        sums: checksum of each tensor, by name (`tensor_sums`).
        digests: SHA-256 of each tensor, by checksum.
        fingerprint: digest of the plain facts and all tensors.
        weights: digest of the parameters alone.
    """

    plain: dict[str, Any]
    sums: dict[str, str]
    digests: dict[str, str]
    fingerprint: str
    weights: str

    @staticmethod
    def of(network: torch.nn.Module, last: Identity | None = None) -> Identity:
        """The identity of a Hugging Face network; all tensors are read.

        The SHA-256 sums are computed only for tensors that have changed since `last`; if nothing has changed, `last`
        is returned.
        """
        facts = Facts.of(network)
        sums = tensor_sums(facts.tensors)
        if last is not None and last.plain == facts.plain and last.sums == sums:
            return last
        digests = last.digests if last is not None else {}
        new = {total: facts.tensors[name] for name, total in sums.items() if total not in digests}
        fresh = dict(zip(new, _in_threads(content_digest, list(new.values())), strict=True))
        digests = {total: (fresh.get(total) or digests[total]) for total in sums.values()}
        named = {name: digests[total] for name, total in sums.items()}
        weights = {name: named[name] for name in sums if isinstance(facts.tensors[name], torch.nn.Parameter)}
        return Identity(facts.plain, sums, digests, digest([facts.plain, named])[:32], digest(weights)[:32])


def tensor_sums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A checksum of each tensor's dtype, shape and every bit of its content, fast enough to compute at every call."""
    return dict(zip(tensors, _in_threads(_sum, list(tensors.values())), strict=True))


def _in_threads(of: Any, tensors: Sequence[Tensor]) -> list[str]:
    """`of` each tensor, in threads if the tensors are large: hashing releases the interpreter lock."""
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

    Unequal contents agree with a probability of 2**-32 per block. It runs on the tensor's device, so nothing is copied.

    Source:
        Multilinear hashing (Lemire and Kaser 2014, arXiv 1202.4961).
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
