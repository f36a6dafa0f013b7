"""Patching: each head's z is mixed with a task embedding."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.schema import unpacked
from sitelens.checks.values import CountOrZero
from sitelens.conditions.base import Condition, Patch, Positions, Scope
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.forward import Hook, Mixing
from sitelens.errors import SitelensError
from sitelens.models.model import ModelLike


class HeadPatch(Condition):
    """A condition that mixes vectors into the z of masked heads, at the last prompt token or at all positions."""

    positions: Positions = "last"

    @abstractmethod
    def head_patch(self, model: ModelLike) -> Patch:
        """The mask and the vectors.

        Raises:
            SitelensError: if they were made for another model.
        """

    def patch(self, model: ModelLike) -> Patch | None:
        patch = self.head_patch(model)
        return patch if self.positions == "last" else None

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        return self.head_patch(model).edit(model, everywhere=self.positions == "all").hooks()


@checked
@dataclass(frozen=True, eq=False)
class PatchHeads(HeadPatch):
    """Mixes the task embedding into each head's z at the last prompt token: z <- (1 - alpha) z + alpha mean_z.

    Soft, hard, random, high-alpha, low-alpha, task-agnostic and cross-task patching differ only in `selection`
    and `embedding`.

    Attributes:
        selection: alpha, `[layer head]`.
        embedding: mean_z, `[layer head d_head]`.
        mixing: "convex" (as published), or "additive": z <- z + alpha mean_z.
        n_shots: number of demonstrations in the prompt.
        scope: "prompt" (as published), or "generation" to act at each decoding step as well.

    Raises:
        SitelensError: if selection and embedding come from different models.

    Source:
        SITE (arXiv 2507.20906), step 3.
    """

    positions = "last"
    selection: HeadSelection
    embedding: TaskEmbedding
    mixing: Mixing = "convex"
    n_shots: CountOrZero = 0
    scope: Scope = "prompt"

    def __post_init__(self) -> None:
        shapes = tuple(self.selection.alpha.shape), tuple(self.embedding.mean_z.shape)
        made_for = {self.selection.model, self.embedding.model} - {None}
        origin = self.selection.origin
        one_model = len(made_for) < 2 or (origin is not None and origin.same_model(self.embedding.origin))
        if shapes[0] != shapes[1][:2] or not one_model:
            raise SitelensError(
                f"the selection of {self.selection.task!r} {shapes[0]} and the embedding of {self.embedding.task!r} "
                f"{shapes[1]} come from different models"
            )

    def head_patch(self, model: ModelLike) -> Patch:
        self.selection.check_fits(model)
        self.embedding.check_fits(model)
        return Patch(self.selection.alpha, self.embedding.mean_z, self.mixing)

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> PatchHeads:
        """The condition that `state` described.

        Raises:
            SitelensError: if a field does not match its declared type; the message names the field.
        """
        older = {"alpha": "selection.alpha", "mean_z": "embedding.mean_z"}  # names in the first edition's files
        return unpacked(cls, meta, {older.get(name, name): tensor for name, tensor in tensors.items()}, cls.__name__)
