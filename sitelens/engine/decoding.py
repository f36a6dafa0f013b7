"""Greedy decoding: one token per step after a cached prompt or, if the user has hooks, whole texts run again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sitelens.engine.forward import check_finite
from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.models.model import Model


@torch.no_grad()
def decode(
    model: Model | Passes,
    first: Float[Tensor, "row vocab"],
    cache: DynamicCache,
    mask: Bool[Tensor, "row pos"],
    tokenizer: Any,
    max_new_tokens: int,
    ends: Collection[int],
    complete: Callable[[int, str], bool] = lambda row, text: False,
    where: Callable[[int], str] = lambda row: f"prompt {row + 1}",
    prompt: Int[Tensor, "row pos"] | None = None,
) -> list[str]:
    """Greedy continuations of prompts, as decoded (white space is kept), without special tokens.

    All installed hooks act at every step.

    Args:
        model: a model, or passes with hooks.
        first: logits at the last token of each prompt.
        cache: keys and values of the whole prompts; it grows.
        mask: real tokens of the prompts.
        tokenizer: decodes the tokens.
        max_new_tokens: most tokens per row.
        ends: token ids that end a text.
        complete: `complete(row, text so far)` is True if the row needs no more tokens.
        where: names a row in error messages.
        prompt: prompts of equal length; if given, the whole text is run again for each token and `cache` is not used.
            The user's hooks, which may refer to any position, need that.

    Raises:
        SitelensError: if logits are not finite.
    """
    passes, text = Passes.of(model), prompt
    passes.prompt = None if prompt is None else prompt.shape[1]
    written: list[list[int]] = [[] for _ in range(len(first))]
    texts = [""] * len(first)
    active = list(range(len(first)))
    tokens = first.argmax(-1)
    for step in range(max_new_tokens):
        going: list[int] = []  # positions in the batch of the rows that continue
        for place, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in ends:
                continue
            written[row].append(token)
            texts[row] = tokenizer.decode(written[row], skip_special_tokens=True)
            if not complete(row, texts[row]):
                going.append(place)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(active):
            index = torch.tensor(going)  # on the CPU: layers may be on different devices
            active, mask, tokens = [active[place] for place in going], mask[index], tokens[index]
            if text is None:
                cache.batch_select_indices(index)
            else:
                text = text[index]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if text is None:
            logits = run_tokens(passes, tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)[:, -1]
        else:
            text = torch.cat([text, tokens[:, None]], dim=1)
            logits = run_tokens(passes, text, mask, all_positions(mask))[:, -1]
        check_finite(logits, lambda place, rows=active: f"{where(rows[place])}, generated token {step + 2}")  # noqa: B023
        tokens = logits.argmax(-1)
    passes.prompt = None
    return texts


def end_tokens(model: Model, tokenizer: Any) -> set[int]:
    """The token ids that end a text: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(model.network, "generation_config", None)
    listed = getattr(settings, "eos_token_id", None)
    ends = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return {end for end in ends if end is not None}
