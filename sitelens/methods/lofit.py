"""LoFiT (Yin et al. 2024, arXiv 2406.01563): heads selected by trained scales, then offsets trained on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Positive, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.heads import HeadOffsets, changing
from sitelens.engine.network import Passes
from sitelens.methods.base import Method
from sitelens.methods.items import prompts_with_answers, shuffled_batches
from sitelens.methods.losses import answer_loss
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.tasks import Task, load_task

MAX_GRAD_NORM = 1.0


@checked
@dataclass(frozen=True, kw_only=True)
class LoFiT(Method):
    """Offsets added to z of selected heads, trained on the whole answers of the training items.

    Step 1 trains a scale for every entry of z with an L1 penalty and ranks heads by the norm of their scales; step 2
    trains offsets on the highest-ranked heads. Both use AdamW with linear decay, gradients clipped to norm 1 and no
    weight decay, the defaults of transformers' Trainer. No checkpoint is chosen.

    Attributes:
        n_heads: heads with offsets; None for 3% of all.
        epochs: epochs of each step.
        batch_size: training items per batch.
        scale_lr: initial learning rate of step 1.
        l1: weight of the L1 penalty in step 1.
        offset_lr: initial learning rate of step 2.

    Source:
        Yin et al. 2024, arXiv 2406.01563. They tune rates and penalty per task; the defaults here are those for MQuAKE.
    """

    name = "LoFiT"
    version = 2
    n_heads: Count | None = None
    epochs: Count = 5
    batch_size: Count = 8
    scale_lr: Positive = 5e-3
    l1: float = 1e-3
    offset_lr: Positive = 1e-2

    @checked
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> HeadOffsets:
        """Offsets of the selected heads; zero for all others.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the initial values and the order of the items.

        Raises:
            SitelensError: for a task without training or validation items, or if the loss is not finite.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        shape = model.shape
        count = max(1, round(0.03 * shape[0] * shape[1])) if self.n_heads is None else self.n_heads
        generator = torch.Generator().manual_seed(seed)
        dtype, device = model.computing_dtype, model.device
        scales, offsets = (
            (1e-3 * torch.randn(shape, generator=generator, dtype=torch.float32)).to(device, dtype).requires_grad_()
            for _ in range(2)
        )
        rows = prompts_with_answers(task, task.train, model)
        steps = self.epochs * math.ceil(len(rows) / self.batch_size)

        def train(values: Tensor, lr: float, penalty: float, change: Callable[[Tensor, int], Tensor], key: str) -> None:
            optimizer = torch.optim.AdamW([values], lr=lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            passes = Passes(model, changing(change, shape[0]))
            for index in shuffled_batches(
                rows, steps, min(self.batch_size, len(rows)), f"lofit/{key}/{task.name}/{seed}"
            ):
                optimizer.zero_grad()
                loss = answer_loss([rows[i] for i in index], passes) + penalty * values.abs().sum()
                loss.backward(inputs=[values])
                torch.nn.utils.clip_grad_norm_([values], MAX_GRAD_NORM)
                optimizer.step()
                schedule.step()

        train(scales, self.scale_lr, self.l1, lambda z, layer: (1 + scales[layer].to(z.device)) * z, "scales")
        norms = scales.detach().norm(dim=-1).flatten()
        chosen = torch.zeros_like(norms)
        chosen[norms.sort(descending=True, stable=True).indices[:count]] = 1
        mask = chosen.reshape(*shape[:2], 1)
        train(offsets, self.offset_lr, 0.0, lambda z, layer: z + (mask[layer] * offsets[layer]).to(z.device), "offsets")
        values, origin = (mask * offsets.detach()).float().cpu(), Origin.of(model, task, seed=seed)
        return HeadOffsets(values, model.fingerprint(), origin)

    def n_trained(self, condition: Condition) -> int:
        """Number of trained parameters: one scale per entry of z, plus the offsets of the selected heads."""
        assert isinstance(condition, HeadOffsets)
        offsets = condition.offsets
        return offsets.numel() + int((offsets != 0).any(-1).sum()) * offsets.shape[-1]
