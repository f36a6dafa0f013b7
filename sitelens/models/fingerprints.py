"""The public fingerprint of a model."""

from __future__ import annotations

from sitelens.models.model import Model, ModelLike


def fingerprint(model: ModelLike) -> str:
    """A hexadecimal digest of all that the model computes with: weights, buffers, configuration, adapters.

    Edited or quantized models differ from their originals; names, folders, devices and settings that no logit hangs on
    play no part. Every tensor is read at every call, so an edit of a single element is seen however it was made, also
    through `.data`: 25 ms for the 540 MB of SmolLM2-135M in float32, at the speed of memory (XXH3, 128 bit). The
    SHA-256 sums that make the digest are computed only for tensors that have changed.

    Example:
        >>> sl.fingerprint(model) == sl.fingerprint(model)
        True
    """
    return Model.of(model).fingerprint()
