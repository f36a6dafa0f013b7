"""How alpha is trained: prompts and shots of the embedding, initializations, checkpoints, and the resulting alphas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.embedding import TaskEmbedding, embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot
from sitelens.conditions.selection import saturated
from sitelens.errors import SitelensError, warned_once
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import TrainJob, TrainResult, train_jobs
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Options, Sample, measure, prepare, some_tasks
from sitelens.studies.registry import TWO, study
from sitelens.studies.similarity import alpha_similarity
from sitelens.tasks import Task

BINS = 20  # in a histogram of alpha
INITS: tuple[float | Literal["random"], ...] = (0.1, 0.3, 0.5, 0.7, 0.9, "random")


@study(caption="Prompts and shots of the embedding.", figure=figures.prompt_counts, tasks=TWO)
@checked
@warned_once()
def prompt_counts(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    n_prompts: Sequence[Count] = (1, 3, 5, 10, 50),
    n_shots: Sequence[CountOrZero] = (1, 2, 5, 10),
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Accuracy of SITE by number of prompts (M) and shots (N) of the embedding (paper: M in {1, 3, 5, 10, 50}).

    One row per task, n_prompts and n_shots: task, n_prompts, n_shots, mean, low, high (accuracy with 95% interval), n
    (items), loss (nats), and few_shot, few_shot_low, few_shot_high (accuracy of plain prompting with as many shots).
    Each embedding has its own alpha.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        n_prompts: values of M.
        n_shots: values of N.
        config: training of alpha (default: the paper's).
        options: see `Options`.

    Raises:
        SitelensError: for tasks with too few items for the largest N, and as `train_selections`.

    Example:
        >>> frame = sl.studies.prompt_counts([task], model, n_prompts=[1, 2], n_shots=[1], config=config, n_items=4)
        >>> frame[["n_prompts", "n_shots"]].values.tolist()
        [[1, 1], [2, 1]]
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    loaded = some_tasks(tasks)
    cells = [(task, m, n) for task in loaded for m in n_prompts for n in n_shots]
    vectors = [embed_task(task, model, n_prompts=m, n_shots=n, seed=sample.seed) for task, m, n in cells]
    jobs = [TrainJob(((task, vector),), config) for (task, _, _), vector in zip(cells, vectors, strict=True)]
    results = train_jobs(jobs, model)
    frames = []
    for task in loaded:
        site = [
            ({"n_prompts": m, "n_shots": n}, PatchHeads(result.selection, vector, config.mixing))
            for (own, m, n), vector, result in zip(cells, vectors, results, strict=True)
            if own is task
        ]
        rows = measure(task, site, model, sample)
        prompted = measure(task, [({"n_shots": n}, FewShot(n)) for n in n_shots], model, sample).set_index("n_shots")
        for name, column in (("few_shot", "mean"), ("few_shot_low", "low"), ("few_shot_high", "high")):
            rows[name] = rows["n_shots"].map(prompted[column])
        frames.append(rows)
    return pd.concat(frames, ignore_index=True)


@study(caption="Where alpha starts.", figure=figures.initializations, tasks=TWO)
@checked
@warned_once()
def initializations(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    inits: Sequence[float | Literal["random"]] = INITS,
    seeds: Sequence[Seed] = (0, 1),
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Accuracy and alpha after training from different initial alphas: one row per task, init and seed.

    Asked for by reviewers. Columns: task, init, seed, valid_loss (lowest, in nats), n_heads (alpha above 0.5),
    fraction_saturated, mean, low, high (accuracy with 95% interval), n (items), loss (nats).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        inits: initial alphas, or "random".
        seeds: training seeds.
        config: training of alpha (default: the paper's); its init and seed have no effect.
        options: see `Options`.

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> frame = sl.studies.initializations([task], model, inits=[0.5], seeds=[0, 1], config=config, n_items=4)
        >>> frame[["init", "seed"]].values.tolist()
        [['0.5', 0], ['0.5', 1]]
    """
    model, sample = resolve_model(model), Sample(**options)
    frames = []
    loaded = some_tasks(tasks)
    results = initialization_runs(loaded, model, inits=inits, seeds=seeds, config=config, **options)
    for task in loaded:
        settings = []
        for (name, init, seed), (vector, result) in results.items():
            if name == task.name:
                alpha = result.selection
                facts = {"init": str(init), "seed": seed, "valid_loss": result.history["valid_loss"].min(),
                         "n_heads": alpha.n_selected, "fraction_saturated": alpha.fraction_saturated}  # fmt: skip
                settings.append((facts, PatchHeads(alpha, vector, result.config.mixing)))
        frames.append(measure(task, settings, model, sample))
    return pd.concat(frames, ignore_index=True)


