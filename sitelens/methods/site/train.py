"""Soft head selection: alpha trained by gradient descent on zero-shot prompts (SITE, step 2); each run is cached."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.schema import checked_tensor, packed
from sitelens.checks.values import Seed
from sitelens.conditions.embedding import TaskEmbedding, embed_tasks
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.keys import ResultStore
from sitelens.errors import SitelensError, SitelensWarning, warned_once
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.loop import Run, train_runs
from sitelens.methods.site.state import ALGORITHM, ALGORITHM_RANDOM_INIT, HISTORY
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.models.provenance import Origin
from sitelens.store.artifact import Artifact
from sitelens.store.digests import content_digest, digest
from sitelens.store.folder import Contents
from sitelens.store.kinds import Kind
from sitelens.tasks import Task, load_tasks

FEW_BINARY = 0.5  # a smaller fraction of saturated alphas gives a warning


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained selection with its training history.

    Attributes:
        selection: the trained alpha.
        history: one row per step: step (from 1), loss (nats, on the step's items), valid_loss (nats; NaN where it was
            not measured), mean_alpha, fraction_saturated (share of alphas within 0.1 of 0 or 1).
        config: hyperparameters and seed of the training.
    """

    selection: HeadSelection
    history: pd.DataFrame
    config: TrainConfig

    def __repr__(self) -> str:
        losses = self.history["valid_loss"]
        best = (
            f", valid loss {losses.min():.3g} at step {self.best_step} of {len(losses)}" if losses.notna().any() else ""
        )
        return f"TrainResult({self.selection.label()}{best})"

    @property
    def best_step(self) -> int:
        """The step with the lowest validation loss."""
        return int(self.history["step"].iloc[self.history["valid_loss"].argmin()])


@checked
def train_selection(
    task: Task | str,
    model: ModelSource | None = None,
    *,
    embedding: TaskEmbedding | None = None,
    config: TrainConfig | None = None,
) -> TrainResult:
    """The trained alpha of one task, with its history; cached on disk.

    Args:
        task: the task.
        model: the model (default: the packaged one).
        embedding: the task's embedding (default: `embed_task(task, model)`).
        config: hyperparameters and seed (default: the paper's).

    Raises:
        SitelensError: for invalid input, a task without training or validation items, an embedding of another model, or
            a loss that is not finite.

    Source:
        arXiv 2507.20906, with the settings of the released code, SNU-DRL/Soft_Injection.

    Example:
        >>> run = sl.train_selection(task, model, embedding=embedding, config=config)
        >>> run.selection.alpha.shape  # layers, heads per layer
        torch.Size([2, 4])
    """
    config = config or TrainConfig()
    task = load_tasks([task])[0]
    embeddings = None if embedding is None else {task.name: embedding}
    results = train_selections([task], model, embeddings=embeddings, seeds=(config.seed,), config=config)
    return results[task.name, config.seed]


@checked
def train_selections(
    tasks: Iterable[Task | str],
    model: ModelSource | None = None,
    *,
    embeddings: Mapping[str, TaskEmbedding] | None = None,
    seeds: Sequence[Seed] = (0,),
    config: TrainConfig | None = None,
    shared: bool = False,
) -> dict[tuple[str, int], TrainResult]:
    """The trained alphas of all tasks and seeds, by (task name, seed); cached on disk.

    All train in one batch, with the same results as training them separately.

    Args:
        tasks: the tasks.
        model: the model (default: the packaged one).
        embeddings: embeddings by task name (default: `embed_task` of each task).
        seeds: training seeds, used in place of `config.seed`.
        config: hyperparameters (default: the paper's).
        shared: train one alpha per seed on all tasks together, each with its own embedding (task-agnostic alpha); every
            task then has the same result.

    Raises:
        SitelensError: as `train_selection`.

    Example:
        >>> embeddings = {task.name: embedding}
        >>> runs = sl.train_selections([task], model, embeddings=embeddings, seeds=[0, 1], config=config)
        >>> list(runs)
        [('country-capital', 0), ('country-capital', 1)]
    """
    config, model = config or TrainConfig(), resolve_model(model)
    loaded = load_tasks(tasks)
    if not loaded or not seeds or len(set(seeds)) < len(seeds):
        raise SitelensError("give at least one task, and seeds that differ")
    _check_splits(loaded)
    vectors = embed_tasks(loaded, model, embeddings)
    members = [(task, vectors[task.name]) for task in loaded]
    groups = [tuple(members)] if shared else [(member,) for member in members]
    jobs = [TrainJob(group, replace(config, seed=seed)) for group in groups for seed in seeds]
    results = train_jobs(jobs, model)
    return {
        (task.name, job.config.seed): result
        for job, result in zip(jobs, results, strict=True)
        for task, _ in job.members
    }


@dataclass(frozen=True, eq=False)
class TrainJob:
    """One alpha to train: on a task with its embedding or, for a shared alpha, on several.

    Attributes:
        members: (task, embedding) pairs.
        config: hyperparameters and seed.
    """

    members: tuple[tuple[Task, TaskEmbedding], ...]
    config: TrainConfig


