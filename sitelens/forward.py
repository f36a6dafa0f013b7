"""Forward passes: prefixes computed once, last-token logits under a head edit, capture of z, greedy decoding.

Nothing before the last prompt token depends on an edit made there. So the keys and values of all tokens but the
last (the prefix) are computed once, without gradient, and everything else runs one token per prompt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from sitelens.defaults import SitelensError
from sitelens.models import Model, head_shape, z_hook
from sitelens.network import all_positions, can_unhook, run_right_padded, run_tokens
from sitelens.prefix import PrefixCache, ReadOnly
from sitelens.prompts import PromptBatch

Mixing = Literal["convex", "additive"]
Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """The one intervention, for each row: z <- keep * z + weight * vector for every head.

    It is made at the last prompt token, or, where `everywhere`, at all positions.
    """

    keep: Float[Tensor, "row layer head"]
    weight: Float[Tensor, "row layer head"]
    vectors: Float[Tensor, "row layer head d_head"]
    everywhere: bool = False

    @staticmethod
    def mix(
        alpha: Float[Tensor, "row layer head"],
        vectors: Float[Tensor, "row layer head d_head"],
        mixing: Mixing = "convex",
        everywhere: bool = False,
    ) -> HeadEdit:
        """Convex: z <- (1 - alpha) z + alpha v (the paper's). Additive: z <- z + alpha v."""
        return HeadEdit(1 - alpha if mixing == "convex" else torch.ones_like(alpha), alpha, vectors, everywhere)

    @staticmethod
    def stack(edits: Sequence[HeadEdit]) -> HeadEdit:
        """The rows of all edits, one after the other."""
        keep, weight, vectors = zip(*((e.keep, e.weight, e.vectors) for e in edits), strict=True)
        return HeadEdit(torch.cat(keep), torch.cat(weight), torch.cat(vectors))

    def rows(self, index: Int[Tensor, " chosen"]) -> HeadEdit:
        """The chosen rows; a row may be chosen often."""
        return HeadEdit(self.keep[index], self.weight[index], self.vectors[index], self.everywhere)

    def apply(self, z: Float[Tensor, "row pos head d_head"], layer: int) -> Float[Tensor, "row pos head d_head"]:
        """A new, edited z; the mixing runs in this edit's dtype, the result has z's."""
        keep, weight, vector = (side[layer].to(z.device) for side in self._by_layer)
        whole = self.everywhere or z.shape[1] == 1
        edited = torch.addcmul((z if whole else z[:, -1:]).to(keep.dtype) * keep, weight, vector).to(z.dtype)
        return edited if whole else torch.cat([z[:, :-1], edited], dim=1)

    @functools.cached_property
    def _by_layer(self) -> tuple[tuple[Tensor, ...], ...]:
        """Split once: a slice taken layer by layer would have the gradient made whole as often."""
        keep, weight = (rearrange(side, "row layer head -> layer row 1 head 1") for side in (self.keep, self.weight))
        vectors = rearrange(self.vectors, "row layer head d_head -> layer row 1 head d_head")
        return keep.unbind(), weight.unbind(), vectors.unbind()

    def hooks(self) -> list[Hook]:
        """As TransformerLens hooks for one forward pass over whole prompts."""
        return _edit_hooks(self.keep.shape[1], lambda: self)


def _edit_hooks(layers: int, current: Callable[[], HeadEdit | None]) -> list[Hook]:
    def hook(z: Tensor, hook: Any = None, *, layer: int) -> Tensor | None:
        edit = current()
        return None if edit is None else edit.apply(z, layer)

    return [(z_hook(layer), functools.partial(hook, layer=layer)) for layer in range(layers)]


class LastToken:
    """Runs the last prompt token over a prefix: with hooks installed once for many calls, or without any.

    with LastToken(model) as run:
        logits = run(prefix, edit)     # [row vocab], differentiable in the edit

    Where the network can run without its bridge, `_last_token_attention` reads the prefix and makes the edit.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._edit: HeadEdit | None = None
        self._hooks = contextlib.ExitStack()
        self._unhooked = False

    def __enter__(self) -> LastToken:
        self._unhooked = can_unhook(self.model)
        if not self._unhooked:
            hooks = _edit_hooks(head_shape(self.model)[0], lambda: self._edit)
            self._hooks.enter_context(self.model.hooks(fwd_hooks=hooks))
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def __call__(self, prefix: PrefixCache, edit: HeadEdit | None = None) -> Float[Tensor, "row vocab"]:
        return self._step(prefix, edit, prefix.outline() if self._unhooked else prefix.cache(ReadOnly))

    def step(self, prefix: PrefixCache, edit: HeadEdit | None) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
        """As a call, and with it a cache that holds the whole prompt and may grow, for decoding."""
        cache = prefix.cache(DynamicLayer)
        return self._step(prefix, edit, cache), cache

    def _step(self, prefix: PrefixCache, edit: HeadEdit | None, cache: DynamicCache) -> Float[Tensor, "row vocab"]:
        self._edit = edit
        token = _token.set((prefix, edit))
        try:
            tokens, positions = prefix.last[:, None], prefix.positions()[:, None]
            attention = LAST_TOKEN if self._unhooked else None
            return run_tokens(self.model, tokens, prefix.mask, positions, cache, attention=attention)[:, -1]
        finally:
            _token.reset(token)
            self._edit = None


LAST_TOKEN = "sitelens_last_token"  # the name under which transformers knows the function below
_token: ContextVar[tuple[PrefixCache, HeadEdit | None]] = ContextVar("token")


def _last_token_attention(
    module: Any,
    query: Float[Tensor, "row head 1 d"],
    key: Float[Tensor, "row kv_head _ d"],
    value: Float[Tensor, "row kv_head _ d_value"],
    attention_mask: Float[Tensor, "row 1 1 pos"] | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "row 1 head d_value"], None]:
    """Attention of one token over a prefix that several rows may share, and the edit of z.

    Stored keys are neither repeated for the heads of a group nor copied next to the token's own, and no gradient
    flows into them.
    """
    prefix, edit = _token.get()
    wide = torch.promote_types(query.dtype, torch.float32)
    if key.shape[2] > 1:  # of a cache that keeps them
        key, value = key[:, :, -1:], value[:, :, -1:]
    sizes = {"repeat": prefix.repeats, "group": query.shape[1] // key.shape[1]}
    asked = rearrange(query, "(row repeat) (kv_head group) 1 d -> row kv_head (repeat group) d", **sizes)
    if prefix.repeats > 1:
        together = "(row repeat) kv_head 1 d -> row kv_head (repeat group) d"
        key, value = repeat(key, together, **sizes), repeat(value, together, **sizes)
        if attention_mask is not None:
            attention_mask = repeat(attention_mask, together, **sizes)
    scores = (asked.to(wide) * key.to(wide)).sum(-1, keepdim=True).to(query.dtype)
    stored = prefix.layer(module.layer_idx) if prefix.keys else None
    if stored is not None:
        scores = torch.cat([asked @ stored[0].mT, scores], dim=-1)
    scores = scores * (module.head_dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    of_prefix, of_own = weights.split([scores.shape[-1] - 1, 1], dim=-1)
    z = of_own.to(wide) * value.to(wide)
    if stored is not None:
        z = z + of_prefix @ stored[1]
    z = rearrange(z.to(query.dtype), "row kv_head (repeat group) d -> (row repeat) 1 (kv_head group) d", **sizes)
    return (z if edit is None else edit.apply(z, module.layer_idx)), None


AttentionInterface.register(LAST_TOKEN, _last_token_attention)
AttentionMaskInterface.register(LAST_TOKEN, eager_mask)


@torch.no_grad()
def full_logits(batch: PromptBatch, model: Model, cache: DynamicCache | None = None) -> Float[Tensor, "row vocab"]:
    """Last-token logits of whole prompts, whatever hooks are installed; fills `cache` when one is given.

    Rows should be of one length: padding attends to nothing, which some dtypes cannot express.
    """
    mask = batch.mask.to(model.cfg.device)
    return run_tokens(model, batch.tokens.to(model.cfg.device), mask, all_positions(mask), cache)[:, -1]


def last_logits(prefix: PrefixCache, model: Model) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
    """Logits of the last token under whatever hooks are installed, and a cache of the whole prompt that may grow."""
    cache = prefix.cache(DynamicLayer)
    logits = run_tokens(model, prefix.last[:, None], prefix.mask, prefix.positions()[:, None], cache)
    return logits[:, -1], cache


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
        run_right_padded(batch.tokens, lengths, model)
    return torch.stack([captured[layer].to(model.cfg.device) for layer in range(layers)], dim=1)


@torch.no_grad()
def decode(
    model: Model,
    first: Float[Tensor, "row vocab"],
    cache: DynamicCache,
    mask: Bool[Tensor, "row pos"],
    tokenizer: Any,
    max_new_tokens: int,
    ends: Collection[int],
    complete: Callable[[int, str], bool] = lambda row, text: False,
    where: Callable[[int], str] = lambda row: f"prompt {row + 1}",
) -> list[str]:
    """Greedy continuations after the prompt's last logits `first`, without special tokens, exactly as decoded.

    A row ends at a token of `ends`, or where `complete(row, text so far)` says that it has said enough. `cache` holds
    the whole prompt and grows. Whatever hooks are installed act at every step.

    Raises:
        SitelensError: if logits are not finite, naming `where(row)`.
    """
    written: list[list[int]] = [[] for _ in range(len(first))]
    texts = [""] * len(first)
    active = list(range(len(first)))
    tokens = first.argmax(-1)
    for step in range(max_new_tokens):
        going: list[int] = []  # positions in the batch of rows that go on
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
            index = torch.tensor(going)  # on the CPU: layers may lie on different devices
            active, mask, tokens = [active[place] for place in going], mask[index], tokens[index]
            cache.batch_select_indices(index)
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        logits = run_tokens(model, tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)[:, -1]
        check_finite(logits, lambda place, rows=active: f"{where(rows[place])}, generated token {step + 2}")  # noqa: B023
        tokens = logits.argmax(-1)
    return texts


def check_finite(logits: Float[Tensor, "row vocab"], where: Callable[[int], str]) -> None:
    """Raise SitelensError, naming `where(row)`, for logits that are infinite or NaN: their argmax says nothing."""
    wrong = (~torch.isfinite(logits).all(-1)).nonzero().flatten().tolist()
    if wrong:
        dtype = str(logits.dtype).removeprefix("torch.")
        half = logits.dtype in (torch.float16, torch.bfloat16)
        hint = "half precision overflows: try dtype='float32'" if half else "is a weight or an edit infinite or NaN?"
        raise SitelensError(f"{where(wrong[0])}: the model's logits are not finite (dtype {dtype}); {hint}")


def end_tokens(model: Model, tokenizer: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's and those of the model's generation settings."""
    settings = getattr(model.original_model, "generation_config", None)
    listed = getattr(settings, "eos_token_id", None)
    ends = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return {end for end in ends if end is not None}
