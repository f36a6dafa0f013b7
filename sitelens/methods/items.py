"""What the methods share: training items, mean states, gradients through prompts and answers, the choice on valid."""

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

MAX_TRAIN = 200  # training items that any method may see


def cap_training_items(task: Task) -> Task:
    """The task with at most 200 training items, the same for every method.

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
    """Prompts without demonstrations; warns where first tokens cannot tell the task's answers apart."""
    warn_of_shared_first_tokens([task], model)
    return zero_shot_batch([(task, item) for item in items], model, f"task {task.name!r}")


def prompts_of(prompts: Sequence[Any], task: Task, model: Model) -> PromptBatch:
    """Prompts as tokens, checked against the model's context."""
    return task_batch(task, prompts, model)


def shuffled_batches(items: Sequence[Any], steps: int, size: int, key: str) -> Iterator[list[int]]:
    """Places of the items in each of `steps` batches, every item once before any comes again."""
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
    """Token ids of each zero-shot prompt with its whole answer behind it, and how many of them are the answer's."""
    tokenizer = model.tokenizer
    prompts = [few_shot_prompt(task, [], item, tokenizer) for item in items]
    batch = prompts_of(prompts, task, model)
    first = [(i, prompt.answers[0]) for i, prompt in enumerate(prompts)]
    answers = [answer for answer, _ in answer_tokens(prompts, batch.ids, first, tokenizer)]
    return [(prompt + answer, len(answer)) for prompt, answer in zip(batch.ids, answers, strict=True)]