@checked
@warned_once()
@torch.inference_mode(False)
def train_jobs(
    jobs: Sequence[TrainJob],
    model: ModelSource | None = None,
) -> list[TrainResult]:
    """The trained alphas of any mix of tasks, embeddings and configurations, in the order of the jobs; cached on disk.

    Jobs whose configurations differ only in seed and init train in one batch.

    Raises:
        SitelensError: as `train_selection`.
    """
    model = resolve_model(model)
    tasks = [task for job in jobs for task, _ in job.members]
    _check_splits(tasks)
    warn_of_shared_first_tokens(tasks, model)
    with model.unchanged():
        for job in jobs:
            for _, embedding in job.members:
                embedding.check_fits(model)
        store = ResultStore(model, tasks)
        specs = [_spec(job, store.key) for job in jobs]
        shape = model.shape[:2]

        def make(missing: list[int]) -> Iterator[tuple[int, Contents]]:
            batches: dict[TrainConfig, list[int]] = {}
            for i in missing:
                batches.setdefault(replace(jobs[i].config, seed=0, init=0.5), []).append(i)
            for config, batch in batches.items():
                keys = [digest(specs[i]) if store.open else "" for i in batch]
                runs, used, vectors = _runs([jobs[i] for i in batch], keys)
                trained = train_runs(runs, used, vectors, model, config)
                for i, tensors in zip(batch, trained, strict=True):
                    how = jobs[i].config
                    provenance = f"SITE, {how.checkpoint} of {how.n_steps} steps, seed {how.seed}"
                    selection = HeadSelection(tensors["alpha"], "", None, provenance, _origin(jobs[i], model))
                    _, meta = packed(selection)
                    yield i, (tensors, {name: meta[name] for name in ("provenance", "origin")})

        reads = [functools.partial(_result, config=job.config, shape=shape) for job in jobs]
        results = store.cached_all(Kind.SELECTION, specs, make, reads)
    for result in results:
        _warn_if_undecided(result)
    return results


def _check_splits(tasks: Iterable[Task]) -> None:
    for task in tasks:
        for split in ("train", "valid"):
            task.nonempty(split)


def _runs(jobs: Sequence[TrainJob], keys: Sequence[str]) -> tuple[list[Run], list[Task], list[TaskEmbedding]]:
    """The jobs as runs, and the lists of distinct tasks and embeddings that the runs index."""
    tasks: dict[tuple[str, str], tuple[int, Task]] = {}
    vectors: dict[int, tuple[int, TaskEmbedding]] = {}
    runs = []
    for job, key in zip(jobs, keys, strict=True):
        members = []
        for task, embedding in job.members:
            place, _ = tasks.setdefault((task.name, task.digest), (len(tasks), task))
            members.append((place, vectors.setdefault(id(embedding), (len(vectors), embedding))[0]))
        runs.append(Run(tuple(members), job.config.seed, job.config.init, key))
    return runs, [task for _, task in tasks.values()], [embedding for _, embedding in vectors.values()]


def _spec(job: TrainJob, key: Mapping[str, str]) -> dict[str, Any]:
    return {
        "algorithm": ALGORITHM_RANDOM_INIT if job.config.init == "random" else ALGORITHM,
        "task": "+".join(task.name for task, _ in job.members),
        "items": [task.digest for task, _ in job.members],
        **key, "config": asdict(job.config),
        "embeddings": [content_digest(embedding.mean_z) for _, embedding in job.members],
    }  # fmt: skip


def _origin(job: TrainJob, model: Model) -> Origin | None:
    """Origin of a selection: the present model and task, and the prompts of its embedding."""
    origins = []
    for task, embedding in job.members:
        prompts = {name: getattr(embedding, name) for name in ("n_prompts", "n_shots", "seed")}
        origins.append(Origin.of(model, task, **prompts))
    return Origin.shared(origins)


def _result(artifact: Artifact, config: TrainConfig, shape: tuple[int, int]) -> TrainResult:
    """The training result that an artifact of the cache holds.

    Raises:
        SitelensError: if the artifact is not a training of this configuration.
    """
    if "provenance" not in artifact.meta:
        raise SitelensError(f"{artifact.where}: provenance is missing")
    history = artifact.tensors.get("history", torch.empty(0))
    selection = HeadSelection.of(artifact)
    checked_tensor(history, Float[Tensor, "step column"], f"{artifact.where}: history", finite=False)
    steps = history[:, HISTORY.index("step")]
    known = torch.isfinite(history).all(0) | torch.tensor([name == "valid_loss" for name in HISTORY])
    if (
        tuple(history.shape) != (config.n_steps, len(HISTORY))
        or not known.all()
        or steps.tolist() != list(range(1, config.n_steps + 1))
    ):
        raise SitelensError(f"{artifact.where}: history is none of {config.n_steps} steps")
    if tuple(selection.alpha.shape) != shape:
        raise SitelensError(f"{artifact.where}: alpha has the shape {tuple(selection.alpha.shape)}")
    frame = pd.DataFrame(history.numpy(), columns=list(HISTORY)).astype({"step": int})
    return TrainResult(selection, frame, config)


def _warn_if_undecided(result: TrainResult) -> None:
    share, selection = result.selection.fraction_saturated, result.selection
    if share < FEW_BINARY and result.config.n_steps >= TrainConfig().n_steps:
        warnings.warn(
            f"task {selection.task!r}, seed {result.config.seed}: only {share:.0%} of alpha is within 0.1 of 0 or 1 "
            "after training; more steps may help, or the task gives a conflicting signal",
            SitelensWarning, stacklevel=3,
        )  # fmt: skip
