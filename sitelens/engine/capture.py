"""What passes hook points at the last token of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.engine.batches import PromptBatch
from sitelens.engine.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.models.model import Model
from sitelens.settings import settings


def same_length_chunks(batch: PromptBatch, model: Model) -> list[list[int]]:
    """Rows in chunks of one length each, which need no padding and fit the memory budget."""
    cost = functools.partial(forward_bytes, model)
    return chunks(batch.lengths, cost, settings.budget(), max_tokens=MAX_TOKENS, same_length=True)


@torch.no_grad()
def run_with_callbacks(tokens: Int[Tensor, "row pos"], model: Model, look: dict[str, Callable[[Tensor], None]]) -> None:
    """Run whole prompts of one length, unembedding nothing, and show the tensors at some hook points."""

    def hook_of(see: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any = None) -> None:
            see(tensor)

        return hook

    tokens = tokens.to(model.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    passes = Passes(model, [(name, hook_of(see)) for name, see in look.items()])
    run_tokens(passes, tokens, mask, all_positions(mask), kept=0)


def mean_states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "point d_model"]:
    """Means over prompts of what passes some hook points at the last token."""
    return states(batch, points, model).mean(0).to(torch.float32)


def states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "prompt point d_model"]:
    """What passes some hook points at the last token of each prompt, in float64."""
    found = torch.zeros(len(batch), len(points), model.d_model, dtype=torch.float64)
    for index in same_length_chunks(batch, model):

        def keep(place: int, rows: list[int] = index) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                found[rows, place] = x[:, -1].double().cpu()

            return see

        run_with_callbacks(batch.rows(index).tokens, model, {point: keep(place) for place, point in enumerate(points)})
    return found
