"""The fast path: last-token logits of many prompts under many head edits, each prompt's prefix computed once.

An edit at the last prompt token changes nothing before it. Hence:

1. `PrefixCache.of` runs all tokens of every prompt but the last, once and without gradient, and stores the keys and
   values of every layer.
2. `PrefixCache.rows` chooses the rows of a batch, prompts x edits. Rows of one prompt share its keys; none are copied.
3. `HeadEdit` holds each row's edit, z <- keep * z + weight * vector for every head. Rows may differ in mask, vectors
   and task.
4. `LastToken` runs one token per row. In every layer, `_last_token_attention` computes that token's attention over the
   stored keys and its own, edits z, and passes it to the output projection.
5. The logits are differentiable in the edit; no gradient flows into the prefix.

If the network cannot run without its bridge, step 4 uses the bridge's attention, and a TransformerLens hook at hook_z
makes the edit. If the user has hooks on the model, prompts run whole, so that a hook sees every position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from sitelens.contexts import bound
from sitelens.engine.batches import PromptBatch
from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.engine.prefix import PrefixCache, ReadOnly
from sitelens.errors import SitelensError
from sitelens.models.model import Model, z_hook

Mixing = Literal["convex", "additive"]
Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """The intervention on each row of a batch: z <- keep * z + weight * vector for every head.

    Attributes:
        keep: factor of z.
        weight: factor of the vectors.
        vectors: in the units of z.
        everywhere: edit all positions instead of the last one only.
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
        """The edit z <- (1 - alpha) z + alpha v ("convex", as in the paper) or z <- z + alpha v ("additive")."""
        return HeadEdit(1 - alpha if mixing == "convex" else torch.ones_like(alpha), alpha, vectors, everywhere)

    @staticmethod
    def stack(edits: Sequence[HeadEdit]) -> HeadEdit:
        """One edit of the last token with the rows of all edits, in their order."""
        keep, weight, vectors = zip(*((e.keep, e.weight, e.vectors) for e in edits), strict=True)
        return HeadEdit(torch.cat(keep), torch.cat(weight), torch.cat(vectors))

    def rows(self, index: Int[Tensor, " chosen"]) -> HeadEdit:
        """The rows at these indices, which may repeat."""
        return HeadEdit(self.keep[index], self.weight[index], self.vectors[index], self.everywhere)

    def apply(self, z: Float[Tensor, "row pos head d_head"], layer: int) -> Float[Tensor, "row pos head d_head"]:
        """The edited z, as a new tensor in z's dtype; mixing is computed in the dtype of this edit."""
        keep, weight, vector = (side[layer].to(z.device) for side in self._by_layer)
        whole = self.everywhere or z.shape[1] == 1
        edited = torch.addcmul((z if whole else z[:, -1:]).to(keep.dtype) * keep, weight, vector).to(z.dtype)
        return edited if whole else torch.cat([z[:, :-1], edited], dim=1)

    @functools.cached_property
    def _by_layer(self) -> tuple[tuple[Tensor, ...], ...]:
        """Split once for all layers: with a slice per layer, backward would allocate the full gradient per layer."""
        keep, weight = (rearrange(side, "row layer head -> layer row 1 head 1") for side in (self.keep, self.weight))
        vectors = rearrange(self.vectors, "row layer head d_head -> layer row 1 head d_head")
        return keep.unbind(), weight.unbind(), vectors.unbind()

    def hooks(self) -> list[Hook]:
        """The edit as TransformerLens hooks, for one forward pass over whole prompts."""
        return _edit_hooks(self.keep.shape[1], lambda: self)


def _edit_hooks(layers: int, current: Callable[[], HeadEdit | None]) -> list[Hook]:
    def hook(z: Tensor, hook: Any = None, *, layer: int) -> Tensor | None:
        edit = current()
        return None if edit is None else edit.apply(z, layer)

    return [(z_hook(layer), functools.partial(hook, layer=layer)) for layer in range(layers)]


