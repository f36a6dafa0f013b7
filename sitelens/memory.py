"""What fits: rows split into chunks that stay within the memory budget, and how much a row needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sitelens.defaults import SitelensError
from sitelens.models import Model

MAX_ROWS = 64  # of one last-token batch: past this the time per row no longer falls
MAX_TOKENS = 2048  # of one full forward, likewise


def chunks(
    lengths: Sequence[int],
    cost: Callable[[int], int],
    budget: int,
    max_rows: int = 10**9,
    max_tokens: int = 10**9,
    same_length: bool = False,
) -> list[list[int]]:
    """Split rows into chunks of like length: shortest first, each within the budget when padded (or one row).

    `cost` is the bytes that one row of a given length needs. With `same_length` no chunk needs any padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    parts: list[list[int]] = []
    for i in order:
        rows = len(parts[-1]) + 1 if parts else 0
        fits = not (same_length and parts and lengths[parts[-1][0]] != lengths[i])
        fits = fits and rows <= max_rows and rows * lengths[i] <= max_tokens and rows * cost(lengths[i]) <= budget
        if parts and fits:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def prefix_bytes(model: Model, length: int) -> int:
    """Bytes that one prompt of `length` tokens takes in a PrefixCache."""
    config = model.cfg
    kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    return 2 * config.n_layers * kv_heads * config.d_head * _itemsize(model) * max(length - 1, 0)


def forward_bytes(model: Model, length: int) -> int:
    """Bytes that one row of a full forward without gradient needs at most while it runs, its prefix included."""
    config = model.cfg
    wide = 8 * config.d_model + 6 * config.n_heads * config.d_head + 4 * _d_mlp(model)
    attention = ((config.n_layers + 5) * config.n_heads + 2) * length  # the bridge keeps every layer's weights
    return prefix_bytes(model, length + 1) + length * (wide + attention) * max(4, _itemsize(model))


def step_bytes(model: Model, length: int, gradient: bool) -> int:
    """Bytes that one row of a last-token step needs: copies of the prefix, activations, logits."""
    config = model.cfg
    per_head = 2 * config.d_head + 6  # keys and values repeated for each query head, scores
    layer = config.n_heads * per_head * length + 2 * prefix_bytes(model, length + 1) // (
        _itemsize(model) * config.n_layers
    )
    layer += 16 * config.d_model + 10 * config.n_heads * config.d_head + 8 * _d_mlp(model)
    layers = config.n_layers if gradient else 1
    own = config.n_layers * config.n_heads * config.d_head * (3 if gradient else 1)
    return (layers * layer + own) * max(4, _itemsize(model)) + prefix_bytes(model, length) + logits_bytes(model)


def logits_bytes(model: Model) -> int:
    """Bytes that one row's logits take with what is computed from them."""
    return 5 * model.cfg.d_vocab * max(4, _itemsize(model))


def _d_mlp(model: Model) -> int:
    experts = getattr(model.cfg, "experts_per_token", None) or 1
    return (model.cfg.d_mlp or 4 * model.cfg.d_model) * experts


def _itemsize(model: Model) -> int:
    return next(model.original_model.parameters()).element_size()


@contextmanager
def out_of_memory_is_named(hint: str = "lower memory_budget (sl.settings.memory_budget)") -> Iterator[None]:
    """Turn the allocator's error into one that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise SitelensError(f"out of memory: {hint}") from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise SitelensError(f"out of memory: {hint}") from error
        raise
