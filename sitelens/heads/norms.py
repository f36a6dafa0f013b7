"""Norms with their scale held fixed: affine maps, measured by running the norm and checked against its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeldNorm:
    """A norm with its scale held fixed: x -> gain * x + shift, with x centered first if `centered`."""

    gain: Float[Tensor, "row 1 d_model"]
    shift: Float[Tensor, " d_model"]
    centered: bool

    def __call__(self, x: Float[Tensor, "*rows 1 d_model"]) -> Float[Tensor, "*rows 1 d_model"]:
        wide = x.to(self.gain.dtype)
        wide = wide - wide.mean(-1, keepdim=True) if self.centered else wide
        return (wide * self.gain.to(x.device) + self.shift.to(x.device)).to(x.dtype)

    @staticmethod
    def at(norm: Any, x: Float[Tensor, "row 1 d_model"], y: Float[Tensor, "row 1 d_model"],
           share: float) -> HeldNorm | None:  # fmt: skip
        """The norm with the scale at which it maps x to y; None if it has no known form.

        Args:
            norm: the norm's module.
            x: its input.
            y: its output.
            share: accepted error, relative to the largest output.
        """
        weight, shift, centered = _affine_part(norm, x)
        x, y = x.to(weight.dtype), y.to(weight.dtype)
        scaled = weight * (x - x.mean(-1, keepdim=True) if centered else x)
        inverse = ((y - shift) * scaled).sum(-1, keepdim=True) / scaled.pow(2).sum(-1, keepdim=True).clamp(min=1e-30)
        held = HeldNorm(weight * inverse, shift, centered)
        error = (held(x) - y).abs().max() / y.abs().max().clamp(min=1e-30)
        return held if bool(error <= share) else None


@torch.no_grad()
def _affine_part(norm: Any, like: Tensor) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"], bool]:
    """Weight and bias of a norm, and whether it subtracts the mean; found by running it, not read from attributes."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    width = like.shape[-1]
    signs = torch.ones(width, dtype=dtype, device=like.device)
    signs[1::2] = -1
    zigzags = torch.stack([signs, signs.roll(1)])
    if width % 2:
        zigzags[0, -1] = zigzags[1, 0] = 0  # both rows have mean zero
    probes = 1024 * torch.cat([zigzags, -zigzags, zigzags + 1])  # large enough that the norm's epsilon is negligible
    weights = {name: tensor.to(dtype) for name, tensor in norm.state_dict().items()}
    found = torch.func.functional_call(norm, weights, (probes[:, None],))[:, 0].to(dtype)
    up, down, raised = found.chunk(3)
    unit = zigzags / zigzags.pow(2).mean(-1, keepdim=True).sqrt()
    shift = ((up + down) / 2).mean(0)
    weight = ((up - down) / 2 * unit).sum(0) / unit.pow(2).sum(0)
    return weight, shift, bool((raised - up).abs().max() < 0.1 * weight.abs().max())
