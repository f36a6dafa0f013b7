"""Task vectors (Hendel et al. 2023, arXiv 2310.15916): the last token's state replaced at one layer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Scope
from sitelens.conditions.streams import ReplaceStream, stream_hook
from sitelens.engine.batches import task_batch
from sitelens.engine.capture import mean_states
from sitelens.engine.prompts import few_shot_prompt
from sitelens.errors import SitelensError
from sitelens.methods.base import Method
from sitelens.methods.validation import best_on_valid
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task


@checked
@dataclass(frozen=True, kw_only=True)
class TV(Method):
    """Mean state of a layer over few-shot prompts, which replaces the state at the last token; layer chosen on valid.

    Each prompt has `n_shots` demonstrations and, as a dummy query, the input of another training item.

    Attributes:
        n_sets: sets of demonstrations over which the state is averaged.
        n_shots: demonstrations per set.
        scope: "prompt" patches the last prompt token only, "generation" every decoded token too.

    Source:
        Hendel et al. 2023, arXiv 2310.15916. There, each test prompt has its own vector, from two dummy queries; here
        one vector, averaged over sets, serves all prompts (the public code's option `multi_context`).
    """

    name = "TV"
    n_sets: Count = 50
    n_shots: CountOrZero = 5
    scope: Scope = "prompt"

    @checked
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> ReplaceStream:
        """The mean state at the layer with the best validation accuracy; ties go to the lowest layer.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the demonstrations and dummy queries.

        Raises:
            SitelensError: for fewer training items than `n_shots` + 1, or no validation items.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        if len(task.train) < self.n_shots + 1:
            raise SitelensError(
                f"task {task.name!r} has too few training items for {self.n_shots} shots and a dummy query: "
                f"{len(task.train)} items"
            )
        prompts = []
        for i in range(self.n_sets):
            rng = random.Random(f"sitelens/task-vector/{task.name}/{seed}/{i}")
            *shown, dummy = rng.sample(task.train, self.n_shots + 1)
            prompts.append(few_shot_prompt(task, shown, dummy, model.tokenizer))
        layers = range(model.shape.layers)
        means = mean_states(task_batch(task, prompts, model), [stream_hook(layer) for layer in layers], model)
        made_for, origin = (
            model.fingerprint(),
            Origin.of(model, task, n_prompts=self.n_sets, n_shots=self.n_shots, seed=seed),
        )
        candidates = {
            layer: ReplaceStream(means[layer : layer + 1], (layer,), made_for, self.scope, origin=origin)
            for layer in layers
        }
        return candidates[best_on_valid(task, candidates, model)]
