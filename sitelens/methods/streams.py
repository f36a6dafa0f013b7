"""Conditions at the residual stream: vectors added after layers, or a layer's state replaced, at the last token."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.conditions import Condition, Steps
from sitelens.defaults import SitelensError
from sitelens.forward import Hook
from sitelens.models import Model, check_fit, model_name


def stream_hook(layer: int) -> str:
    """The residual stream after a layer, `[batch pos d_model]`."""
    return f"blocks.{layer}.hook_resid_post"


@dataclass(frozen=True, eq=False)
class _StreamCondition(Condition):
    """Vectors for the residual stream after some layers; `model` is the fingerprint of the model they are for."""

    positions = "last"
    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    model: str | None = None
    steps: Steps = "every"
    n_trained: int = 0  # numbers that were trained for it

    def fwd_hooks(self, model: Model) -> list[Hook]:
        check_stream(f"a {type(self).__name__}", self.model, self.vectors.shape[1], model)
        return [
            (stream_hook(layer), functools.partial(self._act, vector=vector))
            for layer, vector in zip(self.layers, self.vectors, strict=True)
        ]

    def _act(self, x: Tensor, hook: Any = None, *, vector: Tensor) -> Tensor:
        last = self.changed(x[:, -1:], vector.to(x.device))
        return torch.cat([x[:, :-1], last.to(x.dtype)], dim=1)

    @abstractmethod
    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        """What becomes of the last token's state `[batch 1 d_model]`."""


@dataclass(frozen=True, eq=False)
class AddToStream(_StreamCondition):
    """x <- x + vector at the last token, after each of `layers` (function vectors; learnable task vectors)."""

    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        return last.to(vector.dtype) + vector


@dataclass(frozen=True, eq=False)
class ReplaceStream(_StreamCondition):
    """x <- vector at the last token, after each of `layers` (task vectors)."""

    steps: Steps = "prompt"

    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        return vector.expand(last.shape)


def check_stream(what: str, made_for: str | None, width: int, model: Model) -> None:
    """Raise SitelensError unless vectors of this width, made for the model of this fingerprint, fit `model`."""
    if width != model.cfg.d_model:
        raise SitelensError(
            f"{what} has vectors of {width} entries, {model_name(model)} has d_model {model.cfg.d_model}"
        )
    check_fit(what, made_for, (), model)
