"""Estimated cost of the parts of an experiment, for progress bars and estimates of the time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sitelens.engine.lengths import item_sizes
from sitelens.methods.site.config import TrainConfig
from sitelens.models.model import Model
from sitelens.tasks import Task

STEP_TOKENS = 25  # cost of one training step over a cached prefix, in prompt tokens


def workload(
    tasks: Sequence[Task], model: Model, *, n_prompts: int, n_shots: int, n_items: int | None, config: TrainConfig
) -> dict[str, dict[str, float]]:
    """Estimated cost in tokens by task name, and in each by part.

    The parts are "embed", "train", "prompt" (zero-shot and few-shot evaluation) and "patch" (evaluation with patched
    heads).
    """
    return {task.name: _of_task(task, model, n_prompts, n_shots, n_items, config) for task in tasks}


def total(work: dict[str, dict[str, float]], *parts: str) -> float:
    """Summed cost of these parts over all tasks, in tokens."""
    return sum((costs[part] for costs in work.values() for part in parts), 0.0)


def _of_task(
    task: Task, model: Model, n_prompts: int, n_shots: int, n_items: int | None, config: TrainConfig
) -> dict[str, float]:
    tokenizer: Any = model.tokenizer
    sizes = item_sizes(task.train[:50], task, tokenizer) or [1]
    item = sum(sizes) / len(sizes)
    n_test = min(len(task.test), n_items or len(task.test))
    return {
        "embed": n_prompts * item * (n_shots + 1),
        "train": config.n_steps * config.batch_size * (item + STEP_TOKENS),
        "prompt": n_test * item * (n_shots + 2),
        "patch": n_test * item,
    }
