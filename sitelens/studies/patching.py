"""Which heads are patched, and how strongly: thresholds, random heads, heads added and removed, mixing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Unpack

import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import CountOrZero, Share
from sitelens.conditions.base import Condition
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError, SitelensWarning, warned_once
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Facts, Options, Sample, checked_counts, measure, prepare, some_tasks
from sitelens.studies.registry import study
from sitelens.tasks import Task

THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
GENERIC = 0.02  # accuracy difference within which a shared alpha counts as good as the tasks' own


@study(caption="Hard selection over its threshold.", figure=figures.soft_hard)
@checked
@warned_once()
def soft_hard(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    thresholds: Sequence[Share] = THRESHOLDS,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Soft selection compared with hard ones (paper: hard injection): one row per task and threshold.

    Columns: task, threshold, n_heads (above it), mean, low, high (accuracy with 95% interval), n (items), loss (nats),
    soft, soft_low, soft_high (accuracy of the same alpha, not rounded), gap (soft - mean).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        thresholds: alphas above the threshold become 1, all others 0.
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for a threshold outside [0, 1], and as `train_selections`.

    Example:
        >>> frame = sl.studies.soft_hard([task], model, thresholds=[0.25, 0.5], config=config, n_items=4)
        >>> frame[["task", "threshold", "n"]].values.tolist()
        [['country-capital', 0.25, 4], ['country-capital', 0.5, 4]]
    """
    wrong = [threshold for threshold in thresholds if not 0 <= threshold <= 1]
    if wrong or not thresholds:
        raise SitelensError(f"thresholds must lie in [0, 1], got {wrong[0] if wrong else 'none'}")
    model, sample = resolve_model(model), Sample(**options)
    frames = []
    for item in prepare(tasks, model, config, sample):
        unrounded = {"threshold": float("nan"), "n_heads": 0}
        settings: list[tuple[Facts, Condition]] = [(unrounded, item.patch())]
        for threshold in thresholds:
            hard = item.selection.hard(threshold)
            facts = {"threshold": threshold, "n_heads": hard.n_selected}
            settings.append((facts, item.patch(hard)))
        rows = measure(item.task, settings, model, sample)
        soft, rows = rows.iloc[0], rows.iloc[1:]
        rows = rows.assign(soft=soft["mean"], soft_low=soft["low"], soft_high=soft["high"])
        frames.append(rows.assign(gap=rows["soft"] - rows["mean"]))
    return pd.concat(frames, ignore_index=True)


