"""What the files of this folder share: which heads, which prompts at once, and hooks that only look."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.defaults import SitelensError, settings
from sitelens.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.models import Model, head_shape
from sitelens.network import all_positions, run_tokens
from sitelens.prompts import PromptBatch
from sitelens.tasks import Example, Task


def checked_heads(heads: Iterable[tuple[int, int]], model: Model) -> list[tuple[int, int]]:
    """The heads as (layer, head).

    Raises:
        SitelensError: if the model has no such head.
    """
    layers, width, _ = head_shape(model)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    for layer, head in chosen:
        if not (0 <= layer < layers and 0 <= head < width):
            raise SitelensError(f"there is no head ({layer}, {head}): layers 0 to {layers - 1}, heads 0 to {width - 1}")
    return chosen


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
    with model.hooks(fwd_hooks=[(name, hook_of(see)) for name, see in look.items()]):
        run_tokens(model, tokens, mask, all_positions(mask), kept=0)
