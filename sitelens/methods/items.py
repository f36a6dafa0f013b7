"""Training items, batches and prompts shared by the methods."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sitelens.engine.batches import PromptBatch, answer_tokens, task_batch, zero_shot_batch
from sitelens.engine.prompts import few_shot_prompt
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.models.model import Model
from sitelens.tasks import Example, Task

MAX_TRAIN = 200  # training items per task for every method


def cap_training_items(task: Task) -> Task:
    """The task with at most 200 training items, the same sample for every method and seed.

    Raises:
        SitelensError: if there are no training or no validation items.
    """
    for split in ("train", "valid"):
        task.nonempty(split)
    if len(task.train) <= MAX_TRAIN:
        return task
    rng = random.Random(f"sitelens/fitting/{task.name}")
    return replace(task, train=tuple(task.train[i] for i in sorted(rng.sample(range(len(task.train)), MAX_TRAIN))))


def zero_shot(task: Task, items: Sequence[Example], model: Model) -> PromptBatch:
    """Zero-shot prompts of the items as one batch; warns if answers of the task share a first token."""
    warn_of_shared_first_tokens([task], model)
    return zero_shot_batch([(task, item) for item in items], model, f"task {task.name!r}")


def shuffled_batches(items: Sequence[Any], steps: int, size: int, key: str) -> Iterator[list[int]]:
    """Yields the item indices of each batch; every item is used once before any is used again.

    Args:
        items: the items to draw from.
        steps: number of batches.
        size: items per batch.
        key: seeds the shuffling; the same key gives the same batches.
    """
    rng = random.Random(f"sitelens/batches/{key}")
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            more = list(range(len(items)))
            rng.shuffle(more)
            queue += more
        yield queue[:size]
        del queue[:size]


def prompts_with_answers(task: Task, items: Sequence[Example], model: Model) -> list[tuple[list[int], int]]:
    """Per item: token ids of the zero-shot prompt followed by its full answer, and the number of answer tokens."""
    tokenizer = model.tokenizer
    prompts = [few_shot_prompt(task, [], item, tokenizer) for item in items]
    batch = task_batch(task, prompts, model)
    first = [(i, prompt.answers[0]) for i, prompt in enumerate(prompts)]
    answers = [answer for answer, _ in answer_tokens(prompts, batch.ids, first, tokenizer)]
    return [(prompt + answer, len(answer)) for prompt, answer in zip(batch.ids, answers, strict=True)]
