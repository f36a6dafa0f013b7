"""One forward pass: through the bridge where a hook is installed, through the network beneath it where none is.

A hook point costs a Python call whether or not it has a hook, and a bridge computes attention step by step so that
each step has one. Where no hook is installed the wrappers are set aside for the length of one forward pass, and the
Hugging Face network runs as it is; nothing is copied, and weights edited meanwhile are the ones that count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers.cache_utils import DynamicCache

from sitelens.defaults import SitelensError
from sitelens.models import Model

# Model types whose wrappers have no weights of their own, and whose z reaches the output projection as attention gave
# it: those that the tests compare with raw forward passes. All others run through the bridge.
PLAIN = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3", "gemma3_text"})


@dataclass
class _Wrappers:
    """Where a network's wrappers hang: (the dict of modules that holds one, its name there, it, what it wraps)."""

    places: list[tuple[dict[str, Any], str, nn.Module, nn.Module]]
    hookable: Sequence[nn.Module]  # all that would not be called: wrappers and hook points

    @staticmethod
    def of(model: Model) -> _Wrappers:
        hookable = [module for module in model.modules() if isinstance(module, (GeneralizedComponent, HookPoint))]
        found = _Wrappers([], hookable)
        seen: set[int] = set()

        def visit(module: nn.Module) -> None:
            if id(module) in seen:
                return
            seen.add(id(module))
            for name, child in module._modules.items():
                if isinstance(child, GeneralizedComponent) and child.original_component is not None:
                    original: nn.Module = child.original_component
                    found.places.append((module._modules, name, child, original))
                    visit(original)
                elif child is not None:
                    visit(child)

        visit(model.original_model)
        return found

    def still_hold(self) -> bool:
        return all(
            modules.get(name) is wrapper and wrapper._modules.get("_original_component") is original
            for modules, name, wrapper, original in self.places
        )

    def watched(self) -> bool:
        """Whether any hook would go unheard."""
        return any(
            isinstance(m, HookPoint) or not all(map(_is_the_bridges_own, hooks.values()))
            for m in self.hookable
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            if hooks
        )


def _is_the_bridges_own(hook: Any) -> bool:
    """A block keeps what enters its norms for hook points behind them, from its first forward pass on."""
    return getattr(hook, "__module__", "").startswith("transformer_lens.model_bridge.")


_wrappers: weakref.WeakKeyDictionary[Model, _Wrappers] = weakref.WeakKeyDictionary()


def can_unhook(model: Model) -> bool:
    """Whether the model's network may run without its hook points now: a known type, and no hook installed."""
    config: Any = model.original_model.config
    if config.model_type not in PLAIN or getattr(model, "compatibility_mode", False):
        return False
    return not _of(model).watched()


@contextmanager
def unhooked(model: Model, attention: str = "eager") -> Iterator[Any]:
    """The model's Hugging Face network, wrappers set aside and `attention` in use until the block ends.

    Ask `can_unhook` before.
    """
    network: Any = model.original_model
    places = _of(model).places
    before = network.config._attn_implementation
    try:
        network.config._attn_implementation = attention
        for modules, name, _, original in places:
            modules[name] = original
        yield network
    finally:
        for modules, name, wrapper, _ in places:
            modules[name] = wrapper
        network.config._attn_implementation = before


def _of(model: Model) -> _Wrappers:
    known = _wrappers.get(model)
    if known is None or not known.still_hold():
        known = _wrappers[model] = _Wrappers.of(model)
    return known


@dataclass
class Tokens:
    """How many tokens were run forward, and how many of them backward; padding counts."""

    forward: int = 0
    backward: int = 0


_spent: ContextVar[Tokens | None] = ContextVar("spent", default=None)


@contextmanager
def counted_tokens() -> Iterator[Tokens]:
    """Count the tokens of all forward passes in the block."""
    spent, outer = Tokens(), _spent.get()
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)
        if outer is not None:
            outer.forward += spent.forward
            outer.backward += spent.backward


def run_tokens(
    model: Model,
    tokens: Int[Tensor, "row new"],
    mask: Bool[Tensor, "row all"],
    positions: Int[Tensor, "row new"],
    cache: DynamicCache | None = None,
    kept: int | Int[Tensor, " place"] = 1,
    attention: str | None = None,
) -> Float[Tensor, "row kept vocab"]:
    """Logits after the last `kept` of some new tokens, or after those at given places.

    `mask` also covers what the cache holds. `attention`: which one to use where the caller has seen that the bridge is
    not needed.
    """
    # On the CPU: an index from there serves whichever device the last layer lies on.
    last = torch.empty(0, dtype=torch.long) if isinstance(kept, int) and kept == 0 else kept
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    options |= {"attention_mask": mask, "position_ids": positions, "logits_to_keep": last, "use_cache": bool(options)}
    with out_of_memory_is_named():
        if attention is not None or can_unhook(model):
            with unhooked(model, attention or "eager") as network:
                result = network(tokens, **options).logits
        else:
            result = model.forward(tokens, **options)
    if (spent := _spent.get()) is not None:
        spent.forward += tokens.numel()
        spent.backward += tokens.numel() if result.requires_grad else 0
    return result


def all_positions(mask: Bool[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Each token's position, counted from the row's first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def run_right_padded(
    tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], model: Model, cache: DynamicCache | None = None
) -> None:
    """Run left-padded rows with their padding moved behind them, where causal attention never sees it.

    So no token attends to nothing, which is not a number in float64 and may be none in float16.
    """
    width = tokens.shape[1]
    index = (torch.arange(width) + (width - lengths)[:, None]).clamp(max=width - 1)
    moved = tokens.gather(1, index.to(tokens.device)).to(model.cfg.device)
    mask = torch.ones_like(moved, dtype=torch.bool)
    run_tokens(model, moved, mask, all_positions(mask), cache, kept=0)


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
