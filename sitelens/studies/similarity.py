"""Similarity of head selections between tasks, with ceiling and floor, and whether it predicts transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import CountOrZero, Seed
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError
from sitelens.evaluation.record import experiment_record
from sitelens.evaluation.result import Result
from sitelens.evaluation.tables import Table
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.registry import SIXTEEN, study
from sitelens.studies.transfer_result import TransferMatrix
from sitelens.tasks import Task, groups_of, load_tasks

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES = ("pearson", "spearman", "jaccard")


@dataclass(frozen=True, eq=False, repr=False)
class HeadSimilarity(Result):
    """Similarity of the head selections of tasks.

    Attributes:
        frame: one row per measure, pair of tasks and pair of training seeds: measure, a, b, seed_a, seed_b, similarity.
            A task is compared with itself under different seeds.
        floor: one row per measure and permutation: measure, permuted ("heads": over all layers; "within layers": each
            layer's set of alphas is kept), similarity.
        tasks, model: names.
        k: heads in each task's top-k set, for Jaccard.
        groups: each task's kind, for figures.
        record: settings, model and tasks behind it.
    """

    kind: ClassVar[str] = "similarity"
    columns: ClassVar[tuple[str, ...]] = ("measure", "a", "b", "seed_a", "seed_b", "similarity")
    frame: pd.DataFrame
    floor: pd.DataFrame
    tasks: tuple[str, ...]
    k: Mapping[str, int]
    model: str
    groups: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @checked
    def matrix(self, measure: str = "pearson") -> pd.DataFrame:
        """Mean similarity over pairs of seeds, tasks by tasks; the diagonal compares seeds (NaN if only one)."""
        rows = self.frame[self.frame["measure"] == _known(measure)]
        means = rows.groupby(["a", "b"])["similarity"].mean()
        values = [[means.get((a, b), means.get((b, a), np.nan)) for b in self.tasks] for a in self.tasks]
        return pd.DataFrame(values, list(self.tasks), list(self.tasks), dtype=float)

    def summary(self) -> pd.DataFrame:
        """Similarity between tasks, ceiling and floors: one row per measure.

        The ceiling is the mean similarity of a task with itself under another seed; floor_heads and floor_layers are
        means over permutations, each with its 97.5% quantile.
        """
        rows = []
        for measure in MEASURES:
            here = self.frame[self.frame["measure"] == measure]
            same = here["a"] == here["b"]
            row = {"measure": measure, "between tasks": here.loc[~same, "similarity"].mean(),
                   "ceiling": here.loc[same, "similarity"].mean()}  # fmt: skip
            for permuted, column in (("heads", "floor_heads"), ("within layers", "floor_layers")):
                null = self.floor[(self.floor["measure"] == measure) & (self.floor["permuted"] == permuted)]
                row |= {column: null["similarity"].mean(), f"{column}_97.5%": null["similarity"].quantile(0.975)}
            rows.append(row)
        return pd.DataFrame(rows)

    def tables(self) -> list[Table]:
        """The summary as a table: one row per measure."""
        cells = self.summary().set_index("measure").map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
        names = {"floor_heads": "floor (heads)", "floor_layers": "floor (within layers)"}
        names |= {f"{name}_97.5%": "97.5% quantile" for name in names}
        caption = f"Similarity of the head selections of {len(self.tasks)} tasks; model {self.model}."
        note = "Ceiling: the same task under another training seed. Floors: heads permuted, mean over permutations."
        return [Table(cells.rename(columns=names), caption, note)]

    def figure(self, title: str | None = None) -> go.Figure:
        """The clustered heatmap of Pearson's r."""
        return self.heatmap("pearson", title)

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames to write as CSV, by the suffix of their file names."""
        return {**super().frames(), "-floor": self.floor}

    def description(self) -> dict[str, Any]:
        """Number of tasks and seeds, and the model, for the repr."""
        seeds = len(set(self.frame["seed_a"]) | set(self.frame["seed_b"]))
        return {"tasks": len(self.tasks), "seeds": seeds, "model": self.model}

    @checked
    def heatmap(self, measure: str = "pearson", title: str | None = None) -> go.Figure:
        """Tasks by tasks in clustered order, with dendrogram; colors fixed to [-1, 1], or [0, 1] for "jaccard"."""
        frame = self.matrix(measure)
        distance = 1 - frame.fillna(0).to_numpy()  # undefined for a constant alpha: counts as 0
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), "average")
        names = [frame.columns[i] for i in leaves_list(tree)]
        label = {"pearson": "Pearson r", "spearman": "Spearman rho", "jaccard": "Jaccard index"}[measure]
        return figures.transfer_heatmap(
            frame.loc[names, names], f"Similarity of heads: {self.model}" if title is None else title, label,
            groups=self.groups or None, tree=tree, axes=("", ""), between="and",
            limits=(0.0, 1.0) if measure == "jaccard" else (-1.0, 1.0),
        )  # fmt: skip


@study(
    "similarity", caption="Similarity of alphas; a task with itself is under another seed.", tasks=SIXTEEN,
)  # fmt: skip
@checked
def head_similarity(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    seeds: Sequence[Seed] = (0, 1),
    k: CountOrZero | None = None,
    config: TrainConfig | None = None,
    embeddings: Mapping[str, TaskEmbedding] | None = None,
    n_permutations: CountOrZero = 1000,
) -> HeadSimilarity:
    """Similarity of the alphas of all pairs of tasks and training seeds: Pearson, Spearman and top-k Jaccard.

    Alphas cluster at 0 and 1, so compare Pearson's r with the other two. The ceiling is the same task under another
    seed; the floor permutes the heads of one of two alphas.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        seeds: training seeds.
        k: heads in each top-k set (default: as many as have alpha > 0.5).
        config: training of alpha (default: the paper's); its seed has no effect.
        embeddings: embeddings by task name (default: `embed_task` of each task).
        n_permutations: permutations behind each floor.

    Raises:
        SitelensError: for fewer than two tasks, a k larger than the number of heads, and as `train_selections`.

    Example:
        >>> similarity = sl.head_similarity([task, "antonym"], model, config=config, n_permutations=10)
        >>> sorted(set(similarity.frame["measure"]))
        ['jaccard', 'pearson', 'spearman']
    """
    loaded, model = load_tasks(tasks), resolve_model(model)
    if len(loaded) < 2:
        raise SitelensError(f"similarity needs at least two tasks, got {len(loaded)}")
    layers, heads, _ = model.shape
    if k is not None and not 0 < k <= layers * heads:
        raise SitelensError(f"k must lie in 1 to {layers * heads}, the number of heads; got {k}")
    results = train_selections(loaded, model, seeds=seeds, config=config, embeddings=embeddings)
    selections = {key: result.selection for key, result in results.items()}
    names = tuple(task.name for task in loaded)
    record = experiment_record(
        "sl.head_similarity", model, loaded, None, "train", seeds=list(seeds), k=k, n_permutations=n_permutations,
        train=asdict(config or TrainConfig()),
    )  # fmt: skip
    return HeadSimilarity(
        _pairs(selections, names, seeds, k), _floor(list(selections.values()), k, n_permutations), names,
        {name: selections[name, seeds[0]].n_selected if k is None else k for name in names}, model.name,
        groups_of(names), record,
    )  # fmt: skip


@checked
def alpha_similarity(
    a: HeadSelection, b: HeadSelection, measure: str = "pearson", k: CountOrZero | None = None
) -> float:
    """Similarity of two alphas over all heads: "pearson" (r), "spearman" (rho) or "jaccard" (index of the top k heads).

    By default, k is the number of heads with alpha > 0.5 in each.

    Raises:
        SitelensError: if their shapes differ, or for an unknown measure.
    """
    if a.alpha.shape != b.alpha.shape:
        raise SitelensError(
            f"selections of shapes {tuple(a.alpha.shape)} and {tuple(b.alpha.shape)} cannot be compared"
        )
    return _compare(_vector(a, _known(measure), k), _vector(b, measure, k), measure)


@checked
def similarity_predicts_transfer(
    similarity: HeadSimilarity, grid: TransferMatrix, *, n_permutations: CountOrZero = 10_000, seed: Seed = 0
) -> pd.DataFrame:
    """Correlation of similarity and transfer: one row per measure, with columns measure, r, p, cells, permutations.

    r correlates similarity with normalized transfer over the off-diagonal cells in which the latter is defined. Cells
    that share a task are not independent, so the two-sided p comes from the quadratic assignment procedure (Krackhardt
    1988): rows and columns of one matrix are permuted together.

    Args:
        n_permutations: permutations behind p.
        seed: fixes the permutations.

    Raises:
        SitelensError: if the two hold different tasks, or fewer than three.

    Example:
        >>> tasks = [task, "antonym", "synonym"]
        >>> similarity = sl.head_similarity(tasks, model, config=config, n_permutations=10)
        >>> grid = sl.transfer_matrix(tasks, model, config=config, n_items=4)
        >>> sl.similarity_predicts_transfer(similarity, grid)["measure"].tolist()
        ['pearson', 'spearman', 'jaccard']
    """
    names = list(grid.matrix.columns)
    if set(names) != set(similarity.tasks):
        raise SitelensError("the similarity and the transfer matrix hold different tasks")
    if len(names) < 3:
        raise SitelensError(f"a correlation over pairs needs at least three tasks, got {len(names)}")
    transfer = grid.normalized().to_numpy()
    rows: list[dict[str, Any]] = []
    for measure in MEASURES:
        r, p, cells = qap(similarity.matrix(measure).loc[names, names].to_numpy(), transfer, n_permutations, seed)
        rows.append({"measure": measure, "r": r, "p": p, "cells": cells, "permutations": n_permutations})
    return pd.DataFrame(rows)


def qap(x: np.ndarray, y: np.ndarray, n_permutations: int = 10_000, seed: int = 0) -> tuple[float, float, int]:
    """Off-diagonal correlation of two square matrices, its two-sided p under joint permutations, and the cells used.

    Cells in which either matrix is NaN are excluded (those of x move with its permutation). r and p are NaN if the
    remaining cells of x or y are constant.
    """
    n = len(x)
    off_diagonal = ~np.eye(n, dtype=bool)
    rng = np.random.default_rng(seed)

    def r(order: np.ndarray) -> tuple[float, int]:
        moved = x[np.ix_(order, order)]
        known = off_diagonal & ~np.isnan(moved) & ~np.isnan(y)
        return _correlation(moved[known], y[known]), int(known.sum())

    observed, cells = r(np.arange(n))
    if np.isnan(observed):
        return observed, observed, cells
    # A permutation with undefined r counts as at least as large.
    as_large = sum(not abs(r(rng.permutation(n))[0]) < abs(observed) - 1e-12 for _ in range(n_permutations))
    return observed, (1 + as_large) / (1 + n_permutations), cells


def _known(measure: str) -> str:
    if measure not in MEASURES:
        raise SitelensError(f"unknown measure {measure!r}; one of {', '.join(MEASURES)}")
    return measure


def _vector(selection: HeadSelection, measure: str, k: int | None) -> np.ndarray:
    """What a measure compares: alpha, its ranks, or membership in the top k."""
    alpha = selection.alpha.flatten().double().numpy()
    if measure == "pearson":
        return alpha
    return rankdata(alpha) if measure == "spearman" else selection.top(k).alpha.flatten().double().numpy()


def _compare(a: np.ndarray, b: np.ndarray, measure: str) -> float:
    if measure == "jaccard":
        either = float(np.maximum(a, b).sum())
        return float(np.minimum(a, b).sum()) / either if either else float("nan")
    return _correlation(a, b)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; NaN if either side is constant (rounding can make its standard deviation nonzero)."""
    if not (a != a[:1]).any() or not (b != b[:1]).any():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _pairs(
    selections: Mapping[tuple[str, int], HeadSelection], names: Sequence[str], seeds: Sequence[int], k: int | None
) -> pd.DataFrame:
    rows = []
    for measure in MEASURES:
        vectors = {key: _vector(selection, measure, k) for key, selection in selections.items()}
        for i, a in enumerate(names):
            for b in names[i:]:
                for seed_a in seeds:
                    for seed_b in seeds:
                        if a == b and seed_a >= seed_b:
                            continue
                        value = _compare(vectors[a, seed_a], vectors[b, seed_b], measure)
                        rows.append((measure, a, b, seed_a, seed_b, value))
    return pd.DataFrame(rows, columns=["measure", "a", "b", "seed_a", "seed_b", "similarity"])


def _floor(selections: Sequence[HeadSelection], k: int | None, n_permutations: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    shape = tuple(selections[0].alpha.shape)
    shuffles: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "heads": rng.permutation,
        "within layers": lambda vector: rng.permuted(vector.reshape(shape), axis=1).flatten(),
    }
    rows = []
    for measure in MEASURES:
        vectors = [_vector(selection, measure, k) for selection in selections]
        for permuted, shuffle in shuffles.items():
            for _ in range(n_permutations):
                i, j = rng.choice(len(vectors), 2, replace=False)
                rows.append((measure, permuted, _compare(vectors[i], shuffle(vectors[j]), measure)))
    return pd.DataFrame(rows, columns=["measure", "permuted", "similarity"])
