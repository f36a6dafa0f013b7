"""Task vectors (Hendel et al. 2023, arXiv 2310.15916): a layer's state at the last token replaced."""

from __future__ import annotations

import random

import torch

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Scope
from sitelens.conditions.streams import ReplaceStream, stream_hook
from sitelens.engine.capture import mean_states
from sitelens.engine.prompts import few_shot_prompt
from sitelens.errors import SitelensError
from sitelens.methods.items import fitting, prompts_of
from sitelens.methods.validation import best_on_valid
from sitelens.models.fingerprints import fingerprint
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, head_shape, own_tokenizer
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task


@checked
@torch.inference_mode(False)
def fit(
    task: Task | str,
    model: Model | str | None = None,
    *,
    n_sets: Count = 50,
    n_shots: CountOrZero = 5,
    scope: Scope = "prompt",
    seed: Seed = 0,
) -> ReplaceStream:
    """The mean state over `n_sets` sets of demonstrations, its layer chosen on valid; ties take the lowest layer.

    Each prompt has `n_shots` demonstrations and, as a dummy query, the input of another training item. As published,
    a test prompt has a vector of its own, from two dummy queries; here one vector, averaged over sets, serves all (its
    option `multi_context`). Generation goes on from the patched prompt.

    Raises:
        SitelensError: for too few training items, or none of validation.
    """
    model, task = resolve_model(model), fitting(load_task(task))
    if len(task.train) < n_shots + 1:
        raise SitelensError(f"task {task.name!r} has too few training items for {n_shots} shots and a dummy query: "
                            f"{len(task.train)} items")  # fmt: skip
    prompts = []
    for i in range(n_sets):
        rng = random.Random(f"sitelens/task-vector/{task.name}/{seed}/{i}")
        *shown, dummy = rng.sample(task.train, n_shots + 1)
        prompts.append(few_shot_prompt(task, shown, dummy, own_tokenizer(model)))
    layers = range(head_shape(model)[0])
    means = mean_states(prompts_of(prompts, task, model), [stream_hook(layer) for layer in layers], model)
    made_for, origin = fingerprint(model), Origin.of(model, task, n_prompts=n_sets, n_shots=n_shots, seed=seed)
    candidates = {
        layer: ReplaceStream(means[layer : layer + 1], (layer,), made_for, scope, origin=origin) for layer in layers
    }
    return candidates[best_on_valid(task, candidates, model)]
