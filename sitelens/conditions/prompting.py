"""Zero-shot and few-shot prompting, as conditions."""

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
    """The unedited model, with `n_shots` demonstrations in the prompt, drawn separately for each item."""

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
    """The unedited model, without demonstrations."""

    n_shots: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.n_shots != 0:
            raise SitelensError(f"ZeroShot has no demonstrations: use FewShot({self.n_shots})")
