"""What the files of this folder share: which heads, which prompts (also one's own), and hooks that only look."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.defaults import SitelensError, settings
from sitelens.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.models import Model, context_length, head_shape, own_tokenizer
from sitelens.network import Passes, all_positions, run_tokens
from sitelens.prompts import Prompt, PromptBatch, tokenize
from sitelens.selection import Heads, head_pairs
from sitelens.tasks import ENDINGS, Example, Task, load_task


def checked_heads(heads: Heads, model: Model) -> list[tuple[int, int]]:
    """The heads as (layer, head).

    Raises:
        SitelensError: as `head_pairs`.
    """
    return head_pairs(heads, *head_shape(model)[:2])


def task_or_texts(given: Task | str | Sequence[str]) -> Task | list[str]:
    """The task, or prompts of one's own in its place: a list of texts, or one text with white space.

    No name of a task has white space, and the name of a task's file ends in .json, .csv or the like.

    Raises:
        SitelensError: as `load_task`.
    """
    if isinstance(given, str):
        own = any(map(str.isspace, given)) and not given.lower().endswith(ENDINGS)
        return [given] if own else load_task(given)
    if isinstance(given, Task):
        return given
    if not given or not all(isinstance(text, str) for text in given):
        raise SitelensError(f"expected a task or a list of prompts, not {given!r}")
    return list(given)


def text_batch(texts: Sequence[str], model: Model, answer: str | Sequence[str] | None = None) -> PromptBatch:
    """Prompts as they stand, with one answer for all or one for each, as it continues them (" cold").

    Raises:
        SitelensError: if a text is empty or too long, or the number of answers is another.
    """
    answers = [answer] * len(texts) if answer is None or isinstance(answer, str) else list(answer)
    if len(answers) != len(texts):
        raise SitelensError(
            f"there are {len(texts)} prompts and {len(answers)} answers: give one for all, or one for each"
        )
    prompts = [Prompt(text, () if one is None else (one,)) for text, one in zip(texts, answers, strict=True)]
    return tokenize(prompts, own_tokenizer(model), context_length(model))


def all_heads(model: Model) -> list[tuple[int, int]]:
    """Every head of a model, by layer."""
    layers, heads, _ = head_shape(model)
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def per_head(values: Float[Tensor, "layer head"], name: str) -> pd.DataFrame:
    """One row a head: layer, head, and the value under `name`."""
    layers, heads = values.shape
    index = [(layer, head) for layer in range(layers) for head in range(heads)]
    return pd.DataFrame(index, columns=["layer", "head"]).assign(**{name: values.flatten().tolist()})


def valid_items(task: Task) -> tuple[Example, ...]:
    """The validation items.

    Raises:
        SitelensError: if there is none.
    """
    if not task.valid:
        raise SitelensError(f"task {task.name!r} has no valid items")
    return task.valid


def like_prompts(batch: PromptBatch, model: Model) -> list[list[int]]:
    """Rows in chunks of one length each, which need no padding and fit the memory budget."""
    cost = functools.partial(forward_bytes, model)
    return chunks(batch.lengths, cost, settings.budget(None), max_tokens=MAX_TOKENS, same_length=True)


@torch.no_grad()
def watch(tokens: Int[Tensor, "row pos"], model: Model, look: dict[str, Callable[[Tensor], None]]) -> None:
    """Run whole prompts of one length, unembedding nothing, and show the tensors at some hook points."""

    def hook_of(see: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any = None) -> None:
            see(tensor)

        return hook

    tokens = tokens.to(model.cfg.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    passes = Passes(model, [(name, hook_of(see)) for name, see in look.items()])
    run_tokens(passes, tokens, mask, all_positions(mask), kept=0)
