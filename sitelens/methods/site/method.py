"""SITE itself (arXiv 2507.20906): soft head selection, as every other method is fitted."""

from __future__ import annotations

from typing import Any

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.embedding import embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.methods.items import fitting
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selection
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model
from sitelens.tasks import Task, load_task


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
