"""SHA-256 digests of plain JSON and of tensors, which address and verify artifacts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces, so that equal values give equal text."""
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
    """The bytes of a contiguous CPU tensor of any dtype, as a buffer that shares its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
