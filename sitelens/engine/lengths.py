"""Lengths: how many tokens items need in prompts, and which items of a task fit into a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sitelens.engine.batches import encode_prompts
from sitelens.engine.prompts import few_shot_prompt
from sitelens.tasks import Example, Task


def item_sizes(items: Sequence[Example], template: str | Task, tokenizer: Any) -> list[int]:
    """The number of tokens that each item adds to a prompt as a demonstration, plus one as a margin."""
    if not items:
        return []
    alone = few_shot_prompt(template, [], items[0], tokenizer)
    behind = [few_shot_prompt(template, [item], items[0], tokenizer) for item in items]
    prompts = [alone, *behind]
    first, *both = map(len, encode_prompts([prompt.text for prompt in prompts], prompts, tokenizer))
    return [size - first + 1 for size in both]


def within_context(task: Task, tokenizer: Any, room: int, n_shots: int) -> Task:
    """The task without the items that are too long for few-shot prompts of at most `room` tokens.

    An item is dropped from its split if it needs, with its answer, more than 1/(n_shots + 1) of the room; so every
    prompt fits, whichever items it contains. The task's note says how many were dropped.
    """
    splits = {split: task.split(split) for split in ("train", "valid", "test")}
    everything = [item for items in splits.values() for item in items]
    if not everything:
        return task
    sizes = item_sizes(everything, task, tokenizer)
    alone = few_shot_prompt(task, [], everything[0], tokenizer)
    around = max(
        0, len(encode_prompts([alone.text], [alone], tokenizer)[0]) - sizes[0]
    )  # tokens that are not repeated per item, such as those that a chat template adds once
    limit = (room - around) // (n_shots + 1)
    kept = iter(size <= limit for size in sizes)
    chosen = {split: tuple(item for item in items if next(kept)) for split, items in splits.items()}
    dropped = len(everything) - sum(map(len, chosen.values()))
    if not dropped:
        return task
    note = f"{dropped} of {len(everything)} items are dropped: longer than {limit} tokens"
    return replace(task, **chosen, note="; ".join(text for text in (task.note, note) if text))
