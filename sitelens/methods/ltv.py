"""LTV, the learnable task vectors of Saglam et al. 2025 (arXiv 2502.05390), not those of Yang et al. 2025.

Weighted sums of head outputs, added after every layer. The Learned Task Vectors of Yang et al. (arXiv 2509.24169) share
the abbreviation but train the vector itself; sitelens does not include them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Positive, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import embed_task, embedding_prompts
from sitelens.conditions.streams import AddToStream, added, at_last_token, stream_hook
from sitelens.engine.batches import task_batch
from sitelens.engine.forward import Hook, check_finite, last_logits
from sitelens.engine.memory import chunks, prefix_bytes, step_cost
from sitelens.engine.network import Passes
from sitelens.engine.prefix import PrefixCache, ReadOnly
from sitelens.engine.prompts import draw_demonstrations, few_shot_prompt
from sitelens.errors import warned_once
from sitelens.heads.attribution import head_outputs
from sitelens.heads.effects import shuffled_labels
from sitelens.methods.base import Method
from sitelens.methods.items import shuffled_batches
from sitelens.methods.validation import best_on_valid
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.settings import settings
from sitelens.tasks import Task, load_task

LEARNING_RATES = (1e-3, 1e-2, 1e-1)


@checked
@dataclass(frozen=True, kw_only=True)
class LTV(Method):
    """Task vectors that are weighted sums of head outputs, one trained weight per head; learning rate chosen on valid.

    After layer l, the sum over its heads of weight times the output of the mean z is added at the last token and at
    every decoded token. Weights start from N(0, 1) and are trained with Adam on a fixed pool of prompts with shuffled
    answers. The prefixes of the pool are computed once if they all fit half of the memory budget, otherwise at each
    step.

    Attributes:
        n_prompts: prompts over which z is averaged.
        n_shots: demonstrations in each of them.
        n_pool: training prompts with shuffled answers.
        pool_shots: demonstrations in each of them.
        n_steps: optimizer steps.
        batch_size: training prompts per step.
        learning_rates: candidate learning rates.

    Source:
        Saglam et al. 2025, arXiv 2502.05390: the paper's form, one weight per head. The public code for language
        weights slices of the residual stream instead, and its learning rate of 5e-5 leaves the weights near their
        initial values.
    """

    name = "LTV"
    version = 2
    n_prompts: Count = 100
    n_shots: CountOrZero = 10
    n_pool: Count = 200
    pool_shots: CountOrZero = 5
    n_steps: Count = 2000
    batch_size: Count = 32
    learning_rates: tuple[Positive, ...] = LEARNING_RATES

    @checked
    @warned_once()
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> AddToStream:
        """The vectors trained with the learning rate of the best validation accuracy.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the prompts, the initial weights and the order of the pool.

        Raises:
            SitelensError: as `embed_task`.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        embedding = embed_task(task, model, n_prompts=self.n_prompts, n_shots=self.n_shots, seed=seed)
        device = model.device
        measured = embedding_prompts(task, model.tokenizer, self.n_prompts, self.n_shots, seed)
        writes = head_outputs(embedding.mean_z, model, task_batch(task, measured, model)).to(device)
        prompts = []
        for i in range(self.n_pool):
            query = task.train[i % len(task.train)]
            shown = draw_demonstrations(task, self.pool_shots, query, seed, "ltv", i)
            key = f"ltv/{task.name}/{seed}/{i}"
            prompts.append(few_shot_prompt(task, shuffled_labels(shown, key), query, model.tokenizer))
        batch = task_batch(task, prompts, model)
        budget = settings.budget() // 2  # half for prefixes, half for the passes that use them
        whole = self.n_pool * prefix_bytes(model, max(batch.lengths)) <= budget
        pool = PrefixCache.of(batch, model, budget) if whole else None

        def prefixes(chosen: list[int]) -> PrefixCache:
            return (
                PrefixCache.of(batch.rows(chosen), model, budget) if pool is None else pool.rows(torch.tensor(chosen))
            )

        start = torch.randn(writes.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        trained = {rate: start.clone().to(writes).requires_grad_() for rate in self.learning_rates}
        optimizers = [torch.optim.Adam([weights], lr=rate) for rate, weights in trained.items()]
        passes = {rate: Passes(model, _adding(weights, writes)) for rate, weights in trained.items()}
        cost = step_cost(model, gradient=True, hooked=True)
        for index in shuffled_batches(
            prompts, self.n_steps, min(self.batch_size, self.n_pool), f"ltv/train/{task.name}/{seed}"
        ):
            for part in chunks([batch.lengths[i] for i in index], cost, budget):
                chosen = [index[i] for i in sorted(part)]
                some = prefixes(chosen)  # shared by all learning rates
                answer = batch.answer[chosen]
                for rate, weights in trained.items():
                    logits, _ = last_logits(some, passes[rate], ReadOnly)
                    check_finite(
                        logits, lambda row, chosen=chosen: f"task {task.name!r}, LTV, few-shot prompt {chosen[row]}"
                    )
                    loss = cross_entropy(logits.float(), answer.to(logits.device))
                    (loss * (len(chosen) / len(index))).backward(inputs=[weights])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        layers, made_for = tuple(range(len(writes))), model.fingerprint()
        origin = Origin.of(model, task, n_prompts=self.n_prompts, n_shots=self.n_shots, seed=seed)
        sums = {rate: summed(weights.detach(), writes).float().cpu() for rate, weights in trained.items()}
        candidates = {
            rate: AddToStream(vectors, layers, made_for, n_trained=start.numel(), origin=origin)
            for rate, vectors in sums.items()
        }
        return candidates[best_on_valid(task, candidates, model)]

    def n_trained(self, condition: Condition) -> int:
        """Number of trained weights: one per head."""
        assert isinstance(condition, AddToStream)
        return condition.n_trained


def summed(
    weights: Float[Tensor, "layer head"], writes: Float[Tensor, "layer head d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Vector of each layer: the weighted sum of its heads' outputs."""
    return einsum(weights, writes, "layer head, layer head d_model -> layer d_model")


def _adding(weights: Tensor, writes: Tensor) -> list[Hook]:
    def act(x: Tensor, hook: Any = None, *, layer: int) -> Tensor:
        vector = weights[layer].to(x.device) @ writes[layer].to(x.device)
        return at_last_token(x, lambda last: added(last, vector))

    return [(stream_hook(layer), functools.partial(act, layer=layer)) for layer in range(len(writes))]
