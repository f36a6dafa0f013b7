"""Result of `transfer_matrix`: accuracy of every target task with the heads or embedding of every source task."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.schema import packed
from sitelens.checks.values import Share
from sitelens.errors import SitelensError
from sitelens.evaluation.result import Result
from sitelens.evaluation.tables import Table
from sitelens.figures.style import accuracy_label
from sitelens.models.provenance import Origin
from sitelens.store.artifact import Artifact
from sitelens.store.kinds import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go

Swap = Literal["heads", "embedding", "both"]
SWAPPED: dict[Swap, str] = {"heads": "heads", "embedding": "embedding", "both": "heads and the embedding"}
SMALLEST_GAIN = 0.05  # smallest own gain (accuracy) for which a share of it is defined


@dataclass(frozen=True, eq=False, repr=False)
class TransferMatrix(Result):
    """Accuracy of every target task with heads, embedding or both of every source task.

    Attributes:
        matrix: accuracy (shares); one row per source, one column per target.
        zero_shot: zero-shot accuracy per target.
        n: test items per target.
        swap: what comes from the source: "heads" (alpha), "embedding" or "both".
        metric, model: names.
        groups: each task's kind, for figures.
        origin: the model and the prompts behind it, if known.
        record: settings, model and tasks behind it.
    """

    kind: ClassVar[str] = str(Kind.TRANSFER)
    matrix: pd.DataFrame
    zero_shot: pd.Series
    n: pd.Series
    swap: Swap
    metric: str
    model: str
    groups: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:  # type: ignore[override]
        """One row per cell: source, target, accuracy, zero_shot, own, n."""
        rows = self.matrix.rename_axis("source").reset_index().melt("source", var_name="target", value_name="accuracy")
        facts = {"zero_shot": self.zero_shot, "own": self.own, "n": self.n}
        return rows.assign(**{name: rows["target"].map(values) for name, values in facts.items()})

    @property
    def own(self) -> pd.Series:
        """Accuracy of each task with its own heads and embedding (the diagonal)."""
        return pd.Series({name: self.matrix.loc[name, name] for name in self.matrix.columns}, dtype=float)

    def normalized(self) -> pd.DataFrame:
        """Each cell as a share of the target's own gain over zero-shot; NaN if that gain is below 5 points."""
        gain = self.own - self.zero_shot
        return self.matrix.sub(self.zero_shot, axis=1).div(gain.where(gain >= SMALLEST_GAIN), axis=1)

    def clustered(self) -> TransferMatrix:
        """The matrix with similar tasks next to each other: rows and columns in the order of the leaves of `tree()`."""
        names = [self.matrix.columns[i] for i in leaves_list(self.tree())]
        return replace(self, matrix=self.matrix.loc[names, names], zero_shot=self.zero_shot[names], n=self.n[names])

    def tree(self) -> np.ndarray:
        """A scipy linkage of the tasks: average linkage on 1 - normalized transfer, averaged over both directions.

        Normalized transfer is clipped to [0, 1]; undefined values (own gain below 5 points) count as 0.
        """
        share = self.normalized().fillna(0).clip(0, 1).to_numpy()
        distance = 1 - (share + share.T) / 2
        np.fill_diagonal(distance, 0)
        return linkage(squareform(distance), "average")

    @checked
    def clusters(self, share: Share = 0.5) -> list[list[str]]:
        """Clusters of tasks: the branches of `tree()`, cut where this share of the gain is kept on average.

        Every task is in exactly one cluster. The largest come first; tasks, and clusters of equal size, are in the
        order of the tree.

        Args:
            share: between 0 and 1; higher gives more, smaller clusters.

        Raises:
            SitelensError: for a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise SitelensError(f"share must lie in [0, 1], got {share}")
        labels = fcluster(self.tree(), 1 - share, "distance")
        found: dict[int, list[str]] = {}
        for i in leaves_list(self.tree()):
            found.setdefault(int(labels[i]), []).append(str(self.matrix.columns[i]))
        return sorted(found.values(), key=len, reverse=True)

    def summary(self) -> pd.DataFrame:
        """How well each task works as target and as source: one row per task.

        Columns: task, n, zero_shot, own (accuracy with its own heads and embedding), as_target (share of its own gain
        reached with what other tasks provide, mean over them), as_source (mean share of the other tasks' gains reached
        with what it provides). Undefined shares are excluded from the means.
        """
        share = self.normalized()
        others = share.mask(np.eye(len(share), dtype=bool))
        facts = {"n": self.n, "zero_shot": self.zero_shot, "own": self.own, "as_target": others.mean(axis=0),
                 "as_source": others.mean(axis=1)}  # fmt: skip
        names = list(self.matrix.columns)
        return pd.DataFrame({"task": names, **{name: values[names].to_list() for name, values in facts.items()}})

    def tables(self) -> list[Table]:
        """Accuracy in percent: one row per source, one column per target, zero-shot accuracy in the last row."""
        rows = pd.concat([self.matrix, self.zero_shot.rename("zero-shot").to_frame().T])
        cells = rows.map(lambda share: f"{100 * share:.0f}").rename_axis(f"{self.swap} of")
        metric, least, most = accuracy_label(self.metric), int(self.n.min()), int(self.n.max())
        caption = (
            f"{metric} in percent of each target task (columns) with the {SWAPPED[self.swap]} of each source "
            f"task (rows); model {self.model}."
        )
        return [Table(cells, caption, f"Test items per target: {least if least == most else f'{least} to {most}'}.")]

    def figure(self, title: str | None = None) -> go.Figure:
        """The clustered heatmap of accuracy."""
        return self.heatmap(title)

    def description(self) -> dict[str, Any]:
        """Number of tasks, swap, metric and model, for the repr."""
        return {"tasks": len(self.matrix), "swap": self.swap, "metric": self.metric, "model": self.model}

    @checked
    def heatmap(
        self,
        title: str | None = None,
        *,
        values: Literal["accuracy", "share"] = "accuracy",
        order: Literal["clustered", "given"] = "clustered",
    ) -> go.Figure:
        """Sources by targets, colors fixed to [0, 1], with the tasks' kinds at the side and numbers on hover.

        Args:
            title: title of the figure (default: swap and model).
            values: "accuracy", or "share" for `normalized()`, in which hard targets are as visible as easy ones
                (undefined cells are empty).
            order: "clustered", with the dendrogram above, or "given".
        """
        title = f"Transfer of {self.swap}: {self.model}" if title is None else title
        shown = self.clustered() if order == "clustered" else self
        flat = shown.matrix * 0
        hover = {
            "share of own gain": shown.normalized(),
            "zero-shot": flat + shown.zero_shot,
            "own heads": flat + shown.own,
        }
        known = [name for name in shown.matrix.columns if name in self.groups]
        axes = {"heads": "Source of the heads", "embedding": "Source of the embedding"}
        cells, label = shown.matrix, accuracy_label(self.metric)
        if values == "share":
            cells, label = hover.pop("share of own gain"), "share of the target's own gain"
            hover = {"accuracy": shown.matrix, **hover}
        return figures.transfer_heatmap(
            cells, title, label, groups=self.groups if known else None,
            tree=self.tree() if order == "clustered" else None, hover=hover,
            axes=(axes.get(self.swap, "Source of heads and embedding"), "Target task"),
        )  # fmt: skip

    def artifact(self) -> Artifact:
        """The artifact that is saved as NAME.safetensors."""
        saved = _Saved(
            torch.tensor(self.matrix.to_numpy(float)), torch.tensor(self.zero_shot.to_numpy(float)),
            torch.tensor(self.n.to_numpy(int)), tuple(self.matrix.columns), self.swap, self.metric, self.model,
            dict(self.groups), self.origin, dict(self.record),
        )  # fmt: skip
        return Artifact(self.kind, {}, *packed(saved))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> TransferMatrix:
        """The result that an artifact holds."""
        saved = artifact.made(_Saved)
        names = list(saved.tasks)
        matrix = pd.DataFrame(saved.accuracy.numpy(), index=names, columns=names)
        facts = {name: getattr(saved, name) for name in ("swap", "metric", "model", "groups", "origin")}
        return TransferMatrix(
            matrix, pd.Series(saved.zero_shot.numpy(), names), pd.Series(saved.n.numpy(), names), **facts,
            record=saved.record or {},
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Saved:
    """A transfer matrix in the form in which it is saved."""

    accuracy: Float[Tensor, "source target"]
    zero_shot: Float[Tensor, " target"]
    n: Int[Tensor, " target"]
    tasks: tuple[str, ...]
    swap: Swap
    metric: str
    model: str
    groups: dict[str, str]
    origin: Origin | None = None
    record: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if tuple(self.accuracy.shape) != (len(self.tasks),) * 2 or len(set(self.tasks)) < len(self.tasks):
            raise SitelensError(
                f"accuracy {tuple(self.accuracy.shape)} is not that of {len(self.tasks)} different tasks"
            )
        for name in ("accuracy", "zero_shot"):
            if getattr(self, name).dtype != torch.float64:
                raise SitelensError(f"{name} must be float64, not {getattr(self, name).dtype}")
            if not bool(((getattr(self, name) >= 0) & (getattr(self, name) <= 1)).all()):
                raise SitelensError(f"{name} must lie between 0 and 1")
        if bool((self.n < 1).any()):
            raise SitelensError("n must be at least 1")
