"""Prefixes: keys and values of all prompt tokens but the last, computed once, without gradient."""

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
    """Keys and values of all but the last prompt token, never written to, and that last token.

    keys, values: a tensor `[prompt kv_head pos-1 d]` a layer (none where no prompt has more than one token).
    mask: real tokens, the last one included; last: the last token; rows are left-padded.
    index: which prompts the rows are, `repeats` rows each, one after the other (None: all, in order); start: the
    first position that any of them needs. So choosing rows copies no keys: `layer` does, one layer at a time.
    tokens: whole prompts, left-padded, where the user listens: her hooks may mean the last position, or any, so that
    prompts must be run whole, and nothing is computed ahead.
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
        """Run every prompt but its last token, in chunks of like length that need at most `budget` bytes.

        The result itself comes on top: `prefix_bytes` tells how much.
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
                for whole, kept in zip((whole_keys, whole_values), layers.pop(0), strict=True):  # and let it go
                    whole[rows.to(whole.device), :, width - kept.shape[2] :] = _left_padded(kept, places)
        return PrefixCache(tuple(keys), tuple(values), batch.mask.to(device), batch.tokens[:, -1].to(device))

    def rows(self, index: Int[Tensor, " chosen"], repeats: int = 1) -> PrefixCache:
        """The chosen rows (a row may be chosen often), each `repeats` times in a row, without needless padding."""
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
        """Keys and values of one layer, once for each chosen prompt; views where one prompt, or all, are chosen."""
        return self._chosen(self.keys[i]), self._chosen(self.values[i])

    def positions(self) -> Int[Tensor, " row"]:
        """The last token's position, counted from the first real token."""
        return self.mask.sum(-1) - 1

    def cache(self, layer: type[DynamicLayer]) -> DynamicCache:
        """For one forward pass, with a layer of the given kind for each of the model's."""
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
        """A cache that only knows its length, for a forward pass whose attention reads this prefix itself."""
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
    """Shows stored keys and values followed by new ones, and keeps only the former."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)  # type: ignore[list-item]


class _Placeholder(DynamicLayer):
    """Hands new keys and values on as they are."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


@torch.no_grad()
def _prefix_layers(batch: PromptBatch, passes: Passes) -> tuple[list[tuple[Tensor, Tensor]], Int[Tensor, "row prefix"]]:
    """Right-padded keys and values of all but the last token, and where each stands when left-padded."""
    cache = DynamicCache()  # of plain layers: a sliding window is a matter of the mask, nothing is dropped
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