@study(caption="Distances between the alphas found.", figure=figures.initialization_distances, tasks=TWO)
@checked
@warned_once()
def initialization_distances(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    inits: Sequence[float | Literal["random"]] = INITS,
    seeds: Sequence[Seed] = (0, 1),
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Distances between the alphas of `initializations`: one row per task and pair of runs.

    Columns: task, init_a, seed_a, init_b, seed_b, pair ("same init" under two seeds, "same seed" from two inits, or
    "both differ"), distance (mean absolute difference of alpha), pearson, hard_agreement (share of heads on the same
    side of 0.5).

    Args:
        tasks, model, inits, seeds, config: as in `initializations`.
        options: only `seed` has an effect; see `Options`.

    Example:
        >>> frame = sl.studies.initialization_distances([task], model, inits=[0.5], seeds=[0, 1], config=config)
        >>> frame["pair"].tolist()
        ['same init']
    """
    results = initialization_runs(tasks, model, inits=inits, seeds=seeds, config=config, **options)
    rows = []
    keys = list(results)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            if a[0] != b[0]:
                continue
            first, second = results[a][1].selection, results[b][1].selection
            pair = "same init" if a[1] == b[1] else "same seed" if a[2] == b[2] else "both differ"
            rows.append({
                "task": a[0], "init_a": str(a[1]), "seed_a": a[2], "init_b": str(b[1]), "seed_b": b[2], "pair": pair,
                "distance": float((first.alpha - second.alpha).abs().mean()),
                "pearson": alpha_similarity(first, second),
                "hard_agreement": float(((first.alpha > 0.5) == (second.alpha > 0.5)).double().mean()),
            })  # fmt: skip
    return pd.DataFrame(rows)


@checked
@warned_once()
def initialization_runs(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    inits: Sequence[float | Literal["random"]] = INITS,
    seeds: Sequence[Seed] = (0, 1),
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> dict[tuple[str, float | str, int], tuple[TaskEmbedding, TrainResult]]:
    """The trainings of `initializations` and their embeddings, by (task name, init, seed).

    Args:
        tasks, model, inits, seeds, config: as in `initializations`.
        options: only `seed` has an effect; see `Options`.

    Example:
        >>> runs = sl.studies.initialization_runs([task], model, inits=[0.5], seeds=[0, 1], config=config)
        >>> list(runs)
        [('country-capital', 0.5, 0), ('country-capital', 0.5, 1)]
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    cells = [
        (task, embed_task(task, model, seed=sample.seed), init, seed)
        for task in some_tasks(tasks) for init in inits for seed in seeds
    ]  # fmt: skip
    jobs = [TrainJob(((task, vector),), replace(config, init=init, seed=seed)) for task, vector, init, seed in cells]
    results = train_jobs(jobs, model)
    return {
        (task.name, init, seed): (vector, result)
        for (task, vector, init, seed), result in zip(cells, results, strict=True)
    }


@study(caption="Best against last checkpoint.", figure=figures.checkpoints)
@checked
@warned_once()
def checkpoints(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """The best checkpoint compared with the last: one row per task and checkpoint.

    The paper's text keeps the best checkpoint, its released code the last. Columns: task, checkpoint, step, valid_loss
    (nats, at that step), mean, low, high (accuracy with 95% interval), n (items), loss (nats).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        config: training of alpha (default: the paper's); its checkpoint has no effect.
        options: see `Options`.

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> sl.studies.checkpoints([task], model, config=config, n_items=4)["checkpoint"].tolist()
        ['best', 'last']
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    loaded = some_tasks(tasks)
    frames = []
    for kind in ("best", "last"):
        for item in prepare(loaded, model, replace(config, checkpoint=kind), sample):
            history = item.result.history.set_index("step")["valid_loss"]
            step = item.result.best_step if kind == "best" else int(history.index[-1])
            facts = {"checkpoint": kind, "step": step, "valid_loss": history[step]}
            settings = [(facts, item.patch())]
            frames.append(measure(item.task, settings, model, sample))
    return pd.concat(frames, ignore_index=True)


@study("alpha-training", caption="Alpha over training.", figure=figures.alpha_distribution, by="step")
@study("alpha-layers", caption="Selected heads by layer.", figure=figures.alpha_distribution, by="layer")
@study("alpha-histogram", caption="Alpha after training.", figure=figures.alpha_distribution)
@checked
@warned_once()
def alpha_distribution(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    by: Literal["task", "layer", "step"] = "task",
    steps: Sequence[Count] = (25, 50, 100, 200, 400),
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Distribution of alpha over all heads, by layer, or over training (paper: histogram of alpha).

    Rows depend on `by`:

    - "task": one per task and bin: task, alpha (the bin's center), share (of heads).
    - "step": one per task, step and bin: also step. Alphas of a step are those of a training that ends there, on the
      same items as a longer one.
    - "layer": one per task and layer: task, layer, mean, on (share of alpha > 0.5), binary (share within 0.1 of 0 or
      1).

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        by: "task", "layer" or "step".
        steps: numbers of training steps, if `by` is "step".
        config: training of alpha (default: the paper's).
        options: only `seed` has an effect; see `Options`.

    Raises:
        SitelensError: for an unknown `by`, and as `train_selections`.

    Example:
        >>> frame = sl.studies.alpha_distribution([task], model, by="layer", config=config)
        >>> frame["layer"].tolist()
        [0, 1]
    """
    if by not in ("task", "layer", "step"):
        raise SitelensError(f"by must be 'task', 'layer' or 'step', got {by!r}")
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    loaded = some_tasks(tasks)
    rows: list[dict[str, Any]] = []
    for step in steps if by == "step" else (None,):
        chosen = config if step is None else replace(config, n_steps=step, checkpoint="last")
        for item in prepare(loaded, model, chosen, sample):
            alpha = item.selection.alpha
            if by == "layer":
                fractions = saturated(alpha).double().mean(1)
                rows += [{"task": item.task.name, "layer": i, "mean": float(row.mean()),
                          "on": float((row > 0.5).double().mean()), "binary": float(fractions[i])}
                         for i, row in enumerate(alpha)]  # fmt: skip
                continue
            counts, edges = np.histogram(alpha.numpy(), bins=BINS, range=(0, 1))
            facts = {"task": item.task.name} | ({} if step is None else {"step": step})
            rows += [{**facts, "alpha": (low + high) / 2, "share": count / alpha.numel()}
                     for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False)]  # fmt: skip
    return pd.DataFrame(rows)