class LastToken:
    """Runs the last prompt token over a cached prefix, on the model with the hooks that it has at construction.

    with LastToken(model) as run:
        logits = run(prefix, edit)     # [row vocab], differentiable in the edit

    If the network runs without its bridge, `_last_token_attention` reads the prefix and makes the edit.
    """

    def __init__(self, model: Model) -> None:
        self.passes = Passes(model)
        self._edit: HeadEdit | None = None
        if not self.passes.can_bypass_bridge:
            self.passes.install(_edit_hooks(model.shape.layers, lambda: self._edit))

    def __enter__(self) -> LastToken:
        return self

    def __exit__(self, *error: Any) -> None:
        """There is nothing to restore."""

    def __call__(self, prefix: PrefixCache, edit: HeadEdit | None = None) -> Float[Tensor, "row vocab"]:
        if prefix.tokens is not None:
            return self._whole(prefix, edit)
        return self._step(
            prefix, edit, prefix.placeholder_cache() if self.passes.can_bypass_bridge else prefix.cache(ReadOnly)
        )

    def step(self, prefix: PrefixCache, edit: HeadEdit | None) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
        """The logits, as a call returns them, and a cache of the whole prompt that can grow, for decoding."""
        cache = prefix.cache(DynamicLayer)
        return self._step(prefix, edit, cache), cache

    def _step(self, prefix: PrefixCache, edit: HeadEdit | None, cache: DynamicCache) -> Float[Tensor, "row vocab"]:
        tokens, positions = prefix.last[:, None], prefix.positions()[:, None]
        self._edit = edit
        try:
            with bound(_token, (prefix, edit)):
                return run_tokens(self.passes, tokens, prefix.mask, positions, cache, attention=LAST_TOKEN)[:, -1]
        finally:
            self._edit = None  # decoding continues without the edit

    def _whole(self, prefix: PrefixCache, edit: HeadEdit | None) -> Float[Tensor, "row vocab"]:
        def select(rows: Int[Tensor, " chosen"]) -> None:
            self._edit = None if edit is None else edit.rows(rows)

        try:
            return _whole_logits(prefix, self.passes, select)
        finally:
            self._edit = None


LAST_TOKEN = "sitelens_last_token"  # the name under which transformers knows the function below
# The prefix and the edit of the pass that runs in this context. transformers calls attention functions with its own
# arguments only, so these cannot be passed through the model's forward; a global variable would be shared by threads.
_token: ContextVar[tuple[PrefixCache, HeadEdit | None] | None] = ContextVar("token", default=None)


def _last_token_attention(
    module: Any,
    query: Float[Tensor, "row head 1 d"],
    key: Float[Tensor, "row kv_head _ d"],
    value: Float[Tensor, "row kv_head _ d_value"],
    attention_mask: Float[Tensor, "row 1 1 pos"] | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "row 1 head d_value"], None]:
    """The edited z of one token per row: its attention over a prefix that several rows may share, then the edit.

    Stored keys are neither repeated for the heads of a group nor concatenated with the token's own, and no gradient
    flows into them.
    """
    current = _token.get()
    assert current is not None
    prefix, edit = current
    wide = torch.promote_types(query.dtype, torch.float32)
    if key.shape[2] > 1:  # a cache that grows returns the stored keys as well
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
def full_logits(
    batch: PromptBatch, model: Model | Passes, cache: DynamicCache | None = None
) -> Float[Tensor, "row vocab"]:
    """Last-token logits of whole prompts, under all installed hooks; fills `cache` if one is given.

    Rows should have equal lengths: a padding token attends to nothing, which is NaN in some dtypes.
    """
    passes = Passes.of(model)
    device = passes.model.device
    mask = batch.mask.to(device)
    return run_tokens(passes, batch.tokens.to(device), mask, all_positions(mask), cache)[:, -1]


def last_logits(
    prefix: PrefixCache, model: Model | Passes, layer: type[DynamicLayer] = DynamicLayer
) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
    """Logits of the last token under all installed hooks, and a cache of the whole prompt that can grow.

    The cache is empty if the prompts had to be run whole (user hooks on the model).
    """
    if prefix.tokens is not None:
        return _whole_logits(prefix, Passes.of(model)), DynamicCache()
    cache = prefix.cache(layer)
    logits = run_tokens(model, prefix.last[:, None], prefix.mask, prefix.positions()[:, None], cache)
    return logits[:, -1], cache


def _whole_logits(
    prefix: PrefixCache, passes: Passes, select: Callable[[Int[Tensor, " chosen"]], None] = lambda rows: None
) -> Float[Tensor, "row vocab"]:
    """Last-token logits of whole prompts, run without padding, one batch per length; `select` gets its rows before."""
    assert prefix.tokens is not None
    lengths = prefix.mask.sum(-1)
    places, parts = [], []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        select(rows)
        tokens = prefix.tokens[rows][:, -length:]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        parts.append(run_tokens(passes, tokens, mask, all_positions(mask))[:, -1])
        places.append(rows)
    order = torch.cat(places).argsort()
    return torch.cat(parts)[order.to(parts[0].device)]


def check_finite(logits: Float[Tensor, "row vocab"], where: Callable[[int], str]) -> None:
    """Raise SitelensError, naming `where(row)`, if logits are infinite or NaN: their argmax is meaningless."""
    wrong = (~torch.isfinite(logits).all(-1)).nonzero().flatten().tolist()
    if wrong:
        dtype = str(logits.dtype).removeprefix("torch.")
        half = logits.dtype in (torch.float16, torch.bfloat16)
        hint = "half precision overflows: try dtype='float32'" if half else "is a weight or an edit infinite or NaN?"
        raise SitelensError(f"{where(wrong[0])}: the model's logits are not finite (dtype {dtype}); {hint}")
