"""Memory: the bytes that a row needs, and rows split into chunks that stay within the memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sitelens.engine.network import Passes
from sitelens.models.model import Model

MAX_ROWS = 64  # of a last-token batch: larger batches are no faster per row
MAX_TOKENS = 2048  # of a full forward pass, likewise


def chunks(
    lengths: Sequence[int],
    cost: Callable[[int], int],
    budget: int,
    max_rows: int = 10**9,
    max_tokens: int = 10**9,
    same_length: bool = False,
) -> list[list[int]]:
    """Row indices in chunks of similar length, shortest first; each chunk fits the budget or is a single row.

    Args:
        lengths: tokens per row.
        cost: bytes that one row of a given length needs.
        budget: bytes per chunk, with rows padded to the longest of the chunk.
        max_rows: most rows per chunk.
        max_tokens: most tokens per chunk, padding included.
        same_length: put only rows of equal length into a chunk, so that none needs padding.
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


def chunk_grid(
    lengths: Sequence[int], variants: int, cost: Callable[[int], int], budget: int
) -> list[tuple[list[int], list[int]]]:
    """Split the rows x variants grid into chunks that fit the budget: (row indices, variant indices) per chunk.

    A chunk is several rows in all variants or, if these do not fit, one row in some of its variants.
    """
    if variants <= MAX_ROWS and variants * cost(max(lengths)) <= budget:
        together = chunks(lengths, lambda length: variants * cost(length), budget, max_rows=MAX_ROWS // variants)
        return [(rows, list(range(variants))) for rows in together]
    return [
        ([row], which)
        for row, length in enumerate(lengths)
        for which in chunks([length] * variants, cost, budget, max_rows=MAX_ROWS)
    ]


def prefix_bytes(model: Model, length: int) -> int:
    """Bytes that one prompt of `length` tokens needs in a PrefixCache."""
    config = model.cfg
    kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    return 2 * config.n_layers * kv_heads * config.d_head * _itemsize(model) * max(length - 1, 0)


def forward_bytes(model: Model, length: int) -> int:
    """Upper bound of the bytes that one row of a full forward pass without gradient needs, its prefix included."""
    config = model.cfg
    wide = 8 * config.d_model + 6 * config.n_heads * config.d_head + 4 * _d_mlp(model)
    attention = ((config.n_layers + 5) * config.n_heads + 2) * length  # the bridge keeps attention patterns
    return prefix_bytes(model, length + 1) + length * (wide + attention) * max(4, _itemsize(model))


def step_cost(of: Model | Passes, gradient: bool, hooked: bool = False) -> Callable[[int], int]:
    """A function from a row's length to the bytes that it needs in a last-token step: prefix, activations, logits.

    Args:
        of: a model, or passes of it.
        gradient: whether activations are kept for the backward pass.
        hooked: whether hooks will be installed, so that the pass goes through the bridge.
    """
    passes = Passes.of(of)
    model = passes.model
    if passes.user_hooked:  # whole prompts are run
        times = model.shape.layers if gradient else 1
        return lambda length: times * forward_bytes(model, length) + logits_bytes(model)
    config, itemsize = model.cfg, _itemsize(model)
    layers = config.n_layers if gradient else 1
    fixed = 16 * config.d_model + 10 * config.n_heads * config.d_head + 8 * _d_mlp(model)
    own = config.n_layers * config.n_heads * config.d_head * (3 if gradient else 1)
    bridged = hooked or not passes.can_bypass_bridge

    def cost(length: int) -> int:
        layer = prefix_bytes(model, length + 1) // itemsize // config.n_layers
        if bridged:  # keys and values are copied, concatenated with the token's own, and repeated for each query head
            layer = 2 * layer + config.n_heads * (2 * config.d_head + 6) * length
        else:  # attention reads those of the selected prompts, one layer at a time
            layer += 5 * config.n_heads * length
        copied = prefix_bytes(model, length) if bridged else 0
        return (layers * (layer + fixed) + own) * max(4, itemsize) + copied + logits_bytes(model)

    return cost


def logits_bytes(model: Model) -> int:
    """Bytes that one row's logits need, with what is computed from them."""
    return 5 * model.d_vocab * max(4, _itemsize(model))


def _d_mlp(model: Model) -> int:
    experts = getattr(model.cfg, "experts_per_token", None) or 1
    return (model.cfg.d_mlp or 4 * model.d_model) * experts


def _itemsize(model: Model) -> int:
    return model.dtype.itemsize
