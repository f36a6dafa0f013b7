"""Conditions at the heads' z other than patching: an offset for each head, at every position."""

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
    """z <- z + offset for every head, at every position and step; most offsets are zero."""

    offsets: Float[Tensor, "layer head d_head"]
    model: str | None = None
    origin: Origin | None = None
    scope = "generation"

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        check_fit("the offsets", self.model, tuple(self.offsets.shape), model, self.origin)
        return changing(lambda z, layer: z + self.offsets[layer].to(z.device, z.dtype), len(self.offsets))


def changing(change: Callable[[Tensor, int], Tensor], layers: int) -> list[Hook]:
    """Hooks that change every layer's z, in the dtype of computing."""

    def act(z: Tensor, hook: Any = None, *, layer: int) -> Tensor:
        return change(z.to(torch.promote_types(z.dtype, torch.float32)), layer).to(z.dtype)

    return [(z_hook(layer), functools.partial(act, layer=layer)) for layer in range(layers)]
