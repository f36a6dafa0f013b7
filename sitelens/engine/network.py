"""Forward passes of a model: through a twin of its bridge where a hook acts, of the network beneath it where none does.

A hook point costs a Python call whether or not it has a hook, and a bridge computes attention step by step so that
each step has one. Where nobody listens the Hugging Face network runs as it is. Twins share the weights, so those
edited meanwhile are the ones that count; the model itself is never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sitelens.contexts import bound
from sitelens.engine.twins import (
    BRIDGE_FREE,
    bridge_twin,
    forward_is_replaced,
    hooked_here,
    is_user_hooked,
    network_twin,
)
from sitelens.errors import SitelensError
from sitelens.models.model import Bridge, Model


class Passes:
    """Forward passes of a model as it is at this moment, under hooks that act on these passes only.

    user_hooked: whether code of the user takes part (a hook of hers on any module). It acts here, too, and since it may
        mean the last position, or any, prompts are then run whole: no prefix on its own, no padding.
    prompt: where whole texts are run again for each new token, how many of their tokens are the prompt's.
    """

    def __init__(self, model: Model, hooks: Sequence[tuple[str, Callable[..., Any]]] = ()) -> None:
        self.model = model
        self.user_hooked = is_user_hooked(self.model.bridge)
        self.prompt: int | None = None
        self._forward_replaced = self.user_hooked and forward_is_replaced(self.model.bridge)
        self._twin: Bridge | None = None
        self._networks: dict[str, Any] = {}
        self._hooks: list[tuple[str, Callable[..., Any]]] = []
        self._adapters: list[Callable[[Bridge], list[ModuleHook]]] = []
        if hooks:
            self.install(hooks)

    @staticmethod
    def of(model: Model | Passes) -> Passes:
        """These passes, or those of the model as it is now."""
        return model if isinstance(model, Passes) else Passes(model)

    @property
    def can_bypass_bridge(self) -> bool:
        """Whether the network runs without its bridge: a known type, no hook of ours, and nobody listens."""
        compatible = getattr(self.model.bridge, "compatibility_mode", False)
        known = self.model.network.config.model_type in BRIDGE_FREE
        return self._twin is None and not self.user_hooked and not compatible and known

    @contextmanager
    def bridge(self) -> Iterator[Bridge]:
        """The bridge to run: a twin or, where a module's `forward` was replaced, the model itself under a lock."""
        if not self._forward_replaced:
            yield self._made()
            return
        bridge = self.model.bridge
        adapted = [pair for adapters in self._adapters for pair in adapters(bridge)]
        with self.model.lock, hooked_here(bridge, self._hooks, adapted):
            yield bridge

    def _made(self) -> Bridge:
        if self._twin is None:
            self._twin = bridge_twin(self.model.bridge)
        return self._twin

    def network(self, attention: str) -> Any:
        """The network's twin with this attention."""
        if attention not in self._networks:
            self._networks[attention] = network_twin(self.model.bridge, attention)
        return self._networks[attention]

    def install(self, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> None:
        """Add TransformerLens hooks, for good."""
        self._hooks += hooks
        for name, hook in () if self._forward_replaced else hooks:
            self._made().add_hook(name, hook)

    def adapt(self, adapters: Callable[[Bridge], list[ModuleHook]]) -> None:
        """Add the forward hooks that `adapters` makes for modules of a bridge, for good."""
        self._adapters.append(adapters)
        for module, hook in () if self._forward_replaced else adapters(self._made()):
            module.register_forward_hook(hook)


ModuleHook = tuple[nn.Module, Callable[..., Any]]


@dataclass
class Compute:
    """What a computation took: tokens run forward, how many of them backward (padding counts), and seconds."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


_spent: ContextVar[Compute | None] = ContextVar("spent", default=None)


@contextmanager
def metered() -> Iterator[Compute]:
    """The tokens of all forward passes in the block, counted as they run, and its seconds, known at its end."""
    spent, outer, started = Compute(), _spent.get(), time.perf_counter()
    try:
        with bound(_spent, spent):
            yield spent
    finally:
        spent.seconds = time.perf_counter() - started
        if outer is not None:
            outer.forward += spent.forward
            outer.backward += spent.backward


def run_tokens(
    model: Model | Passes,
    tokens: Int[Tensor, "row new"],
    mask: Bool[Tensor, "row all"],
    positions: Int[Tensor, "row new"],
    cache: DynamicCache | None = None,
    kept: int | Int[Tensor, " place"] = 1,
    attention: str = "eager",
) -> Float[Tensor, "row kept vocab"]:
    """Logits after the last `kept` of some new tokens, or after those at given places.

    `mask` also covers what the cache holds. `attention`: the one that the plain network is to use.

    Raises:
        SitelensError: if memory runs out, for a gradient through weights made in inference mode, or a token that the
            model does not have.
    """
    passes = Passes.of(model)
    check_tokens(passes.model, tokens)
    # On the CPU: an index from there serves whichever device the last layer lies on.
    last = torch.empty(0, dtype=torch.long) if isinstance(kept, int) and kept == 0 else kept
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    options |= {"attention_mask": mask, "position_ids": positions, "logits_to_keep": last, "use_cache": bool(options)}
    with out_of_memory_is_named():
        try:
            if passes.can_bypass_bridge:
                result = passes.network(attention)(tokens, **options).logits
            else:
                with passes.bridge() as bridge:
                    result = bridge.forward(tokens, **options)
        except RuntimeError as error:
            if "Inference tensors cannot be saved" in str(error):
                raise SitelensError(
                    f"the weights of {passes.model.name} were made under torch.inference_mode(), and nothing "
                    "can be trained through such: load the model outside of it"
                ) from error
            raise
    if (spent := _spent.get()) is not None:
        spent.forward += tokens.numel()
        spent.backward += tokens.numel() if result.requires_grad else 0
    return result


def check_tokens(model: Model, tokens: Tensor) -> None:
    """Raise SitelensError if tokens on the CPU are not all in the model's vocabulary (on a GPU a look would wait)."""
    if tokens.is_cpu and tokens.numel() and (largest := int(tokens.max())) >= model.d_vocab:
        text = model.tokenizer.decode([largest])
        raise SitelensError(
            f"the token {text!r} has the id {largest}, but {model.name} has {model.d_vocab} tokens: resize "
            "the model's embeddings to its tokenizer, or use the tokenizer that it was trained with"
        )


def all_positions(mask: Bool[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Each token's position, counted from the row's first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def run_right_padded(
    tokens: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    model: Model | Passes,
    cache: DynamicCache | None = None,
) -> None:
    """Run left-padded rows with their padding moved behind them, where causal attention never sees it.

    So no token attends to nothing, which is not a number in float64 and may be none in float16.
    """
    width = tokens.shape[1]
    index = (torch.arange(width) + (width - lengths)[:, None]).clamp(max=width - 1)
    passes = Passes.of(model)
    moved = tokens.gather(1, index.to(tokens.device)).to(passes.model.device)
    mask = torch.ones_like(moved, dtype=torch.bool)
    run_tokens(passes, moved, mask, all_positions(mask), cache, kept=0)


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
