"""Prefixes: keys and values of all prompt tokens except the last, computed once, without gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sitelens.engine.batches import PromptBatch
from sitelens.engine.memory import MAX_TOKENS, chunks, forward_bytes
from sitelens.engine.network import Passes, check_tokens, run_right_padded
from sitelens.models.model import Model


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Keys and values of all prompt tokens except the last, which are never changed, and that last token.

    Selecting rows copies no keys; `layer` does, one layer at a time.

    Attributes:
        keys: one tensor `[prompt kv_head pos-1 d]` per layer (none if no prompt has more than one token).
        values: the same for values.
        mask: real tokens, the last one included; rows are left-padded.
        last: the last token of each row.
        index: the prompts of the rows, `repeats` consecutive rows per prompt (None: all prompts, in order).
        start: the first position that any of the rows needs.
        repeats: consecutive rows per prompt.
        tokens: whole prompts, left-padded, if the user has hooks on the model: these may refer to any position, so
            prompts must run whole and nothing is precomputed; else None.
    """

    keys: tuple[Float[Tensor, "prompt _ prefix _"], ...]
    values: tuple[Float[Tensor, "prompt _ prefix _"], ...]
    mask: Bool[Tensor, "row pos"]
    last: Int[Tensor, " row"]
    index: Int[Tensor, " chosen"] | None = None
    start: int = 0
    repeats: int = 1
    tokens: Int[Tensor, "row pos"] | None = None

    def __len__(self) -> int:
        return len(self.last)

    @staticmethod
    def of(batch: PromptBatch, model: Model, budget: int) -> PrefixCache:
        """The prefixes of all prompts, run in chunks of similar length that need at most `budget` bytes each.

        The result itself needs further memory (`prefix_bytes` per prompt).
        """
        check_tokens(model, batch.tokens)
        check_tokens(model, batch.answer)
        device = model.device
        passes = Passes(model)
        if passes.user_hooked:
            tokens = batch.tokens.to(device)
            return PrefixCache((), (), batch.mask.to(device), tokens[:, -1], tokens=tokens)
        width = batch.tokens.shape[1] - 1
        keys: list[Tensor] = []
        values: list[Tensor] = []
        cost = functools.partial(forward_bytes, model)
        for index in chunks(batch.lengths, cost, budget, max_tokens=MAX_TOKENS):
            part = batch.rows(index)
            if part.tokens.shape[1] == 1:
                continue
            layers, places = _prefix_layers(part, passes)
            if not keys:
                keys, values = ([_room(kept, len(batch), width) for kept in side] for side in zip(*layers, strict=True))
            rows = torch.tensor(index)
            for whole_keys, whole_values in zip(keys, values, strict=True):
                for whole, kept in zip((whole_keys, whole_values), layers.pop(0), strict=True):  # pop frees the layer
                    whole[rows.to(whole.device), :, width - kept.shape[2] :] = _left_padded(kept, places)
        return PrefixCache(tuple(keys), tuple(values), batch.mask.to(device), batch.tokens[:, -1].to(device))

    def rows(self, index: Int[Tensor, " chosen"], repeats: int = 1) -> PrefixCache:
        """The rows at these indices, which may repeat, each `repeats` times consecutively, without needless padding."""
        assert self.repeats == 1, "rows are chosen before they are repeated"
        index = index.to(self.mask.device)
        mask = self.mask[index]
        start = mask.shape[1] - int(mask.sum(-1).max())
        everything = torch.equal(index, torch.arange(len(self), device=index.device))
        chosen = index if self.index is None else self.index[index]
        several = functools.partial(torch.repeat_interleave, repeats=repeats, dim=0)
        return replace(
            self,
            mask=several(mask[:, start:]),
            last=several(self.last[index]),
            index=self.index if everything else chosen,
            start=self.start + start,
            repeats=repeats,
            tokens=None if self.tokens is None else several(self.tokens[index][:, start:]),
        )

    def grouped_by_prompt(self, index: Int[Tensor, " row"]) -> PrefixCache:
        """Like `rows`, but consecutive rows of a prompt share its keys if all prompts repeat equally often."""
        prompts, counts = index.unique_consecutive(return_counts=True)
        alike = len(prompts) < len(index) and bool((counts == counts[0]).all())
        return self.rows(prompts, int(counts[0])) if alike else self.rows(index)

    def layer(self, i: int) -> tuple[Float[Tensor, "chosen _ prefix _"], Float[Tensor, "chosen _ prefix _"]]:
        """Keys and values of one layer, once per selected prompt; views if one prompt, or all, are selected."""
        return self._chosen(self.keys[i]), self._chosen(self.values[i])

    def positions(self) -> Int[Tensor, " row"]:
        """The last token's position, counted from the first real token."""
        return self.mask.sum(-1) - 1

    def cache(self, layer: type[DynamicLayer]) -> DynamicCache:
        """A transformers cache of the prefix for one forward pass, with layers of the given class."""
        cache = DynamicCache()
        for i in range(len(self.keys)):
            one = layer()
            keys, values = (side.repeat_interleave(self.repeats, 0) if self.repeats > 1 else side
                            for side in self.layer(i))  # fmt: skip
            one.lazy_initialization(keys, values)
            one.keys, one.values = keys, values
            cache.layers.append(one)
        return cache

    def placeholder_cache(self) -> DynamicCache:
        """A cache that only reports its length, for a forward pass whose attention reads this prefix itself."""
        cache = DynamicCache()
        for keys in self.keys:
            layer = _Placeholder()
            layer.lazy_initialization(keys, keys)
            layer.keys = keys[:1, :, self.start :]
            cache.layers.append(layer)
        return cache

    def _chosen(self, tensor: Tensor) -> Tensor:
        if self.index is None:
            return tensor[:, :, self.start :]
        if len(self.index) == 1:
            i = int(self.index)
            return tensor[i : i + 1, :, self.start :]
        return tensor[:, :, self.start :][self.index.to(tensor.device)]


class ReadOnly(DynamicLayer):
    """A cache layer that returns the stored keys and values followed by the new ones, and does not store the latter."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)  # type: ignore[list-item]


class _Placeholder(DynamicLayer):
    """A cache layer that returns the new keys and values only."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


@torch.no_grad()
def _prefix_layers(batch: PromptBatch, passes: Passes) -> tuple[list[tuple[Tensor, Tensor]], Int[Tensor, "row prefix"]]:
    """Right-padded keys and values of all tokens except the last, per layer, and the index that left-pads them."""
    cache = DynamicCache()  # with plain layers: a sliding window is applied by the mask, so nothing is dropped
    lengths = torch.tensor(batch.lengths) - 1
    run_right_padded(batch.tokens[:, :-1], lengths, passes, cache)
    width = batch.tokens.shape[1] - 1
    places = (torch.arange(width) - (width - lengths)[:, None]).clamp(min=0)
    return [(layer.keys, layer.values) for layer in cache.layers], places  # type: ignore[misc]


def _left_padded(kept: Tensor, places: Int[Tensor, "row prefix"]) -> Tensor:
    rows = torch.arange(len(places), device=kept.device)[:, None]
    return rearrange(kept[rows, :, places.to(kept.device)], "row pos kv_head d -> row kv_head pos d")


def _room(kept: Tensor, rows: int, width: int) -> Tensor:
    return kept.new_zeros(rows, kept.shape[1], width, kept.shape[3])
