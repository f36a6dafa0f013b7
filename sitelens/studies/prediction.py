"""Whether similarity of heads predicts transfer, pair of tasks by pair of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.errors import warned_once
from sitelens.figures import Figure
from sitelens.methods.site.config import TrainConfig
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Options, Sample, some_tasks
from sitelens.studies.registry import SIXTEEN, study
from sitelens.studies.similarity import head_similarity, similarity_predicts_transfer
from sitelens.studies.transfer import transfer_matrix
from sitelens.tasks import Task


def _scatter(frame: pd.DataFrame) -> Figure:
    r, p = frame["r"].iloc[0], frame["p"].iloc[0]
    title = f"r = {r:.2f}, QAP p {'<' if p < 0.001 else '='} {max(p, 0.001):.3f}"
    similarity, transfer = (
        frame.pivot(index="source", columns="target", values=name) for name in ("similarity", "transfer")
    )
    return figures.similarity_against_transfer(similarity, transfer, title)


@study(caption="Whether similar heads transfer.", figure=_scatter, tasks=SIXTEEN, most_items=50)
@checked
@warned_once()
def similarity_transfer(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Similarity of alpha and transfer for every pair of tasks: one row per source and target.

    Columns: source, target, similarity (Pearson), transfer (share of the target's own gain), r and p (of
    `similarity_predicts_transfer`; the same in every row).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for fewer than three tasks, and as `train_selections`.

    Example:
        >>> frame = sl.studies.similarity_transfer([task, "antonym", "synonym"], model, config=config, n_items=4)
        >>> len(frame), frame.columns.tolist()
        (9, ['source', 'target', 'similarity', 'transfer', 'r', 'p'])
    """
    loaded, model, sample = some_tasks(tasks, at_least=3), resolve_model(model), Sample(**options)
    similarity = head_similarity(loaded, model, config=config)
    grid = transfer_matrix(
        loaded, model, split=sample.split, n_items=sample.n_items, seed=sample.seed, config=config
    )  # fmt: skip
    found = similarity_predicts_transfer(similarity, grid).set_index("measure").loc["pearson"]
    shares, likeness = grid.normalized(), similarity.matrix()
    names = list(shares.columns)
    rows = [(a, b, likeness.loc[a, b], shares.loc[a, b], found["r"], found["p"]) for a in names for b in names]
    return pd.DataFrame(rows, columns=["source", "target", "similarity", "transfer", "r", "p"])
