"""Implicit in-context learning (Li et al. 2024, arXiv 2405.14660): outputs mixed with those of demonstrations."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Positive, Seed, Share
from sitelens.conditions.base import Condition
from sitelens.conditions.streams import MODULES, LinearCombination, combining, output_points
from sitelens.engine.batches import task_batch
from sitelens.engine.capture import mean_states
from sitelens.engine.network import Passes
from sitelens.engine.prompts import Prompt, few_shot_prompt
from sitelens.errors import warned_once
from sitelens.methods.base import Method
from sitelens.methods.items import shuffled_batches, zero_shot
from sitelens.methods.losses import next_loss
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.models.provenance import Origin
from sitelens.tasks import Example, Task, load_task

START = (0.1, 1.0)  # initial a (of the context vector) and b (of the output)
CLOSED, PER_LABEL, OPEN = 10, 5, 10  # most answers of a closed task; demonstrations per answer; of an open task


@checked
@dataclass(frozen=True, kw_only=True)
class I2CL(Method):
    """Attention and MLP outputs mixed linearly with context vectors; four trained numbers per layer.

    Each demonstration is run alone up to its newline; its attention and MLP outputs, averaged over demonstrations, are
    the context vectors. Then the coefficients a (of the context vector, initially 0.1) and b (of the output itself,
    initially 1) are trained with AdamW on the same demonstrations as zero-shot prompts. The loss is the cross-entropy
    of the answer's first token over the full vocabulary. Nothing is chosen on valid.

    Attributes:
        n_demonstrations: training items to use; None for 5 per answer if a task has at most 10 different answers (as
            published), else 10 in all.
        epochs: passes over the demonstrations.
        batch_size: demonstrations per step.
        lr: peak learning rate; see `cosine`.
        weight_decay: that of AdamW.
        warm_up: share of all steps in which the learning rate rises.
        noise: standard deviation of training noise per coordinate of an output, as a share of its norm.

    Source:
        Li et al. 2024, arXiv 2405.14660. Their code evaluates over the labels only, and reshuffles all demonstrations
        for every batch; here each is used once before any is used again.
    """

    name = "I2CL"
    version = 4
    n_demonstrations: Count | None = None
    epochs: Count = 100
    batch_size: Count = 2
    lr: Positive = 0.01
    weight_decay: float = 1e-3
    warm_up: Share = 0.05
    noise: float = 0.001

    @checked
    @warned_once()
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> LinearCombination:
        """The context vectors with their trained coefficients.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the demonstrations, their order in training and the noise.

        Raises:
            SitelensError: for a task without training or validation items, or if the loss is not finite.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        items = demonstrations(task, self.n_demonstrations, seed)
        tokenizer = model.tokenizer
        shown = []
        for item in items:
            prompt = few_shot_prompt(task, [], item, tokenizer)
            shown.append(Prompt(prompt.text + prompt.answers[0] + "\n", (), prompt.special_tokens))
        layers = model.shape.layers
        points = output_points(model)
        context = mean_states(task_batch(task, shown, model), points, model).reshape(layers, len(MODULES), -1)
        batch = zero_shot(task, items, model)
        rows = [(ids, len(ids) - 1, [answer]) for ids, answer in zip(batch.ids, batch.answer.tolist(), strict=True)]
        device = model.device
        context = context.to(device)
        shape = layers, len(MODULES)
        a, b = (torch.full(shape, start, device=device, dtype=torch.float32, requires_grad=True) for start in START)
        optimizer = torch.optim.AdamW([a, b], lr=self.lr, weight_decay=self.weight_decay)
        steps = self.epochs * max(1, len(items) // self.batch_size)
        rate = functools.partial(cosine, warm_up=int(self.warm_up * steps), steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        generator = torch.Generator().manual_seed(seed)
        passes = Passes(model, combining(context, a, b, self.noise, generator, points=points))
        for index in shuffled_batches(items, steps, min(self.batch_size, len(items)), f"i2cl/train/{task.name}/{seed}"):
            optimizer.zero_grad()
            next_loss([rows[i] for i in index], passes).backward(inputs=[a, b])
            optimizer.step()
            schedule.step()
        made_for = model.fingerprint(), Origin.of(model, task, seed=seed)
        return LinearCombination(context.cpu(), a.detach().cpu(), b.detach().cpu(), *made_for)

    def n_trained(self, condition: Condition) -> int:
        """Number of trained coefficients: a and b for attention and MLP of each layer."""
        assert isinstance(condition, LinearCombination)
        return condition.a.numel() + condition.b.numel()


def demonstrations(task: Task, n: int | None, seed: int) -> list[Example]:
    """Shuffled training items: `n` of them; by default 5 per answer if there are at most 10 answers, else 10 in all."""
    (order,) = shuffled_batches(task.train, 1, len(task.train), f"i2cl/{task.name}/{seed}")
    items = [task.train[i] for i in order]
    labels = dict.fromkeys(item.output for item in items)
    if n is None and len(labels) <= CLOSED:
        return [item for label in labels for item in [one for one in items if one.output == label][:PER_LABEL]]
    return items[: OPEN if n is None else n]


def cosine(step: int, warm_up: int, steps: int) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine decay, as in the public code.

    It rises linearly from 0 at step 0 to 1 at step `warm_up`. After that it follows a half cosine from 1 at step 0 to 0
    at `steps`, and so drops a little when the warm-up ends.
    """
    return step / warm_up if step < warm_up or step == warm_up > 0 else 0.5 * (1 + math.cos(math.pi * step / steps))
