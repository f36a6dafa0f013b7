"""Forward passes of a model: through a twin of its bridge if there are hooks, else of the Hugging Face network alone.

A hook point costs a Python call even without hooks, and the bridge computes attention in separate steps so that each
can have a hook point. Without hooks, the Hugging Face network therefore runs directly. Twins (`sitelens.engine.twins`)
share the model's weights, so edits of the weights take effect in them; the model itself is never changed.
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
    """Forward passes of a model with the hooks that it has now, and with hooks that act on these passes only.

    Args:
        model: the model to run.
        hooks: TransformerLens hooks (name, function) to install.

    Attributes:
        user_hooked: whether the user's code takes part (a hook on any module, or a replaced `forward`). It acts in
            these passes as well. As it may refer to the last position, or to any, prompts then run whole: without a
            cached prefix and without padding.
        prompt: the number of prompt tokens, if whole texts are run again for each new token; else None.
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
        """The passes themselves, or new passes of the model as it is now."""
        return model if isinstance(model, Passes) else Passes(model)

    @property
    def can_bypass_bridge(self) -> bool:
        """Whether the network runs without its bridge: a tested model type, and no hooks, ours or the user's."""
        compatible = getattr(self.model.bridge, "compatibility_mode", False)
        known = self.model.network.config.model_type in BRIDGE_FREE
        return self._twin is None and not self.user_hooked and not compatible and known

    @contextmanager
    def bridge(self) -> Iterator[Bridge]:
        """The bridge to run: a twin or, if a module's `forward` was replaced, the model itself under a lock."""
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
        """A twin of the network with this attention implementation."""
        if attention not in self._networks:
            self._networks[attention] = network_twin(self.model.bridge, attention)
        return self._networks[attention]

    def install(self, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> None:
        """Add TransformerLens hooks to these passes, permanently."""
        self._hooks += hooks
        for name, hook in () if self._forward_replaced else hooks:
            self._made().add_hook(name, hook)

    def adapt(self, adapters: Callable[[Bridge], list[ModuleHook]]) -> None:
        """Add the forward hooks that `adapters(bridge)` returns to these passes, permanently."""
        self._adapters.append(adapters)
        for module, hook in () if self._forward_replaced else adapters(self._made()):
            module.register_forward_hook(hook)


ModuleHook = tuple[nn.Module, Callable[..., Any]]


@dataclass
class Compute:
    """The cost of a computation: tokens run forward, how many of them backward (padding included), and seconds."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


_spent: ContextVar[Compute | None] = ContextVar("spent", default=None)


@contextmanager
def metered() -> Iterator[Compute]:
    """Context manager that counts the tokens of all forward passes in the block and, when it ends, its seconds."""
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
    """Logits at the last `kept` positions of some new tokens, or at given positions.

    Args:
        model: a model, or passes with hooks.
        tokens: the new tokens.
        mask: real tokens, those in the cache included.
        positions: position ids of the new tokens.
        cache: keys and values of earlier tokens; it grows if its layers do.
        kept: how many last positions need logits, or the indices of those that do.
        attention: attention implementation for the network when it runs without its bridge.

    Raises:
        SitelensError: if memory runs out, for a gradient through weights made in inference mode, or a token id outside
            the model's vocabulary.
    """
    passes = Passes.of(model)
    check_tokens(passes.model, tokens)
    # On the CPU: such an index works on whichever device the last layer is.
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
    """Raise SitelensError if a token on the CPU is not in the model's vocabulary (on a GPU, checking would block)."""
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
    """Run left-padded rows with their padding moved to the end, where causal attention never sees it.

    So no padding token attends to nothing, which gives NaN in float64 and may in float16.
    """
    width = tokens.shape[1]
    index = (torch.arange(width) + (width - lengths)[:, None]).clamp(max=width - 1)
    passes = Passes.of(model)
    moved = tokens.gather(1, index.to(tokens.device)).to(passes.model.device)
    mask = torch.ones_like(moved, dtype=torch.bool)
    run_tokens(passes, moved, mask, all_positions(mask), cache, kept=0)


@contextmanager
def out_of_memory_is_named(hint: str = "lower memory_budget (sl.settings.memory_budget)") -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a SitelensError that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise SitelensError(f"out of memory: {hint}") from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise SitelensError(f"out of memory: {hint}") from error
        raise
