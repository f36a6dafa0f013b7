"""Losses during training, and along the straight line between two alphas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import numpy as np
import pandas as pd
import torch

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.forward import Mixing
from sitelens.errors import SitelensError, warned_once
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Options, Sample, measure, some_tasks
from sitelens.studies.registry import TWO, study
from sitelens.studies.training import initialization_runs
from sitelens.tasks import Task, load_task


@study(caption="Validation loss over training.", figure=figures.training_curves)
@checked
@warned_once()
def training_curves(
    tasks: Iterable[Task | str], model: ModelSource | None = None, *, config: TrainConfig | None = None
) -> pd.DataFrame:
    """Losses during training: one row per task and step, with the columns of `TrainResult.history`, and task.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        config: training of alpha (default: the paper's).

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> sl.studies.training_curves([task], model, config=config)["step"].tolist()
        [1, 2, 3, 4]
    """
    runs = train_selections(some_tasks(tasks), resolve_model(model), config=config or TrainConfig())
    frames = [result.history.assign(task=name) for (name, _), result in runs.items()]
    return pd.concat(frames, ignore_index=True)


@checked
@warned_once()
def loss_path(
    task: Task | str,
    a: HeadSelection,
    b: HeadSelection,
    embedding: TaskEmbedding,
    model: ModelSource | None = None,
    *,
    points: Count = 21,
    mixing: Mixing = "convex",
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Cross-entropy along the straight line from one alpha to another: one row per point.

    It shows whether a barrier separates two solutions. Columns: position (0 at `a`, 1 at `b`), loss (nats, of the
    answer's first token), mean, low, high (accuracy with 95% interval), n (items).

    Args:
        task: the task.
        a, b: the two ends.
        embedding: the task embedding that is injected.
        model: the model (default: the packaged one).
        points: number of points, ends included.
        mixing: the mixing with which both alphas were trained.
        options: see `Options`; here `split` is "valid" by default.

    Raises:
        SitelensError: for fewer than two points, or selections of another model or of different shapes.

    Example:
        >>> frame = sl.studies.loss_path(task, alpha, alpha.hard(), embedding, model, points=3, n_items=4)
        >>> frame["position"].tolist()
        [0.0, 0.5, 1.0]
    """
    if points < 2:
        raise SitelensError(f"points must be at least 2, got {points}")
    task, model, sample = load_task(task), resolve_model(model), Sample(**{"split": "valid", **options})
    a.check_fits(model)
    b.check_fits(model)
    settings = []
    for position in np.linspace(0, 1, points).tolist():
        alpha = torch.lerp(a.alpha, b.alpha, position).clamp(0, 1)
        between = HeadSelection(alpha, task.name, a.model)
        settings.append(({"position": position}, PatchHeads(between, embedding, mixing)))
    return measure(task, settings, model, sample)


@study("loss-path", caption="Loss on the line between two alphas.", figure=figures.loss_path, tasks=TWO)
@checked
@warned_once()
def loss_paths(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """`loss_path` from each task's alpha to that of another seed and to that of a random init.

    One row per task, path and point: the columns of `loss_path`, and path ("TASK, to another seed" or "TASK, to a
    random start").

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        config: training of alpha (default: the paper's).
        options: see `Options`; here `split` is "valid" by default.

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> frame = sl.studies.loss_paths([task], model, config=config, n_items=2)
        >>> frame["path"].unique().tolist()
        ['country-capital, to another seed', 'country-capital, to a random start']
    """
    model, config = resolve_model(model), config or TrainConfig()
    frames = []
    for task in some_tasks(tasks):
        runs = initialization_runs([task], model, inits=(0.5, "random"), seeds=(0, 1), config=config, **options)
        embedding, start = runs[task.name, 0.5, 0]
        for label, key in (("another seed", (0.5, 1)), ("a random start", ("random", 0))):
            end = runs[task.name, *key][1]
            path = loss_path(
                task, start.selection, end.selection, embedding, model, mixing=config.mixing, **options
            )  # fmt: skip
            frames.append(path.assign(path=f"{task.name}, to {label}"))
    return pd.concat(frames, ignore_index=True)
