"""Losses of answers, with gradient through whole prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.errors import SitelensError
from sitelens.models.model import Model


def answer_loss(rows: Sequence[tuple[list[int], int]], model: Model | Passes) -> Float[Tensor, ""]:
    """Mean cross-entropy of all answer tokens of some rows of `prompts_with_answers`, with gradient."""
    return next_loss([(ids, len(ids) - n - 1, ids[len(ids) - n :]) for ids, n in rows], model)


def next_loss(rows: Sequence[tuple[list[int], int, list[int]]], model: Model | Passes) -> Float[Tensor, ""]:
    """Mean cross-entropy over rows (tokens, place of the first of them whose next is wanted, what is wanted there on).

    With gradient, over the whole vocabulary. Rows are padded behind their end, where causal attention never sees it;
    where the user listens, each text is run alone, up to the token whose next is wanted.

    Raises:
        SitelensError: if the loss is not finite.
    """
    passes = Passes.of(model)
    if passes.user_hooked:
        texts = [(ids[: start + i + 1], token) for ids, start, wanted in rows for i, token in enumerate(wanted)]
        loss = torch.stack([_padded_loss([(ids, len(ids) - 1, [token])], passes) for ids, token in texts]).mean()
    else:
        loss = _padded_loss(rows, passes)
    if not torch.isfinite(loss):
        dtype = passes.model.cfg.dtype
        raise SitelensError(f"the loss is not finite (dtype {dtype}): try a lower learning rate or float32")
    return loss


def _padded_loss(rows: Sequence[tuple[list[int], int, list[int]]], passes: Passes) -> Float[Tensor, ""]:
    device, width = passes.model.device, max(len(ids) for ids, _, _ in rows)
    places = sorted({start + i for _, start, wanted in rows for i in range(len(wanted))} | {width - 1})
    # The last place stands among them, wanted or not: so a lone row keeps the shapes, and the bits, it always had.
    column = {place: i for i, place in enumerate(places)}
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), len(places)), -100)
    for row, (ids, start, wanted) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, [column[start + i] for i in range(len(wanted))]] = torch.tensor(wanted)
    tokens = tokens.to(device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits = run_tokens(passes, tokens, mask, all_positions(mask), kept=torch.tensor(places))
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device))
