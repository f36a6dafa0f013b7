"""Head selections: alpha, one number in [0, 1] per head, and everything derived from it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.schema import packed
from sitelens.checks.values import Seed, Share, tensor
from sitelens.errors import SitelensError
from sitelens.models.heads import Heads, head_pairs, per_head
from sitelens.models.model import ModelLike, check_fit
from sitelens.models.provenance import Origin, model_label
from sitelens.store.artifact import Artifact
from sitelens.store.kinds import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go

SATURATED = 0.1  # distance to 0 or 1 up to which an alpha counts as saturated


def saturated(alpha: Float[Tensor, "*heads"]) -> Bool[Tensor, "*heads"]:
    """Which alphas are within 0.1 of 0 or 1."""
    return (alpha <= SATURATED) | (alpha >= 1 - SATURATED)


@checked
@dataclass(frozen=True, eq=False)
class HeadSelection:
    """Alpha: how much of each head's z is replaced by the task embedding.

    Attributes:
        alpha: `[layer head]`, in [0, 1]; lists and arrays are converted to a tensor.
        task: name of the task it was trained for.
        model: the model's fingerprint (None: any model of this shape).
        provenance: how it was obtained, in words.
        origin: the model, task and prompts that it was computed from, if known.

    Raises:
        SitelensError: if alpha is not a `[layer head]` tensor of numbers in [0, 1].
    """

    alpha: Float[Tensor, "layer head"]
    task: str = ""
    model: str | None = None
    provenance: str = "given"
    origin: Origin | None = None

    def __post_init__(self) -> None:
        alpha = tensor("alpha", self.alpha, "layer head")
        object.__setattr__(self, "alpha", alpha)
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise SitelensError(
                f"alpha must lie in [0, 1] and be a number; it spans {alpha.min():.3g} to {alpha.max():.3g}"
            )

    def __repr__(self) -> str:
        return f"HeadSelection({self.label()}, {self.provenance})"

    def label(self) -> str:
        """A short text for a repr: task, model, shape, and the number of heads with alpha > 0.5."""
        layers, heads = self.alpha.shape
        model = model_label(self.origin, self.model)
        return f"{self.task!r}, {model}, {layers} layers x {heads} heads, {self.n_selected} on"

    @property
    def n_heads(self) -> int:
        """The total number of heads of the model."""
        return self.alpha.numel()

    @property
    def n_selected(self) -> int:
        """The number of heads with alpha > 0.5."""
        return int((self.alpha > 0.5).sum())

    @property
    def fraction_saturated(self) -> float:
        """The fraction of heads whose alpha is within 0.1 of 0 or 1."""
        return saturated(self.alpha).double().mean().item()

    @checked
    def hard(self, threshold: Share = 0.5) -> HeadSelection:
        """The hard selection: 1 where alpha > threshold, else 0."""
        return self._derived((self.alpha > threshold).to(self.alpha.dtype), f"hard({threshold:g})")

    @checked
    def top(self, k: int | None = None) -> HeadSelection:
        """1 at the k (default: n_selected) heads with the highest alpha, else 0; ties go to the lower (layer, head)."""
        k = self._checked(k)
        return self._binary(self.ranking()[:k], f"top({k})")

    @checked
    def bottom(self, k: int | None = None) -> HeadSelection:
        """1 at the k (default: n_selected) heads with the lowest alpha, else 0; ties go to the lower (layer, head)."""
        k = self._checked(k)
        order = torch.sort(self.alpha.flatten(), stable=True).indices.tolist()
        return self._binary(self._pairs(order[:k]), f"bottom({k})")

    @checked
    def random(self, k: int | None = None, seed: Seed = 0) -> HeadSelection:
        """1 at k (default: n_selected) heads drawn uniformly at random, else 0.

        The draw depends only on seed, k and the numbers of layers and heads.
        """
        k = self._checked(k)
        layers, heads = self.alpha.shape
        drawn = random.Random(f"sitelens/heads/{layers}x{heads}/{k}/{seed}").sample(range(self.n_heads), k)
        return self._binary(self._pairs(drawn), f"random({k}, seed={seed})")

    def keep(self, heads: Heads) -> HeadSelection:
        """Alpha unchanged at the given heads, and 0 elsewhere; heads are (10, 6) or "L10H6", or a boolean mask."""
        mask = self._mask(heads)
        return self._derived(torch.where(mask, self.alpha, 0.0), f"keep({int(mask.sum())} heads)")

    def without(self, heads: Heads) -> HeadSelection:
        """0 at the given heads, and alpha unchanged elsewhere; heads as for `keep`."""
        mask = self._mask(heads)
        return self._derived(torch.where(mask, 0.0, self.alpha), f"without({int(mask.sum())} heads)")

    def ones(self) -> HeadSelection:
        """A selection with alpha 1 at every head."""
        return self._derived(torch.ones_like(self.alpha), "ones")

    def ranking(self) -> list[tuple[int, int]]:
        """All heads as (layer, head), highest alpha first; ties in the order of (layer, head)."""
        return self._pairs(torch.sort(self.alpha.flatten(), descending=True, stable=True).indices.tolist())

    @staticmethod
    def mean(selections: Sequence[HeadSelection]) -> HeadSelection:
        """The mean alpha of several selections of one model.

        Raises:
            SitelensError: if there are none, or models or shapes differ.
        """
        if not selections:
            raise SitelensError("the mean of no selections: give at least one")
        if len({(s.model, tuple(s.alpha.shape)) for s in selections}) > 1:
            raise SitelensError("selections of different models have no mean")
        tasks = "+".join(dict.fromkeys(s.task for s in selections))
        alpha = torch.stack([s.alpha for s in selections]).mean(0).clamp(0, 1)
        origin = Origin.shared(s.origin for s in selections)
        return HeadSelection(alpha, tasks, selections[0].model, f"mean of {len(selections)} selections", origin)

    def frame(self) -> pd.DataFrame:
        """A DataFrame with one row per head: layer, head, alpha."""
        return per_head(self.alpha, "alpha")

    def heatmap(self, title: str | None = None) -> go.Figure:
        """A heatmap of alpha, layers by heads, with colors fixed to [0, 1] and the numbers in the hover text."""
        title = title if title is not None else f"Head selection: {self.task}" if self.task else "Head selection"
        return figures.alpha_heatmap(self.alpha.detach().double().cpu().numpy(), title=title)

    def check_fits(self, model: ModelLike) -> None:
        """Raise SitelensError if this selection was made for another model than `model`."""
        check_fit(f"the selection of {self.task!r}", self.model, tuple(self.alpha.shape), model, self.origin)

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file, with all attributes; returns its path."""
        return Artifact(Kind.SELECTION, {}, *packed(self)).save(path)

    @staticmethod
    def load(path: str | Path) -> HeadSelection:
        """The selection saved in a file, also in a file of the cache.

        Raises:
            SitelensError: if there is no such file, or it is damaged or holds something else.
        """
        return HeadSelection.of(Artifact.load(path, Kind.SELECTION))

    @staticmethod
    def of(artifact: Artifact) -> HeadSelection:
        """The selection in an artifact. Those of the cache also hold a history, and have task and model in their spec.

        Raises:
            SitelensError: if it holds something else.
        """
        own = {name: artifact.spec[name] for name in ("task", "model") if name in artifact.spec}
        alpha = {name: tensor for name, tensor in artifact.tensors.items() if name != "history" or not own}
        return replace(artifact, tensors=alpha).made(HeadSelection, **own)

    def _derived(self, alpha: Tensor, how: str) -> HeadSelection:
        return replace(self, alpha=alpha, provenance=f"{self.provenance} | {how}")

    def _binary(self, heads: Iterable[tuple[int, int]], how: str) -> HeadSelection:
        return self._derived(self._mask(heads).to(self.alpha.dtype), how)

    def _pairs(self, flat: Iterable[int]) -> list[tuple[int, int]]:
        return [divmod(i, self.alpha.shape[1]) for i in flat]

    def _checked(self, k: int | None) -> int:
        k = self.n_selected if k is None else k
        if not 0 <= k <= self.n_heads:
            raise SitelensError(f"k must lie in 0 to {self.n_heads}, the number of heads; got {k}")
        return k

    def _mask(self, heads: Heads) -> Tensor:
        mask = torch.zeros_like(self.alpha, dtype=torch.bool)
        for layer, head in head_pairs(heads, *self.alpha.shape):
            mask[layer, head] = True
        return mask
