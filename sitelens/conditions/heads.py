"""Conditions that edit z other than by patching: an offset per head, added at every position."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.conditions.base import Condition
from sitelens.engine.forward import Hook
from sitelens.models.model import ModelLike, check_fit, z_hook
from sitelens.models.provenance import Origin


@checked
@dataclass(frozen=True, eq=False)
class HeadOffsets(Condition):
    """z <- z + offset at every position and decoding step; the offset is zero at heads that are not edited.

    Attributes:
        offsets: `[layer head d_head]`, in the units of z.
        model: fingerprint of the model they were trained on (None: any model of this shape).
        origin: where they came from, if known.

    Source:
        LoFiT (Yin et al. 2024, arXiv 2406.01563).
    """

    offsets: Float[Tensor, "layer head d_head"]
    model: str | None = None
    origin: Origin | None = None
    scope = "generation"

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        check_fit("the offsets", self.model, tuple(self.offsets.shape), model, self.origin)
        return changing(lambda z, layer: z + self.offsets[layer].to(z.device, z.dtype), len(self.offsets))


def changing(change: Callable[[Tensor, int], Tensor], layers: int) -> list[Hook]:
    """Hooks that replace each layer's z by `change(z, layer)`, computed in float32 or wider."""

    def act(z: Tensor, hook: Any = None, *, layer: int) -> Tensor:
        return change(z.to(torch.promote_types(z.dtype, torch.float32)), layer).to(z.dtype)

    return [(z_hook(layer), functools.partial(act, layer=layer)) for layer in range(layers)]
