"""Digests: SHA-256 of plain JSON and of tensors, by which artifacts are addressed and checked."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def content_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and content, in hexadecimal."""
    value = tensor.detach().contiguous().cpu()
    total = hashlib.sha256(canonical_json([str(value.dtype), list(value.shape)]).encode())
    total.update(tensor_bytes(value))
    return total.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The raw bytes of a contiguous CPU tensor, whatever its dtype, as a buffer without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
