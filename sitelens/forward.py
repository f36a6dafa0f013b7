"""Forward passes: prefixes computed once, last-token logits under a head edit, capture of z, greedy decoding.

Nothing before the last prompt token depends on an edit made there. So the keys and values of all tokens but the
last (the prefix) are computed once, without gradient, and everything else runs one token per prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sitelens.memory import MAX_TOKENS, chunks, forward_bytes, out_of_memory_is_named
from sitelens.models import Model, head_shape, z_hook
from sitelens.prompts import PromptBatch

Mixing = Literal["convex", "additive"]
Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """The one intervention, for each row: z <- keep * z + add at the last prompt token of every head."""

    keep: Float[Tensor, "row layer head"]
    add: Float[Tensor, "row layer head d_head"]

    @staticmethod
    def mix(
        alpha: Float[Tensor, "row layer head"],
        vectors: Float[Tensor, "row layer head d_head"],
        mixing: Mixing = "convex",
    ) -> HeadEdit:
        """Convex: z <- (1 - alpha) z + alpha v (the paper's). Additive: z <- z + alpha v."""
        weight = rearrange(alpha, "row layer head -> row layer head 1")
        return HeadEdit(1 - alpha if mixing == "convex" else torch.ones_like(alpha), weight * vectors)

    @staticmethod
    def stack(edits: Sequence[HeadEdit]) -> HeadEdit:
        """The rows of all edits, one after the other."""
        return HeadEdit(torch.cat([e.keep for e in edits]), torch.cat([e.add for e in edits]))

    def rows(self, index: Int[Tensor, " chosen"]) -> HeadEdit:
        """The chosen rows; a row may be chosen often."""
        return HeadEdit(self.keep[index], self.add[index])

    def apply(self, z: Float[Tensor, "row pos head d_head"], layer: int) -> Float[Tensor, "row pos head d_head"]:
        """A new z whose last position is edited; the mixing runs in this edit's dtype, the result has z's."""
        keep = rearrange(self.keep[:, layer], "row head -> row 1 head 1").to(z.device)
        add = rearrange(self.add[:, layer], "row head d_head -> row 1 head d_head").to(z.device)
        edited = (z[:, -1:].to(keep.dtype) * keep + add).to(z.dtype)
        return edited if z.shape[1] == 1 else torch.cat([z[:, :-1], edited], dim=1)

    def hooks(self) -> list[Hook]:
        """As TransformerLens hooks for one forward pass over whole prompts."""
        return _edit_hooks(self.keep.shape[1], lambda: self)


def _edit_hooks(layers: int, current: Callable[[], HeadEdit | None]) -> list[Hook]:
    def hook(z: Tensor, hook: Any = None, *, layer: int) -> Tensor | None:
        edit = current()
        return None if edit is None else edit.apply(z, layer)

    return [(z_hook(layer), functools.partial(hook, layer=layer)) for layer in range(layers)]


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Keys and values of all but the last prompt token, never written to, and that last token.

    keys, values: a tensor `[row kv_head pos-1 d]` a layer (none where no prompt has more than one token).
    mask: real tokens, the last one included; last: the last token; rows are left-padded.
    """

    keys: tuple[Float[Tensor, "row _ prefix _"], ...]
    values: tuple[Float[Tensor, "row _ prefix _"], ...]
    mask: Bool[Tensor, "row pos"]
    last: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.last)

    @staticmethod
    def of(batch: PromptBatch, model: Model, budget: int) -> PrefixCache:
        """Run every prompt but its last token, in chunks of like length that need at most `budget` bytes.

        The result itself comes on top: `prefix_bytes` tells how much.
        """
        device = model.cfg.device
        width = batch.tokens.shape[1] - 1
        keys: list[Tensor] = []
        values: list[Tensor] = []
        cost = functools.partial(forward_bytes, model)
        for index in chunks(batch.lengths, cost, budget, max_tokens=MAX_TOKENS):
            part = batch.rows(index)
            if part.tokens.shape[1] == 1:
                continue
            layers, places = _prefix_layers(part, model)
            if not keys:
                keys, values = ([_room(kept, len(batch), width) for kept in side] for side in zip(*layers, strict=True))
            rows = torch.tensor(index)
            for whole_keys, whole_values in zip(keys, values, strict=True):
                for whole, kept in zip((whole_keys, whole_values), layers.pop(0), strict=True):  # and let it go
                    whole[rows.to(whole.device), :, width - kept.shape[2] :] = _left_padded(kept, places)
        return PrefixCache(tuple(keys), tuple(values), batch.mask.to(device), batch.tokens[:, -1].to(device))

    def rows(self, index: Int[Tensor, " chosen"]) -> PrefixCache:
        """The chosen rows (a row may be chosen often), without the padding that none of them needs."""
        index = index.to(self.mask.device)
        mask = self.mask[index]
        start = mask.shape[1] - int(mask.sum(-1).max())
        keys, values = (
            tuple(tensor[index.to(tensor.device), :, start:] for tensor in kind) for kind in (self.keys, self.values)
        )
        return PrefixCache(keys, values, mask[:, start:], self.last[index])

    def positions(self) -> Int[Tensor, " row"]:
        """The last token's position, counted from the first real token."""
        return self.mask.sum(-1) - 1

    def cache(self, growing: bool = False) -> DynamicCache:
        """For one forward pass; a growing one also keeps the new tokens, in tensors of its own."""
        cache = DynamicCache()
        for keys, values in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer() if growing else _ReadOnlyLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache


class _ReadOnlyLayer(DynamicLayer):
    """Shows stored keys and values followed by new ones, and keeps only the former."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)  # type: ignore[list-item]


class LastToken:
    """Runs the last prompt token over a prefix, with hooks installed once for many calls.

    with LastToken(model) as run:
        logits = run(prefix, edit)     # [row vocab], differentiable in the edit
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._edit: HeadEdit | None = None
        self._hooks = model.hooks(fwd_hooks=_edit_hooks(head_shape(model)[0], lambda: self._edit))

    def __enter__(self) -> LastToken:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def __call__(self, prefix: PrefixCache, edit: HeadEdit | None = None) -> Float[Tensor, "row vocab"]:
        return self.step(prefix, edit, prefix.cache())

    def step(self, prefix: PrefixCache, edit: HeadEdit | None, cache: DynamicCache) -> Float[Tensor, "row vocab"]:
        """As a call, but with a cache that may keep the token's own keys and values for decoding."""
        self._edit = edit
        try:
            return run_tokens(self.model, prefix.last[:, None], prefix.mask, prefix.positions()[:, None], cache)
        finally:
            self._edit = None


def run_tokens(
    model: Model,
    tokens: Int[Tensor, "row new"],
    mask: Bool[Tensor, "row all"],
    positions: Int[Tensor, "row new"],
    cache: DynamicCache | None = None,
    logits: bool = True,
) -> Float[Tensor, "row vocab"]:
    """Logits after the last of some new tokens; `mask` also covers what the cache holds.

    Without `logits` nothing is unembedded and the result is empty.
    """
    kept = 1 if logits else torch.empty(0, dtype=torch.long, device=tokens.device)
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    with out_of_memory_is_named():
        result = model.forward(
            tokens, attention_mask=mask, position_ids=positions, logits_to_keep=kept, use_cache=cache is not None,
            **options,
        )  # fmt: skip
    return result[:, -1] if logits else result.new_empty(len(tokens), 0)


def all_positions(mask: Bool[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Each token's position, counted from the row's first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def full_logits(batch: PromptBatch, model: Model, cache: DynamicCache | None = None) -> Float[Tensor, "row vocab"]:
    """Last-token logits of whole prompts, whatever hooks are installed; fills `cache` when one is given.

    Rows should be of one length: padding attends to nothing, which some dtypes cannot express.
    """
    mask = batch.mask.to(model.cfg.device)
    return run_tokens(model, batch.tokens.to(model.cfg.device), mask, all_positions(mask), cache)


@torch.no_grad()
def capture_z(batch: PromptBatch, model: Model) -> Float[Tensor, "row layer head d_head"]:
    """Every head's z at the last token of whole prompts, run as one batch; nothing is unembedded.

    The batch is right-padded: edit hooks, which act at position -1, must not be installed.
    """
    layers = head_shape(model)[0]
    captured: dict[int, Tensor] = {}
    lengths = torch.tensor(batch.lengths)

    def keep(z: Tensor, hook: Any = None, *, layer: int) -> None:
        captured[layer] = z[torch.arange(len(lengths), device=z.device), lengths.to(z.device) - 1].clone()

    with model.hooks(fwd_hooks=[(z_hook(layer), functools.partial(keep, layer=layer)) for layer in range(layers)]):
        _run_right_padded(batch.tokens, lengths, model)
    return torch.stack([captured[layer].to(model.cfg.device) for layer in range(layers)], dim=1)


@torch.no_grad()
def decode(
    model: Model,
    first: Float[Tensor, "row vocab"],
    cache: DynamicCache,
    mask: Bool[Tensor, "row pos"],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations after the prompt's last logits `first`, up to a newline or the end of text.

    `cache` holds the whole prompt and grows. Whatever hooks are installed act at every step.
    """
    ends = end_tokens(model, tokenizer)
    stops: dict[int, bool] = {}

    def is_stop(token: int) -> bool:
        if token not in stops:
            stops[token] = token in ends or "\n" in tokenizer.decode([token])
        return stops[token]

    written: list[list[int]] = [[] for _ in range(len(first))]
    active = list(range(len(first)))
    tokens = first.argmax(-1)
    for step in range(max_new_tokens):
        going: list[int] = []  # positions in the batch of rows that go on
        for place, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            written[row].append(token)
            if not is_stop(token):
                going.append(place)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(active):
            index = torch.tensor(going, device=mask.device)
            active, mask, tokens = [active[place] for place in going], mask[index], tokens[index]
            cache.batch_select_indices(index)
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        tokens = run_tokens(model, tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache).argmax(-1)
    ids = [[token for token in row if token not in ends] for row in written]
    return [tokenizer.decode(row).split("\n")[0].strip() for row in ids]


def end_tokens(model: Model, tokenizer: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's and those of the model's generation settings."""
    settings = getattr(model.original_model, "generation_config", None)
    listed = getattr(settings, "eos_token_id", None)
    ends = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return {end for end in ends if end is not None}


@torch.no_grad()
def _prefix_layers(batch: PromptBatch, model: Model) -> tuple[list[tuple[Tensor, Tensor]], Int[Tensor, "row prefix"]]:
    """Right-padded keys and values of all but the last token, and where each stands when left-padded."""
    cache = DynamicCache()  # of plain layers: a sliding window is a matter of the mask, nothing is dropped
    lengths = torch.tensor(batch.lengths) - 1
    _run_right_padded(batch.tokens[:, :-1], lengths, model, cache)
    width = batch.tokens.shape[1] - 1
    places = (torch.arange(width) - (width - lengths)[:, None]).clamp(min=0)
    return [(layer.keys, layer.values) for layer in cache.layers], places  # type: ignore[misc]


def _left_padded(kept: Tensor, places: Int[Tensor, "row prefix"]) -> Tensor:
    rows = torch.arange(len(places), device=kept.device)[:, None]
    return rearrange(kept[rows, :, places.to(kept.device)], "row pos kv_head d -> row kv_head pos d")


def _room(kept: Tensor, rows: int, width: int) -> Tensor:
    return kept.new_zeros(rows, kept.shape[1], width, kept.shape[3])


def _run_right_padded(
    tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], model: Model, cache: DynamicCache | None = None
) -> None:
    """Run left-padded rows with their padding moved behind them, where causal attention never sees it.

    So no token attends to nothing, which is not a number in float64 and may be none in float16.
    """
    width = tokens.shape[1]
    index = (torch.arange(width) + (width - lengths)[:, None]).clamp(max=width - 1)
    moved = tokens.gather(1, index.to(tokens.device)).to(model.cfg.device)
    mask = torch.ones_like(moved, dtype=torch.bool)
    run_tokens(model, moved, mask, all_positions(mask), cache, logits=False)
