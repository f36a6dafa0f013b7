"""Soft head selection: alpha trained by gradient on zero-shot prompts (SITE, step 2), cached run by run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from sitelens.config import TrainConfig
from sitelens.defaults import SitelensError, SitelensWarning, settings
from sitelens.embedding import TaskEmbedding, embed_task
from sitelens.models import (
    Model,
    fingerprint,
    resolve_model,
)
from sitelens.selection import HeadSelection
from sitelens.store import Artifact, default_store, tensor_bytes
from sitelens.tasks import Task, load_tasks
from sitelens.training_loop import HISTORY, Run, train_runs

ALGORITHM = 1  # to be raised when the numbers change
FEW_BINARY = 0.5  # a share of near-binary alphas below this is worth a warning


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained selection and how it came about.

    history: one row a step: step (from 1), loss (nats, of that step's items), valid_loss (NaN where not measured),
    mean_alpha, share_binary (alpha within 0.1 of 0 or 1).
    """

    selection: HeadSelection
    history: pd.DataFrame
    config: TrainConfig

    @property
    def best_step(self) -> int:
        """The step of the lowest validation loss."""
        return int(self.history["step"].iloc[self.history["valid_loss"].argmin()])


def train_selection(
    task: Task | str,
    model: Model | str | None = None,
    *,
    embedding: TaskEmbedding | None = None,
    config: TrainConfig | None = None,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train alpha for one task. Without `embedding`, `embed_task(task, model)` is used. Cached on disk.

    Raises:
        SitelensError: for bad input, an embedding of another model, or a loss that is not a number.
    """
    config = config or TrainConfig()
    task = load_tasks([task])[0]
    embeddings = None if embedding is None else {task.name: embedding}
    options = {"memory_budget": memory_budget, "progress": progress}
    results = train_selections([task], model, embeddings=embeddings, seeds=(config.seed,), config=config, **options)
    return results[task.name, config.seed]


def train_selections(
    tasks: Iterable[Task | str],
    model: Model | str | None = None,
    *,
    embeddings: Mapping[str, TaskEmbedding] | None = None,
    seeds: Sequence[int] = (0,),
    config: TrainConfig | None = None,
    shared: bool = False,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> dict[tuple[str, int], TrainResult]:
    """Train alpha for every task and seed, all in one batch; the numbers are those of training one by one.

    `embeddings` maps task names to embeddings (default: `embed_task` of each). With `shared`, one alpha a seed is
    trained for all tasks together, each with its own embedding (task-agnostic alpha); every task's entry is then
    that one result. `config.seed` gives way to `seeds`. Results are cached on disk.

    Raises:
        SitelensError: as `train_selection`.
    """
    config, model = config or TrainConfig(), resolve_model(model)
    loaded = load_tasks(tasks)
    if not loaded or not seeds or len(set(seeds)) < len(seeds):
        raise SitelensError("give at least one task, and seeds that differ")
    for task in loaded:
        if not task.train or not task.valid:
            raise SitelensError(f"task {task.name!r} has no {'valid' if task.train else 'train'} items")
    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    known = embeddings or {}
    vectors = [known.get(task.name) or embed_task(task, model, **options) for task in loaded]
    for embedding in vectors:
        embedding.check_fits(model)
    groups = [tuple(range(len(loaded)))] if shared else [(i,) for i in range(len(loaded))]
    runs = [Run(members, seed) for members in groups for seed in seeds]
    specs = [_spec(run, loaded, vectors, model, config) for run in runs]
    store = default_store()
    artifacts = [store.get("selection", spec) for spec in specs]
    missing = [run for run, kept in zip(runs, artifacts, strict=True) if kept is None]
    if missing:
        trained = iter(train_runs(missing, loaded, vectors, model, config, settings.budget(memory_budget), progress))
        for i, (run, spec) in enumerate(zip(runs, specs, strict=True)):
            if artifacts[i] is None:
                meta = {"provenance": f"SITE, {config.checkpoint} of {config.steps} steps, seed {run.seed}"}
                artifacts[i] = artifact = Artifact("selection", spec, next(trained), meta)
                store.put(artifact)
    found = {
        run: _result(kept, replace(config, seed=run.seed)) for run, kept in zip(runs, artifacts, strict=True) if kept
    }
    for result in found.values():
        _warn_if_undecided(result)
    return {(loaded[i].name, run.seed): result for run, result in found.items() for i in run.members}


def _spec(
    run: Run, tasks: Sequence[Task], embeddings: Sequence[TaskEmbedding], model: Model, config: TrainConfig
) -> dict[str, Any]:
    members = [tasks[i] for i in run.members]
    vectors = [embeddings[i].mean_z.contiguous().cpu() for i in run.members]
    return {
        "algorithm": ALGORITHM, "task": "+".join(task.name for task in members),
        "items": [task.digest for task in members], "model": fingerprint(model),
        "config": asdict(replace(config, seed=run.seed)),
        "embeddings": [hashlib.sha256(tensor_bytes(vector)).hexdigest() for vector in vectors],
    }  # fmt: skip


def _result(artifact: Artifact, config: TrainConfig) -> TrainResult:
    spec = artifact.spec
    history = pd.DataFrame(artifact.tensors["history"].numpy(), columns=list(HISTORY)).astype({"step": int})
    selection = HeadSelection(artifact.tensors["alpha"], spec["task"], spec["model"], artifact.meta["provenance"])
    return TrainResult(selection, history, config)


def _warn_if_undecided(result: TrainResult) -> None:
    share, selection = result.selection.share_binary, result.selection
    if share < FEW_BINARY and result.config.steps >= TrainConfig().steps:
        warnings.warn(
            f"task {selection.task!r}, seed {result.config.seed}: only {share:.0%} of alpha is within 0.1 of 0 or 1 "
            "after training; more steps may help, or the task gives a conflicting signal",
            SitelensWarning, stacklevel=3,
        )  # fmt: skip
