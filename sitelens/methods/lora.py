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
    """Adapters of rank 8 on q and v, trained on whole answers (AdamW); the learning rate is chosen on valid.

    As many steps of as many items as SITE takes; the rest are peft's defaults (no dropout).
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
        """The adapters of the learning rate that is best on valid.

        Raises:
            SitelensError: for a task without training or validation items, or if the loss is not finite at any
                of the rates.
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
                for weight in layers:  # the usual start: A uniform, B zero, so that nothing changes
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
        """All entries of the adapters."""
        assert isinstance(condition, LowRank)
        return sum(weights.numel() for weights in condition.weights.values())
