"""How accuracy varies with the seed of the embedding's prompts and with the seed of the training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pandas as pd

from sitelens import figures
from sitelens.conditions.embedding import embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.errors import SitelensError, warned_once
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import TrainJob, train_jobs
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.studies.common import Options, Sample, measure, some_tasks
from sitelens.studies.registry import TWO, study
from sitelens.tasks import Task


@study(caption="Prompt seeds and training seeds.", figure=figures.seed_variance, tasks=TWO)
@warned_once()
def seed_variance(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    prompt_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    training_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    n_prompts: int = 50,
    n_shots: int = 10,
    config: TrainConfig | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Accuracy under every prompt seed (of the embedding) and training seed (asked for by reviewers).

    One row per task, prompt_seed and training_seed: task, prompt_seed, training_seed, n_heads (alpha above 0.5), mean,
    low, high (accuracy with 95% interval), n (items), loss (nats). The test items are always the same.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        prompt_seeds: seeds of the embedding's prompts.
        training_seeds: seeds of the training.
        n_prompts: prompts of the embedding.
        n_shots: demonstrations per prompt.
        config: training of alpha (default: the paper's); its seed has no effect.
        options: see `Options`.

    Raises:
        SitelensError: as `train_selections`.

    Example:
        >>> frame = sl.studies.seed_variance([task], model, prompt_seeds=[0], training_seeds=[0, 1], config=config,
        ...                                  n_items=4)
        >>> frame[["prompt_seed", "training_seed"]].values.tolist()
        [[0, 0], [0, 1]]
    """
    model, sample, config = resolve_model(model), Sample(**options), config or TrainConfig()
    loaded = some_tasks(tasks)
    cells, jobs = [], []
    for task in loaded:
        for prompt_seed in prompt_seeds:
            vector = embed_task(task, model, n_prompts=n_prompts, n_shots=n_shots, seed=prompt_seed)
            for training_seed in training_seeds:
                cells.append((task, prompt_seed, training_seed, vector))
                jobs.append(TrainJob(((task, vector),), replace(config, seed=training_seed)))
    results = train_jobs(jobs, model)
    frames = []
    for task in loaded:
        settings = [
            ({"prompt_seed": p, "training_seed": t, "n_heads": result.selection.n_selected},
             PatchHeads(result.selection, vector, config.mixing))
            for (own, p, t, vector), result in zip(cells, results, strict=True) if own is task
        ]  # fmt: skip
        frames.append(measure(task, settings, model, sample))
    return pd.concat(frames, ignore_index=True)


def variance_components(frame: pd.DataFrame) -> pd.DataFrame:
    """Variance components of the accuracies of `seed_variance`: one row per task, standard deviations of accuracy.

    Columns: task, mean; prompt_sd and training_sd (of the two seeds); residual_sd (what a pair of seeds adds beyond
    both); total_sd (of one run under new seeds on the same items; its square is the sum of the three squares); item_se
    (binomial standard error of one accuracy: the effect of other test items, since all runs share theirs). With a
    single seed of one kind, its sd and residual_sd are NaN, and the sd of the other contains the residual.

    The model is accuracy = mean + prompt seed + training seed + residual, with all but the mean random. Variances are
    estimated by restricted maximum likelihood and are never negative. With few seeds they are rough.

    Args:
        frame: the result of `seed_variance`.

    Raises:
        SitelensError: if a column is missing, or a task does not have every pair of seeds exactly once.

    Source:
        Thompson 1962: for a complete table this is the analysis of variance in which a mean square smaller than that of
        the residual is pooled with it.

    Example:
        >>> frame = sl.studies.seed_variance([task], model, prompt_seeds=[0, 1], training_seeds=[0, 1], config=config,
        ...                                  n_items=4)
        >>> sl.studies.variance_components(frame)["task"].tolist()
        ['country-capital']
    """
    missing = {"task", "prompt_seed", "training_seed", "mean", "n"} - set(frame.columns)
    if missing:
        raise SitelensError(f"no column {', '.join(sorted(missing))}: give the frame of seed_variance")
    rows = []
    for task, part in frame.groupby("task", sort=False):
        counts = part.groupby(["prompt_seed", "training_seed"]).size().unstack(fill_value=0)
        if (counts != 1).any(axis=None):
            raise SitelensError(f"task {task!r} must have every prompt seed with every training seed, each pair once")
        table = part.pivot(index="prompt_seed", columns="training_seed", values="mean").to_numpy(float)
        mean = float(table.mean())
        prompt, training, residual = _crossed_components(table)
        total = np.nansum([prompt, training, residual]) if table.size > 1 else np.nan
        variances = {"prompt": prompt, "training": training, "residual": residual, "total": total}
        rows.append({
            "task": task, "mean": mean, **{f"{name}_sd": value**0.5 for name, value in variances.items()},
            "item_se": (mean * (1 - mean) / part["n"].mean()) ** 0.5,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _crossed_components(table: np.ndarray) -> tuple[float, float, float]:
    """Variance components of rows, columns and residual of a table; NaN if one row or column cannot determine them."""
    n_rows, n_columns = table.shape
    if min(table.shape) == 1:
        variance = float(table.var(ddof=1)) if table.size > 1 else np.nan
        return (variance if n_rows > 1 else np.nan), (variance if n_columns > 1 else np.nan), np.nan
    rows, columns = table.mean(1) - table.mean(), table.mean(0) - table.mean()
    squares, freedom = (
        float(((table - table.mean() - rows[:, None] - columns) ** 2).sum()),
        (n_rows - 1) * (n_columns - 1),
    )
    sources = {
        "rows": (n_columns * float((rows**2).sum()), n_rows - 1, n_columns),
        "columns": (n_rows * float((columns**2).sum()), n_columns - 1, n_rows),
    }
    for name in sorted(sources, key=lambda name: sources[name][0] / sources[name][1]):
        own, degrees, _ = sources[name]
        if own / degrees <= squares / freedom:
            squares, freedom = squares + own, freedom + degrees
            del sources[name]
    residual = squares / freedom
    parts = {name: (own / degrees - residual) / times for name, (own, degrees, times) in sources.items()}
    return parts.get("rows", 0.0), parts.get("columns", 0.0), residual
