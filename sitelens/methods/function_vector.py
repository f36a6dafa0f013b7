"""Function vectors (Todd et al. 2024, arXiv 2310.15213): the summed outputs of a few heads, added at one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Scope
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.streams import AddToStream
from sitelens.engine.batches import PromptBatch, task_batch
from sitelens.engine.capture import LastTokenCapture, same_length_chunks
from sitelens.engine.forward import check_finite, full_logits
from sitelens.engine.network import Passes
from sitelens.engine.prompts import few_shot_prompts
from sitelens.errors import SitelensError, warned_once
from sitelens.heads.attribution import head_outputs
from sitelens.heads.effects import indirect_effects
from sitelens.methods.base import Method
from sitelens.methods.validation import best_on_valid
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource, z_hook
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task


@checked
@dataclass(frozen=True, kw_only=True)
class FV(Method):
    """Function vector: the summed mean outputs of a few heads, added at one layer.

    Layer and number of heads are chosen on valid.

    z is averaged over few-shot prompts with training demonstrations and validation queries; heads are ranked by their
    indirect effect on prompts with shuffled answers. In models that normalize (Gemma 3) or multiply (Granite) head
    outputs before the residual stream, so is the vector; the norm's scale is the mean over at most 8 of the prompts.

    Attributes:
        n_prompts: prompts over which z is averaged.
        n_shots: demonstrations per prompt.
        n_effects: prompts with shuffled answers for the indirect effects.
        head_counts: candidate numbers of heads (published: 10 for GPT-J, 20 to 100 for larger models).
        correct_only: average z only over prompts that the model answers correctly (over all if there are none).
        scope: "generation" adds the vector at every decoded token too, "prompt" at the last prompt token only.

    Source:
        Todd et al. 2024, arXiv 2310.15213. Their code chooses the layer on test and adds the output bias once per head;
        here the layer is chosen on valid and the bias is left out.
    """

    name = "FV"
    version = 3
    n_prompts: Count = 100
    n_shots: CountOrZero = 10
    n_effects: Count = 25
    head_counts: tuple[Count, ...] = (10, 20, 40)
    correct_only: bool = True
    scope: Scope = "generation"

    @checked
    @warned_once()
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> AddToStream:
        """The function vector with the best validation accuracy; ties go to the lowest layer.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the demonstrations and the shuffled answers.

        Raises:
            SitelensError: as `embed_task`, or if every entry of `head_counts` exceeds the model's number of heads.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        queries = [task.valid[i % len(task.valid)] for i in range(self.n_prompts)]
        shown = few_shot_prompts(
            task, queries, self.n_shots, model.tokenizer, seed, "function-vector", range(self.n_prompts)
        )
        batch = task_batch(task, shown, model)
        mean_z = _mean_z(batch, model, self.correct_only)
        made_for, origin = (
            model.fingerprint(),
            Origin.of(model, task, n_prompts=self.n_prompts, n_shots=self.n_shots, seed=seed),
        )
        embedding = TaskEmbedding(mean_z, task.name, made_for, self.n_prompts, self.n_shots, seed, origin)
        effects = indirect_effects(
            task, model, embedding=embedding, n_prompts=self.n_effects, n_shots=self.n_shots, seed=seed
        )
        ranked = effects.sort_values(["effect", "layer", "head"], ascending=[False, True, True])
        order = list(zip(ranked["layer"], ranked["head"], strict=True))
        writes = head_outputs(mean_z, model, batch)
        layers = range(model.shape.layers)
        candidates = {
            (layer, count): AddToStream(
                torch.stack([writes[place] for place in order[:count]]).sum(0)[None],
                (layer,),
                made_for,
                self.scope,
                origin=origin,
            )
            for layer in layers
            for count in self.head_counts
            if count <= len(order)
        }
        if not candidates:
            raise SitelensError(f"the model has {len(order)} heads, fewer than any of head_counts {self.head_counts}")
        return candidates[best_on_valid(task, candidates, model)]


def _mean_z(batch: PromptBatch, model: Model, correct_only: bool) -> Float[Tensor, "layer head d_head"]:
    """Mean z per head at the last token, over all prompts or those that the model answers correctly."""
    z = torch.zeros(len(batch), *model.shape, dtype=torch.float64)
    correct = torch.ones(len(batch), dtype=torch.bool)
    for index in same_length_chunks(batch, model):
        part, capture = batch.rows(index), LastTokenCapture([z_hook(layer) for layer in range(z.shape[1])])
        logits = full_logits(part, Passes(model, capture.hooks))
        check_finite(logits, lambda row, index=index: f"few-shot prompt {batch.texts[index[row]][-60:]!r}")
        z[index] = capture.states("cpu").double()
        tokens = logits.argmax(-1).tolist()
        correct[index] = torch.tensor([token in answers for token, answers in zip(tokens, part.accepted, strict=True)])
    if correct_only and correct.any():  # if no prompt is answered correctly, use all
        z = z[correct]
    return z.mean(0).to(torch.float32)
