"""Prompting, without and with demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sitelens.checks.arguments import checked
from sitelens.checks.values import CountOrZero
from sitelens.conditions.base import Condition, Patch
from sitelens.engine.forward import Hook
from sitelens.errors import SitelensError
from sitelens.models.model import Model, ModelLike


@checked
@dataclass(frozen=True, eq=False)
class FewShot(Condition):
    """The model as it is, with `n_shots` demonstrations in the prompt, drawn anew for each item."""

    positions = "last"
    n_shots: CountOrZero = 10

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        return []

    def patch(self, model: ModelLike) -> Patch:
        layers, heads, d_head = Model.of(model).shape
        return Patch(torch.zeros(layers, heads), torch.zeros(layers, heads, d_head))


@checked
@dataclass(frozen=True, eq=False)
class ZeroShot(FewShot):
    """The model as it is, with no demonstration."""

    n_shots: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.n_shots != 0:
            raise SitelensError(f"ZeroShot has no demonstrations: use FewShot({self.n_shots})")
