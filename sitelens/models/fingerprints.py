"""The public fingerprint of a model."""

from __future__ import annotations

from sitelens.models.model import Model, ModelLike


def fingerprint(model: ModelLike) -> str:
    """A hexadecimal digest of everything that the model computes with: weights, buffers, configuration, adapters.

    Edited or quantized models differ from their originals. Names, folders, devices and settings that do not affect
    logits are ignored. Every tensor is read at every call, so an edit of a single element is noticed however it was
    made, also through `.data`; this takes 25 ms for the 540 MB of SmolLM2-135M in float32 (XXH3, 128 bits). The SHA-256
    sums behind the digest are computed only for tensors that have changed.

    Example:
        >>> sl.fingerprint(model) == sl.fingerprint(model)
        True
    """
    return Model.of(model).fingerprint()
