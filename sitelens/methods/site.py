"""SITE itself (arXiv 2507.20906): soft head selection, as every other method is fitted."""

from __future__ import annotations

from typing import Any

from sitelens.arguments import checked
from sitelens.conditions import PatchHeads
from sitelens.config import TrainConfig
from sitelens.embedding import embed_task
from sitelens.methods.common import fitting
from sitelens.models import Model, resolve_model
from sitelens.tasks import Task, load_task
from sitelens.training import train_selection
from sitelens.values import Count, CountOrZero, Seed


@checked(also=TrainConfig)
def fit(
    task: Task | str,
    model: Model | str | None = None,
    *,
    n_prompts: Count = 50,
    n_shots: CountOrZero = 10,
    seed: Seed = 0,
    **config: Any,
) -> PatchHeads:
    """The trained selection over the task's embedding; `config` is that of `TrainConfig`.

    Raises:
        SitelensError: as `embed_task` and `train_selection`.
    """
    model, task = resolve_model(model), fitting(load_task(task))
    embedding = embed_task(task, model, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
    trained = train_selection(task, model, embedding=embedding, config=TrainConfig(seed=seed, **config))
    return PatchHeads(trained.selection, embedding, trained.config.mixing)
