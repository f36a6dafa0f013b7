"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the query and value projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Positive, Seed
from sitelens.conditions.adapters import Adapters, LowRank
from sitelens.conditions.base import Condition
from sitelens.engine.network import Passes
from sitelens.errors import warned_once
from sitelens.methods.base import Method
from sitelens.methods.items import prompts_with_answers, shuffled_batches
from sitelens.methods.losses import answer_loss
from sitelens.methods.validation import best_on_valid
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task

LEARNING_RATES = (1e-4, 3e-4, 1e-3)


@checked
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adapters on the query and value projections, trained on whole answers; learning rate chosen on valid.

    By default it takes as many steps, and items per step, as SITE. The optimizer is AdamW; the rest are peft's defaults
    (no dropout).

    Attributes:
        rank: rank of each adapter.
        alpha: the adapters' output is scaled by alpha / rank.
        n_steps: optimizer steps.
        batch_size: training items per step.
        learning_rates: candidate learning rates.

    Source:
        Hu et al. 2021, arXiv 2106.09685.
    """

    name = "LoRA"
    rank: Count = 8
    alpha: Count = 8
    n_steps: Count = 400
    batch_size: Count = 1
    learning_rates: tuple[Positive, ...] = LEARNING_RATES

    @checked
    @warned_once()
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> LowRank:
        """The adapters trained with the learning rate of the best validation accuracy.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the initial values and the order of the items.

        Raises:
            SitelensError: for a task without training or validation items, or if the loss is not finite at any learning
                rate.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        made_for, origin = model.fingerprint(), Origin.of(model, task, seed=seed)
        rows = prompts_with_answers(task, task.train, model)
        candidates = {}
        for rate in self.learning_rates:
            adapters, passes = Adapters(model, self.rank, self.alpha), Passes(model)
            passes.adapt(adapters.hooks)
            generator = torch.Generator().manual_seed(seed)
            for name, layers in adapters.weights.items():
                for weight in layers:  # standard initialization: A uniform, B zero, so no effect at first
                    bound = weight.shape[1] ** -0.5 if name.endswith("A") else 0.0
                    start = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float32) - 1
                    weight.copy_(bound * start).requires_grad_()
            flat = [weight for layers in adapters.weights.values() for weight in layers]
            optimizer = torch.optim.AdamW(flat, lr=rate)
            for index in shuffled_batches(
                rows, self.n_steps, min(self.batch_size, len(rows)), f"lora/{task.name}/{seed}"
            ):
                optimizer.zero_grad()
                answer_loss([rows[i] for i in index], passes).backward(inputs=flat)
                optimizer.step()
            weights = {
                name: torch.stack([w.detach().cpu() for w in layers]) for name, layers in adapters.weights.items()
            }
            candidates[rate] = LowRank(weights, self.alpha, made_for, origin)
        return candidates[best_on_valid(task, candidates, model)]

    def n_trained(self, condition: Condition) -> int:
        """Number of entries of all adapters."""
        assert isinstance(condition, LowRank)
        return sum(weights.numel() for weights in condition.weights.values())
