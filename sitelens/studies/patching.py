"""Studies of which heads are patched, and how strongly: thresholds, random heads, heads added and removed."""

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
GENERIC = 0.02  # a shared alpha this near to the tasks' own is worth a warning


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
    """Soft selection against hard ones over thresholds (paper: hard injection).

    One row per task and threshold: threshold, n_heads (above it), mean, low, high, n, loss; soft, soft_low, soft_high
    (the same alpha unrounded) and gap (soft - mean). `options` are those of `Sample`.

    Raises:
        SitelensError: for a threshold outside of [0, 1], and as `train_selections`.

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
    """Heads drawn at random, many times for each number of them, beside the k heads of highest alpha.

    One row per task, k and draw: heads ("random" or "high-alpha"), k, draw (0 for high-alpha), mean, low, high, n,
    loss. The draws are the same for all tasks.

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
    """Heads added and removed one after the other, from the highest alpha down and from the lowest up.

    A causal test of the ranking (asked for by reviewers). "added": these k heads alone, at 1. "removed": the trained
    alpha with these k heads at 0. One row per task, order ("high-alpha" or "low-alpha" first), change and k, with
    mean, low, high, n, loss. `ks=range(n + 1)` takes every step.

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
    """One alpha for all tasks, each with its own embedding, against each task's own alpha (paper: task-agnostic).

    One row per task and condition: "zero-shot", "N-shot", "own alpha", "shared alpha" (trained on all tasks
    together), "mean alpha" (of the tasks' own); mean, low, high, n, loss. Warns where the tasks' own alphas help, and
    the shared one does as well: the heads are then generic.

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
    """Convex against additive mixing, each with an alpha trained for it (asked for by reviewers).

    One row per task and mixing: mean, low, high, n, loss, n_heads (alpha above 0.5), fraction_saturated, and with
    `hard` True the same alpha rounded.

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
