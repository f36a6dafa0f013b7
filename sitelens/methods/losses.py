"""Cross-entropy of answers, with gradient through whole prompts."""

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
    """Mean cross-entropy (nats) over all answer tokens, with gradient.

    Args:
        rows: (token ids of prompt and answer, number of answer tokens) per item, from `prompts_with_answers`.
        model: the model, or passes through it with hooks or adapters.
    """
    return next_loss([(ids, len(ids) - n - 1, ids[len(ids) - n :]) for ids, n in rows], model)


def next_loss(rows: Sequence[tuple[list[int], int, list[int]]], model: Model | Passes) -> Float[Tensor, ""]:
    """Mean cross-entropy (nats) over all target tokens and the full vocabulary, with gradient.

    Rows are right-padded, which causal attention never sees. If the user has installed hooks on the model, every target
    is run by itself instead, on a text that ends where the target is predicted.

    Args:
        rows: (token ids, position at which the first target is predicted, targets) per row; the following targets are
            predicted at the following positions.
        model: the model, or passes through it with hooks or adapters.

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
    # Always include the last position: a single row then has the same shapes, hence bit-identical results.
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
