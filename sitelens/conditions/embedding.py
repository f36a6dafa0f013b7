"""Task embeddings: the mean of every head's z at the last token of few-shot prompts (step 1 of SITE)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.schema import packed
from sitelens.checks.values import Count, CountOrZero, Seed, tensor
from sitelens.engine.batches import task_batch
from sitelens.engine.capture import capture_z
from sitelens.engine.keys import ResultStore
from sitelens.engine.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.engine.prompts import Prompt, draw_demonstrations, few_shot_prompt
from sitelens.errors import SitelensError
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelLike, ModelSource, check_fit
from sitelens.models.provenance import Origin, model_label
from sitelens.progress import portions, progress
from sitelens.settings import settings
from sitelens.store.artifact import Artifact
from sitelens.store.folder import Contents
from sitelens.store.kinds import Kind
from sitelens.tasks import Task, load_task

ALGORITHM = 1  # version in cache keys: increase when results change


@checked
@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """Mean head outputs z at the last token of a task's few-shot prompts.

    Attributes:
        mean_z: `[layer head d_head]`, the input of the output projection, on the CPU, float32 or wider.
        task: the task's name.
        model: the model's fingerprint (None: any model of this shape).
        n_prompts: number of prompts averaged over.
        n_shots: number of demonstrations per prompt.
        seed: seed of the prompts.
        origin: the model and the task that it was computed from, if known.

    Raises:
        SitelensError: if mean_z is not a `[layer head d_head]` tensor of finite floats, or a number is negative.
    """

    mean_z: Float[Tensor, "layer head d_head"]
    task: str
    model: str | None
    n_prompts: Count
    n_shots: CountOrZero
    seed: Seed
    origin: Origin | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean_z", tensor("mean_z", self.mean_z, "layer head d_head"))

    def __repr__(self) -> str:
        layers, heads, d_head = self.mean_z.shape
        shape, model = f"{layers} layers x {heads} heads x {d_head}", model_label(self.origin, self.model)
        return f"TaskEmbedding({self.task!r}, {model}, {shape}, {self.n_prompts} prompts of {self.n_shots} shots)"

    def check_fits(self, model: ModelLike) -> None:
        """Raise SitelensError if this embedding was made with another model than `model`."""
        check_fit(f"the embedding of {self.task!r}", self.model, tuple(self.mean_z.shape), model, self.origin)

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file, with all attributes; returns its path."""
        return Artifact(Kind.EMBEDDING, {}, *packed(self)).save(path)

    @staticmethod
    def load(path: str | Path) -> TaskEmbedding:
        """The embedding saved in a file.

        Raises:
            SitelensError: if there is no such file, or it is damaged or holds something else.
        """
        return Artifact.load(path, Kind.EMBEDDING).made(TaskEmbedding)


@checked
@torch.inference_mode(False)
def embed_task(
    task: Task | str,
    model: ModelSource | None = None,
    *,
    n_prompts: Count = 50,
    n_shots: CountOrZero = 10,
    seed: Seed = 0,
) -> TaskEmbedding:
    """The embedding of a task: the mean of z at the last token of few-shot prompts. Cached on disk.

    Each prompt has its own random draw of n_shots + 1 different training items, the last of which is the query.

    Args:
        task: a task, or the name of one.
        model: a bridge, or the name or path of a model (default: the packaged model).
        n_prompts: number of prompts averaged over (M in the paper).
        n_shots: number of demonstrations per prompt (N in the paper).
        seed: seed of the draws.

    Raises:
        SitelensError: for an unknown task or model, too few training items, prompts longer than the context, or head
            outputs that are not finite.

    Source:
        SITE (arXiv 2507.20906), with the paper's M=50 and N=10 as defaults.

    Example:
        >>> sl.embed_task(task, model, n_prompts=2, n_shots=2).mean_z.shape  # layers, heads per layer, d_head
        torch.Size([2, 4, 8])
    """
    task, model = load_task(task), resolve_model(model)
    store = ResultStore(model, [task])
    spec = {
        "algorithm": ALGORITHM, "task": task.name, "items": task.digest, **store.key,
        "n_prompts": n_prompts, "n_shots": n_shots, "seed": seed,
    }  # fmt: skip

    def read(artifact: Artifact) -> TaskEmbedding:
        embedding = artifact.made(TaskEmbedding)
        if tuple(embedding.mean_z.shape) != model.shape:
            raise SitelensError(f"{artifact.where}: mean_z has the shape {tuple(embedding.mean_z.shape)}")
        return embedding

    def make() -> Contents:
        if len(task.train) < n_shots + 1:
            raise SitelensError(f"task {task.name!r} has too few training items for {n_shots} shots and a query: "
                                f"{len(task.train)} items")  # fmt: skip
        prompts = embedding_prompts(task, model.tokenizer, n_prompts, n_shots, seed)
        batch = task_batch(task, prompts, model)
        cost = functools.partial(forward_bytes, model)
        parts = chunks(batch.lengths, cost, settings.budget(), max_tokens=MAX_TOKENS)
        z = torch.empty(n_prompts, *model.shape, dtype=torch.float64)
        with progress(n_prompts, f"embed {task.name}") as bar:
            for index in parts:
                z[index] = capture_z(batch.rows(index), model).double().cpu()
                bar.update(len(index))
        if not torch.isfinite(z).all():
            raise SitelensError(
                f"task {task.name!r}: the model's head outputs are not finite (dtype {model.cfg.dtype})"
            )
        mean_z = z.mean(0).to(torch.float32)
        origin = Origin.of(model, task, n_prompts=n_prompts, n_shots=n_shots, seed=seed)
        return packed(TaskEmbedding(mean_z, task.name, store.key["model"], n_prompts, n_shots, seed, origin))

    return store.cached(Kind.EMBEDDING, spec, make, read)


def embed_tasks(
    tasks: Iterable[Task], model: Model, given: Mapping[str, TaskEmbedding] | None = None, **options: Any
) -> dict[str, TaskEmbedding]:
    """Embeddings by task name, from `given` where it has the task, else from `embed_task` with `options`.

    Raises:
        SitelensError: as `embed_task`, and if a given embedding was made with another model.
    """
    tasks = list(tasks)
    made = dict(given or {})
    for task, part in portions([task for task in tasks if task.name not in made]):
        with part:
            made[task.name] = embed_task(task, model, **options)
    embeddings = {task.name: made[task.name] for task in tasks}
    for embedding in embeddings.values():
        embedding.check_fits(model)
    return embeddings


def embedding_prompts(task: Task, tokenizer: Any, n_prompts: int, n_shots: int, seed: int) -> list[Prompt]:
    """The prompts that `embed_task` averages over."""
    prompts = []
    for i in range(n_prompts):
        *demonstrations, query = draw_demonstrations(task, n_shots + 1, None, seed, "embedding", i)
        prompts.append(few_shot_prompt(task, demonstrations, query, tokenizer))
    return prompts
