"""Ablation of heads, as a condition: patching with zero or a mean as the source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.schema import conform, unpacked
from sitelens.checks.values import CountOrZero
from sitelens.conditions.base import Patch, Positions, Scope
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.patching import HeadPatch
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError
from sitelens.models.heads import Heads, head_pairs, parsed_heads
from sitelens.models.model import Model, ModelLike, check_fit

Kind = Literal["zero", "mean"]


@checked
@dataclass(frozen=True, eq=False)
class Ablate(HeadPatch):
    """A condition in which the z of some heads is replaced by zero, or by a mean over other prompts.

    The same edit as `PatchHeads`, from another source: z <- (1 - m) z + m s, with m = 1 at `heads` and s = 0 or
    `reference`.

    Attributes:
        heads: (10, 6) or "L10H6", one or several, or a boolean mask `[layer head]`; for a HeadSelection, m is its
            alpha.
        kind: "zero" or "mean".
        reference: for "mean", a task embedding (from `embed_task`) or a tensor `[layer head d_head]`.
        positions: "last" for the last prompt token only, "all" for every position of the prompt.
        n_shots: number of demonstrations in the prompt.
        scope: "prompt", or "generation" to act at each decoding step as well (default: "generation" if `positions` is
            "all", else "prompt").

    Raises:
        SitelensError: for invalid heads, kind, reference or positions.
    """

    heads: Heads | HeadSelection
    kind: Kind = "zero"
    reference: TaskEmbedding | Float[Tensor, "layer head d_head"] | None = None
    positions: Positions = "last"
    n_shots: CountOrZero = 0
    scope: Scope | None = None  # type: ignore[assignment] # None only until __post_init__

    def __post_init__(self) -> None:
        if self.scope is None:
            object.__setattr__(self, "scope", "generation" if self.positions == "all" else "prompt")
        if (self.kind == "mean") != (self.reference is not None):
            raise SitelensError(
                "mean ablation needs a reference: Ablate(heads, 'mean', sl.embed_task(task, model))"
                if self.reference is None
                else "zero ablation takes no reference: write kind='mean'"
            )
        if not isinstance(self.reference, TaskEmbedding | Tensor | None):
            raise SitelensError(
                "the reference is a TaskEmbedding, as sl.embed_task(task, model) makes it, or a tensor "
                f"[layer head d_head], not {type(self.reference).__name__}"
            )
        if not isinstance(self.heads, HeadSelection | Tensor):
            object.__setattr__(self, "heads", tuple(parsed_heads(self.heads)))

    def head_patch(self, model: ModelLike) -> Patch:
        layers, heads, d_head = Model.of(model).shape
        if isinstance(self.heads, HeadSelection):
            self.heads.check_fits(model)
            mask = self.heads.alpha
        else:
            mask = torch.zeros(layers, heads)
            for layer, head in head_pairs(self.heads, layers, heads):
                mask[layer, head] = 1
        if isinstance(self.reference, TaskEmbedding):
            self.reference.check_fits(model)
            return Patch(mask, self.reference.mean_z)
        if self.reference is None:
            return Patch(mask, torch.zeros(layers, heads, d_head))
        check_fit("the reference of an ablation", None, tuple(self.reference.shape), model)
        return Patch(mask, self.reference)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON that describe the heads and the reference, for `from_state`."""
        if isinstance(self.heads, Tensor):
            return replace(self, heads=parsed_heads(self.heads)).state()
        return super().state()

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Ablate:
        """The ablation that `state` described.

        Raises:
            SitelensError: if a field does not match its declared type; the message names the field.
        """
        if "heads.alpha" not in tensors:
            conform(meta.get("heads"), tuple[tuple[int, int], ...], "heads")
        return unpacked(cls, meta, tensors, cls.__name__)