@study(caption="Heads drawn at random.", figure=figures.random_heads)
@checked
@warned_once()
def random_heads(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    ks: Iterable[CountOrZero] | None = None,
    draws: CountOrZero = 10,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Random heads compared with the k heads of highest alpha: one row per task, k and draw.

    Columns: task, heads ("random" or "high-alpha"), k, draw (0 for high-alpha), mean, low, high (accuracy with 95%
    interval), n (items), loss (nats). The draws are the same for all tasks.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        ks: numbers of heads (default: about twenty from 0 to all).
        draws: random draws per k.
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for a k larger than the number of heads, fewer than one draw, and as `train_selections`.

    Example:
        >>> frame = sl.studies.random_heads([task], model, ks=[2], draws=2, config=config, n_items=4)
        >>> frame[["heads", "k", "draw"]].values.tolist()
        [['high-alpha', 2, 0], ['random', 2, 0], ['random', 2, 1]]
    """
    if draws < 1:
        raise SitelensError(f"draws must be at least 1, got {draws}")
    model, sample = resolve_model(model), Sample(**options)
    counts = checked_counts(ks, model)
    frames = []
    for item in prepare(tasks, model, config, sample):
        settings: list[tuple[Facts, Condition]] = []
        for k in counts:
            chosen = [("high-alpha", 0, item.selection.top(k))]
            chosen += [("random", draw, item.selection.random(k, seed=draw)) for draw in range(draws)]
            for heads, draw, selection in chosen:
                facts = {"heads": heads, "k": k, "draw": draw}
                settings.append((facts, item.patch(selection)))
        frames.append(measure(item.task, settings, model, sample))
    return pd.concat(frames, ignore_index=True)


@study(caption="Heads added and removed by alpha.", figure=figures.head_counts)
@checked
@warned_once()
def head_counts(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    ks: Iterable[CountOrZero] | None = None,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Accuracy as heads are added or removed in the order of alpha: one row per task, k, order and change.

    A causal test of the ranking (asked for by reviewers). Columns: task, order ("high-alpha" or "low-alpha" heads
    first), change ("added": only these k heads, at 1; "removed": the trained alpha with these k heads at 0), k, mean,
    low, high (accuracy with 95% interval), n (items), loss (nats).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        ks: numbers of heads (default: about twenty from 0 to all); `range(n_heads + 1)` gives every step.
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for a k larger than the number of heads, and as `train_selections`.

    Example:
        >>> frame = sl.studies.head_counts([task], model, ks=[2], config=config, n_items=4)
        >>> frame[["order", "change", "k"]].values.tolist()
        [['high-alpha', 'added', 2], ['high-alpha', 'removed', 2],
         ['low-alpha', 'added', 2], ['low-alpha', 'removed', 2]]
    """
    model, sample = resolve_model(model), Sample(**options)
    counts = checked_counts(ks, model)
    frames = []
    for item in prepare(tasks, model, config, sample):
        alpha = item.selection
        settings: list[tuple[Facts, Condition]] = []
        for k in counts:
            for order, heads in (("high-alpha", alpha.top(k)), ("low-alpha", alpha.bottom(k))):
                for change, selection in (("added", heads), ("removed", alpha.without(heads.alpha > 0.5))):
                    facts = {"order": order, "change": change, "k": k}
                    settings.append((facts, item.patch(selection)))
        frames.append(measure(item.task, settings, model, sample))
    return pd.concat(frames, ignore_index=True)


@study(caption="One alpha for all tasks.", figure=figures.task_agnostic)
@checked
@warned_once()
def task_agnostic(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    n_shots: CountOrZero = 10,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """One alpha for all tasks compared with each task's own: one row per task and condition (paper: task-agnostic).

    Columns: task, condition ("zero-shot", "N-shot", "own alpha", "shared alpha": trained on all tasks together, "mean
    alpha": mean of the tasks' own), mean, low, high (accuracy with 95% interval), n (items), loss (nats). Every task
    keeps its own embedding. A warning is given if the tasks' own alphas help and the shared one is as good: the heads
    are then generic.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        n_shots: demonstrations of the N-shot baseline.
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for fewer than two tasks, and as `train_selections`.

    Example:
        >>> frame = sl.studies.task_agnostic([task, "antonym"], model, config=config, n_items=4)
        >>> sorted(set(frame["condition"]))
        ['10-shot', 'mean alpha', 'own alpha', 'shared alpha', 'zero-shot']
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    prepared = prepare(tasks, model, config, sample, at_least=2)
    vectors = {item.task.name: item.embedding for item in prepared}
    trained = train_selections(
        [item.task for item in prepared], model, embeddings=vectors, seeds=(config.seed,), config=config, shared=True,
    )  # fmt: skip
    shared = next(iter(trained.values())).selection
    mean = HeadSelection.mean([item.selection for item in prepared])
    frames = []
    for item in prepared:
        patched = {"own alpha": item.selection, "shared alpha": shared, "mean alpha": mean}
        conditions: dict[str, Condition] = {"zero-shot": ZeroShot(), f"{n_shots}-shot": FewShot(n_shots)}
        conditions |= {name: item.patch(alpha) for name, alpha in patched.items()}
        settings = [({"condition": name}, condition) for name, condition in conditions.items()]
        frames.append(measure(item.task, settings, model, sample))
    frame = pd.concat(frames, ignore_index=True)
    means = frame.groupby("condition")["mean"].mean()
    if means["own alpha"] > means["zero-shot"] + GENERIC and means["shared alpha"] >= means["own alpha"] - GENERIC:
        warnings.warn(
            f"the shared alpha ({means['shared alpha']:.2f}) is as good as the tasks' own ({means['own alpha']:.2f}): "
            "the heads are generic to these tasks", SitelensWarning, stacklevel=2,
        )  # fmt: skip
    return frame


@study(caption="Convex against additive mixing.", figure=figures.mixing)
@checked
@warned_once()
def mixing(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Convex compared with additive mixing, each with an alpha trained for it (asked for by reviewers).

    One row per task, mixing and `hard` (False: alpha as trained; True: rounded): task, mixing, n_heads (alpha above
    0.5), fraction_saturated, hard, mean, low, high (accuracy with 95% interval), n (items), loss (nats).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        config: training of alpha (default: the paper's); its mixing has no effect.
        options: see `Options`.

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> frame = sl.studies.mixing([task], model, config=config, n_items=4)
        >>> frame[["mixing", "hard"]].values.tolist()
        [['convex', False], ['convex', True], ['additive', False], ['additive', True]]
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    loaded = some_tasks(tasks)
    frames = []
    for kind in ("convex", "additive"):
        for item in prepare(loaded, model, replace(config, mixing=kind), sample):
            facts = {
                "mixing": kind,
                "n_heads": item.selection.n_selected,
                "fraction_saturated": item.selection.fraction_saturated,
            }
            settings: list[tuple[Facts, Condition]] = [
                ({**facts, "hard": False}, item.patch()),
                ({**facts, "hard": True}, item.patch(item.selection.hard())),
            ]
            frames.append(measure(item.task, settings, model, sample))
    order = {task.name: i for i, task in enumerate(loaded)}
    frame = pd.concat(frames)
    return frame.sort_values("task", key=lambda names: names.map(order), kind="stable", ignore_index=True)
