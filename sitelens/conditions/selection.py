"""Head selections: alpha, one number in [0, 1] for every head, and everything derived from it."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.schema import packed
from sitelens.checks.values import Seed, Share, tensor
from sitelens.errors import SitelensError
from sitelens.models.model import ModelLike, check_fit
from sitelens.models.provenance import Origin, model_label
from sitelens.store.artifact import Artifact
from sitelens.store.kinds import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go

    Head = tuple[int, int] | str  # (10, 6), "L10H6" or "10.6"
    Heads = Iterable[Head] | Head | Bool[Tensor, "layer head"] | pd.DataFrame
else:
    Head = Heads = Any  # whatever is given is checked below, numpy's numbers included
HEAD = re.compile(r"L?(\d+)(?:H|\.)(\d+)", re.IGNORECASE)


def head_pairs(heads: Heads, layers: int, width: int) -> list[tuple[int, int]]:
    """Heads of a model with so many layers, and heads in each, as (layer, head), in the order given.

    Raises:
        SitelensError: as `parsed_heads`, or if the model has no such head.
    """
    mask = _as_mask(heads)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (layers, width)):
        raise SitelensError(
            f"a mask of heads must be boolean of shape {(layers, width)}, not {mask.dtype} {tuple(mask.shape)}"
        )
    pairs = parsed_heads(heads)
    for layer, head in pairs:
        if not (0 <= layer < layers and 0 <= head < width):
            raise SitelensError(f"there is no head ({layer}, {head}): layers 0 to {layers - 1}, heads 0 to {width - 1}")
    return pairs


def parsed_heads(heads: Heads) -> list[tuple[int, int]]:
    """Heads as (layer, head), in the order given.

    A head is (10, 6), "L10H6" or "10.6". Heads are a head, any number of them (in one text with commas or spaces
    between them), a boolean mask `[layer head]`, or a DataFrame with the columns layer and head.

    Raises:
        SitelensError: if they are something else.
    """
    given: Any = heads
    if (mask := _as_mask(heads)) is not None:
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise SitelensError(f"a mask of heads must be boolean [layer head], not {mask.dtype} {tuple(mask.shape)}")
        given = mask.nonzero().tolist()
    elif isinstance(heads, pd.DataFrame):
        if not {"layer", "head"} <= set(heads.columns):
            columns = ", ".join(map(str, heads.columns))
            raise SitelensError(f"a table of heads needs the columns layer and head, it has {columns}")
        given = list(zip(heads["layer"], heads["head"], strict=True))
    elif isinstance(heads, Tensor | np.ndarray):
        given = heads.tolist()
    elif isinstance(heads, str):
        given = heads.replace(",", " ").split()
    elif isinstance(heads, tuple) and len(heads) == 2 and all(map(_is_number, heads)):
        given = [heads]
    if not isinstance(given, Iterable):
        raise SitelensError(f"heads are pairs (layer, head) or names such as L10H6, not {heads!r}")
    return [_pair(head) for head in given]


def _as_mask(heads: Any) -> Tensor | None:
    """What should be a boolean mask, as a tensor; None where heads are given otherwise."""
    if not isinstance(heads, Tensor | np.ndarray):
        return None
    mask = torch.as_tensor(heads)
    return mask if mask.dtype == torch.bool or mask.ndim != 2 or mask.shape[1] != 2 else None


def _pair(head: Any) -> tuple[int, int]:
    """One head, however it is written."""
    match = HEAD.fullmatch(head.strip()) if isinstance(head, str) else None
    if match:
        return int(match[1]), int(match[2])
    try:
        if isinstance(head, str):
            raise ValueError
        layer, place = head
        if _is_number(layer) and _is_number(place) and int(layer) == layer and int(place) == place:
            return int(layer), int(place)
    except (TypeError, ValueError):
        pass
    raise SitelensError(f"a head is a pair (layer, head) or a name such as L10H6, not {head!r}")


def _is_number(value: Any) -> bool:
    """Whether it is one number, numpy's and torch's included (whole floats come out of DataFrames)."""
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return isinstance(value, (float, np.floating)) and bool(np.isfinite(value))
    return True


@checked
@dataclass(frozen=True, eq=False)
class HeadSelection:
    """How much of each head's output is replaced by the task embedding.

    alpha: in [0, 1]; lists and arrays become a tensor.
    task: the task it was found for; model: the model's fingerprint (None: any model of this shape).
    provenance: how it came to be, in words; origin: the model, task and prompts behind it, where they are known.
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
        """A few words for a repr: task, model, shape, and how many heads have alpha > 0.5."""
        layers, heads = self.alpha.shape
        model = model_label(self.origin, self.model)
        return f"{self.task!r}, {model}, {layers} layers x {heads} heads, {self.n_selected} on"

    @property
    def n_heads(self) -> int:
        """How many heads the model has in all."""
        return self.alpha.numel()

    @property
    def n_selected(self) -> int:
        """The number of heads with alpha > 0.5."""
        return int((self.alpha > 0.5).sum())

    @property
    def fraction_saturated(self) -> float:
        """The share of heads whose alpha is within 0.1 of 0 or 1."""
        return ((self.alpha <= 0.1) | (self.alpha >= 0.9)).double().mean().item()

    @checked
    def hard(self, threshold: Share = 0.5) -> HeadSelection:
        """1 where alpha > threshold, else 0."""
        return self._derived((self.alpha > threshold).to(self.alpha.dtype), f"hard({threshold:g})")

    @checked
    def top(self, k: int | None = None) -> HeadSelection:
        """1 at the k heads of highest alpha, else 0; ties go to the lower (layer, head)."""
        k = self._checked(k)
        return self._binary(self.ranking()[:k], f"top({k})")

    @checked
    def bottom(self, k: int | None = None) -> HeadSelection:
        """1 at the k heads of lowest alpha, else 0; ties go to the lower (layer, head)."""
        k = self._checked(k)
        order = torch.sort(self.alpha.flatten(), stable=True).indices.tolist()
        return self._binary(self._pairs(order[:k]), f"bottom({k})")

    @checked
    def random(self, k: int | None = None, seed: Seed = 0) -> HeadSelection:
        """1 at k heads drawn uniformly, else 0. The draw depends on seed, k and the number of heads only."""
        k = self._checked(k)
        layers, heads = self.alpha.shape
        drawn = random.Random(f"sitelens/heads/{layers}x{heads}/{k}/{seed}").sample(range(self.n_heads), k)
        return self._binary(self._pairs(drawn), f"random({k}, seed={seed})")

    def keep(self, heads: Heads) -> HeadSelection:
        """alpha as it is at the given heads, and 0 elsewhere; heads are (10, 6) or "L10H6", or a boolean mask."""
        mask = self._mask(heads)
        return self._derived(torch.where(mask, self.alpha, 0.0), f"keep({int(mask.sum())} heads)")

    def without(self, heads: Heads) -> HeadSelection:
        """0 at the given heads, and alpha as it is elsewhere."""
        mask = self._mask(heads)
        return self._derived(torch.where(mask, 0.0, self.alpha), f"without({int(mask.sum())} heads)")

    def ones(self) -> HeadSelection:
        """Every head at 1."""
        return self._derived(torch.ones_like(self.alpha), "ones")

    def ranking(self) -> list[tuple[int, int]]:
        """All heads as (layer, head), highest alpha first; ties by (layer, head)."""
        return self._pairs(torch.sort(self.alpha.flatten(), descending=True, stable=True).indices.tolist())

    @staticmethod
    def mean(selections: Sequence[HeadSelection]) -> HeadSelection:
        """The mean alpha of several selections of one model.

        Raises:
            SitelensError: if there is none, or models or shapes differ.
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
        """One row a head: layer, head, alpha."""
        index = [(layer, head) for layer in range(self.alpha.shape[0]) for head in range(self.alpha.shape[1])]
        return pd.DataFrame(index, columns=["layer", "head"]).assign(alpha=self.alpha.flatten().tolist())

    def heatmap(self, title: str | None = None) -> go.Figure:
        """Layer by head, colors fixed to [0, 1], the numbers in the hover."""
        title = title if title is not None else f"Head selection: {self.task}" if self.task else "Head selection"
        return figures.alpha_heatmap(self.alpha.detach().double().cpu().numpy(), title=title)

    def check_fits(self, model: ModelLike) -> None:
        """Raise SitelensError unless this selection was made for `model`."""
        check_fit(f"the selection of {self.task!r}", self.model, tuple(self.alpha.shape), model, self.origin)

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file with all that is known of it."""
        return Artifact(Kind.SELECTION, {}, *packed(self)).save(path)

    @staticmethod
    def load(path: str | Path) -> HeadSelection:
        """Read a saved selection, or one that lies in the cache.

        Raises:
            SitelensError: if there is no such file, or it is damaged or holds something else.
        """
        return HeadSelection.of(Artifact.load(path, Kind.SELECTION))

    @staticmethod
    def of(artifact: Artifact) -> HeadSelection:
        """The selection that an artifact holds; the cache's also hold a history, and name task and model in their spec.

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
