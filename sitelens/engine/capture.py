"""Captures: activations at hook points, mostly at the last token of prompts. Nothing is edited."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.engine.batches import PromptBatch
from sitelens.engine.forward import Hook
from sitelens.engine.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.engine.network import Passes, all_positions, run_right_padded, run_tokens
from sitelens.models.model import Model, z_hook
from sitelens.settings import settings


def same_length_chunks(batch: PromptBatch, model: Model) -> list[list[int]]:
    """Row indices in chunks of equal prompt length, which need no padding and fit the memory budget."""
    cost = functools.partial(forward_bytes, model)
    return chunks(batch.lengths, cost, settings.budget(), max_tokens=MAX_TOKENS, same_length=True)


@torch.no_grad()
def run_with_callbacks(
    tokens: Int[Tensor, "row pos"], model: Model, callbacks: dict[str, Callable[[Tensor], None]]
) -> None:
    """Run whole prompts of equal length, without unembedding, and call `callbacks[point]` with each point's tensor."""
    tokens = tokens.to(model.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    passes = Passes(model, [(point, _hook(callback)) for point, callback in callbacks.items()])
    run_tokens(passes, tokens, mask, all_positions(mask), kept=0)


def _hook(callback: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(tensor: Tensor, hook: Any = None) -> None:
        callback(tensor)

    return hook


class LastTokenCapture:
    """Hooks that store the activations at some hook points at the last token of each row, from the latest pass.

    Attributes:
        hooks: the hooks to install.
        ends: each row's last position (None: -1, for rows of equal length or left-padded ones).
    """

    def __init__(self, points: Sequence[str]) -> None:
        self.hooks: list[Hook] = [(point, _hook(functools.partial(self._keep, i))) for i, point in enumerate(points)]
        self.ends: Int[Tensor, " row"] | None = None
        self._states: dict[int, Tensor] = {}

    def _keep(self, i: int, x: Tensor) -> None:
        if self.ends is None:
            self._states[i] = x[:, -1].clone()
        else:
            self._states[i] = x[torch.arange(len(x), device=x.device), self.ends.to(x.device)].clone()

    def states(self, device: Any) -> Float[Tensor, "row point *shape"]:
        """The stored activations, in the order of the hook points."""
        return torch.stack([self._states[i].to(device) for i in range(len(self.hooks))], dim=1)


@torch.no_grad()
def last_token_states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "row point *shape"]:
    """Activations at each hook point, at the last token of each prompt; no logits are computed.

    The prompts run as one right-padded batch or, if the user has hooks on the model, as one batch per length.
    """
    lengths = torch.tensor(batch.lengths)
    capture = LastTokenCapture(points)
    passes = Passes(model, capture.hooks)
    alike = lengths if passes.user_hooked else torch.zeros_like(lengths)
    groups = [(alike == kind).nonzero().flatten() for kind in alike.unique()]
    parts = []
    for rows in groups:
        capture.ends = lengths[rows] - 1
        run_right_padded(batch.rows(rows.tolist()).tokens, lengths[rows], passes)
        parts.append(capture.states(model.device))
    return torch.cat(parts)[torch.cat(groups).argsort().to(parts[0].device)]


def capture_z(batch: PromptBatch, model: Model) -> Float[Tensor, "row layer head d_head"]:
    """z of every head at the last token of each prompt (see `last_token_states`)."""
    return last_token_states(batch, [z_hook(layer) for layer in range(model.shape[0])], model)


def states_in_float64(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "prompt point d_model"]:
    """`last_token_states` of the residual stream, in float64 on the CPU, run in chunks that fit the memory budget."""
    states = torch.zeros(len(batch), len(points), model.d_model, dtype=torch.float64)
    for index in same_length_chunks(batch, model):
        states[index] = last_token_states(batch.rows(index), points, model).double().cpu()
    return states


def mean_states(batch: PromptBatch, points: Sequence[str], model: Model) -> Float[Tensor, "point d_model"]:
    """The mean of `states_in_float64` over prompts, in float32."""
    return states_in_float64(batch, points, model).mean(0).to(torch.float32)
