"""In-context vectors (Liu et al. 2024, arXiv 2311.06668): a direction from inputs to answers, added after every MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.conditions.streams import InContextVector, stream_hook
from sitelens.engine.batches import task_batch
from sitelens.engine.capture import states_in_float64
from sitelens.engine.prompts import Prompt
from sitelens.methods.base import Method
from sitelens.methods.items import shuffled_batches
from sitelens.methods.validation import best_on_valid
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task

STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


@checked
@dataclass(frozen=True, kw_only=True)
class ICV(Method):
    """In-context vector: the direction from inputs to answers, added after every MLP with a strength chosen on valid.

    Input and answer of each pair are run alone, without a template; label tasks have no natural pair, so this one is
    our choice. The direction is the first principal component of the differences between their last-token states, over
    the embedding and all layers jointly, plus the mean difference; each layer's part is then normalized to unit length.
    The component's arbitrary sign is that of the mean.

    Attributes:
        n_pairs: training items that the direction is computed from.
        strengths: candidate strengths (published: 0.1 to 0.8).

    Source:
        Liu et al. 2024, arXiv 2311.06668.
    """

    name = "ICV"
    version = 2
    n_pairs: Count = 5
    strengths: tuple[float, ...] = STRENGTHS

    @checked
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> InContextVector:
        """The direction per layer, with the strength of the best validation accuracy.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes which training items are used.

        Raises:
            SitelensError: for a task without training or validation items.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        (places,) = shuffled_batches(task.train, 1, min(self.n_pairs, len(task.train)), f"icv/{task.name}/{seed}")
        items = [task.train[i] for i in places]
        points = ["blocks.0.hook_resid_pre", *(stream_hook(layer) for layer in range(model.shape.layers))]
        said, asked = (
            states_in_float64(task_batch(task, [Prompt(text, ()) for text in texts], model), points, model)
            for texts in ([item.output for item in items], [item.input for item in items])
        )
        directions = direction(said - asked)[1:].to(torch.float32)
        made_for = model.fingerprint(), Origin.of(model, task, seed=seed)
        candidates = {strength: InContextVector(directions, strength, *made_for) for strength in self.strengths}
        return candidates[best_on_valid(task, candidates, model)]


def direction(differences: Float[Tensor, "pair point d_model"]) -> Float[Tensor, "point d_model"]:
    """First principal component plus mean of the differences, over all points jointly, then unit length per point.

    Args:
        differences: state of the answer minus that of the input, per pair and hook point. For a single pair the
            component is zero.
    """
    mean = differences.mean(0)
    flat = (differences - mean).flatten(1)
    component = torch.zeros_like(mean)
    if len(flat) > 1:
        component = torch.linalg.svd(flat, full_matrices=False).Vh[0].reshape(mean.shape)
        if (component * mean).sum() < 0:
            component = -component
    return normalize(component + mean, dim=-1)
