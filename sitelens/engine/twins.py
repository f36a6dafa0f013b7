"""Twins: copies of a model's modules that share its weights, for internal forward passes.

A twin shares every parameter and buffer with its model, but has its own module objects, in evaluation mode. Hooks,
another attention implementation or adapters are put on the twin and disappear with it. The model itself is never
changed, so several threads can run passes while the user runs the model, and after an interrupt there is nothing to
restore.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver
from transformers import PreTrainedConfig

from sitelens.models.interference import Here, is_foreign, users_hooks
from sitelens.models.model import Bridge

# Model types whose bridge wrappers have no weights of their own, and whose z reaches the output projection unchanged.
# The tests compare these with raw forward passes. All other types run through the bridge.
BRIDGE_FREE = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3", "gemma3_text"})
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)
_ATOMS = {str, int, float, bool, type(None), Tensor, nn.Parameter, types.FunctionType, types.BuiltinFunctionType}
_TAKEN = {  # attributes that a twin shares with its module, or that are handled separately
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks",
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_hook_alias_registry", "_property_alias_registry", "hook_aliases",
}  # fmt: skip


def network_twin(bridge: Bridge, attention: str = "eager") -> Any:
    """A twin of the bridge's Hugging Face network, without hook points, with this attention implementation."""
    return _Maker(bridged=False, attention=attention).module(bridge.original_model)


def bridge_twin(bridge: Bridge) -> Bridge:
    """A twin of the whole bridge with its current hooks; the user's hooks receive the bridge's own modules."""
    return _Maker(bridged=True).module(bridge)


def is_user_hooked(bridge: Bridge) -> bool:
    """Whether the user's code takes part in a forward pass: a hook on any module, or a replaced `forward`."""
    return any(EVERYWHERE) or any(map(_is_user_hooked, _modules(bridge)))


def _modules(bridge: Bridge) -> Iterator[nn.Module]:
    stack: list[nn.Module] = [bridge, bridge.original_model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack += [child for child in module._modules.values() if child is not None]


def _is_user_hooked(module: nn.Module) -> bool:
    facts = module.__dict__
    return _forward_is_replaced(module) or any(facts[name] and users_hooks(module, name) for name in HOOKS)


def forward_is_replaced(bridge: Bridge) -> bool:
    """Whether a module's `forward` was replaced or compiled, so that it would run the model's modules, not a twin's."""
    return any(map(_forward_is_replaced, _modules(bridge)))


def _forward_is_replaced(module: nn.Module) -> bool:
    facts = module.__dict__
    if "forward" in facts and is_foreign(facts["forward"]):
        return True
    return facts.get("_compiled_call_impl") is not None or "_orig_mod" in facts["_modules"]


@contextmanager
def hooked_here(
    bridge: Bridge,
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    module_hooks: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
) -> Iterator[None]:
    """Context manager that installs hooks on the bridge itself; only passes of this thread or async task call them.

    They are removed when the block ends, also after an error or an interrupt.

    Args:
        bridge: the user's bridge.
        fwd_hooks: TransformerLens hooks (name, function).
        module_hooks: torch forward hooks (module, function).
    """
    token = object()
    try:
        try:
            for name, hook in fwd_hooks:
                bridge.add_hook(name, Here(hook, token))
            for module, hook in module_hooks:
                module.register_forward_hook(Here(hook, token))
            with Here.active_for(token):
                yield
        finally:
            _remove(bridge, token)
    finally:
        _remove(bridge, token)


def _remove(bridge: Bridge, token: object) -> None:
    for module in _modules(bridge):
        if isinstance(module, HookPoint):
            module.fwd_hooks[:] = [
                handle for handle in module.fwd_hooks if getattr(handle.user_hook, "token", None) is not token
            ]
        for key, hook in list(module._forward_hooks.items()):
            if getattr(Here.inside(hook), "token", None) is token:
                module._forward_hooks.pop(key, None)


class _Maker:
    """Makes one twin. Modules, containers and bound methods are copied; all other attributes are shared."""

    def __init__(self, bridged: bool, attention: str | None = None) -> None:
        self.bridged, self.attention = bridged, attention
        self.made: dict[int, Any] = {}
        self.wired: set[int] = set()  # ids of hooks that the twin of a block installs again by itself

    def module(self, module: nn.Module) -> Any:
        """The module's twin."""
        while not self.bridged and isinstance(module, GeneralizedComponent):
            module = module._modules["_original_component"]  # type: ignore[assignment]
        if id(module) in self.made:
            return self.made[id(module)]
        twin = self.made[id(module)] = object.__new__(type(module))
        facts, own = module.__dict__, twin.__dict__
        own.update(facts)
        if isinstance(module, BlockBridge):
            self.wired |= {handle.id for handle in list(facts["_capture_hook_handles"])}
            own["_capture_hooks_wired"], own["_capture_hook_handles"] = False, []
        for name, value in list(own.items()):  # of the copy: another thread's pass may change the original
            if type(value) not in _ATOMS and name not in _TAKEN:
                own[name] = self.value(value)
        if type(own.get("forward")) is types.FunctionType:  # a library's: TransformerLens sets one on Falcon's linears
            own["forward"] = self.rebound(own["forward"])
        own["training"] = False
        own["_buffers"] = facts["_buffers"].copy()  # some rotary embeddings replace their buffers in a forward pass
        own["_modules"] = {name: child and self.module(child) for name, child in list(facts["_modules"].items())}
        for name in HOOKS:
            own[name] = self.hooks(module, name) if facts[name] else OrderedDict()
        return twin

    def hooks(self, module: nn.Module, attribute: str) -> OrderedDict[int, Any]:
        """The twin's hooks of one kind: the user's, which receive the original module, and those of libraries."""
        hers = users_hooks(module, attribute)
        found: OrderedDict[int, Any] = OrderedDict()
        for key, hook in list(vars(module)[attribute].items()):
            if key in hers:
                found[key] = hook if type(module) is HookPoint else functools.partial(_told_of, hook, module)
            elif key not in self.wired and Here.inside(hook) is None and "run_with_cache" not in _names_in(hook):
                found[key] = self.rebound(hook) if type(hook) is types.FunctionType else self.value(hook)
        return found

    def rebound(self, function: types.FunctionType) -> types.FunctionType:
        """A library function in which the modules in its closure are replaced by their twins."""
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        ours = [self.rebound(one) if type(one) is types.FunctionType else self.value(one) for one in held]
        if all(one is other for one, other in zip(held, ours, strict=True)):
            return function
        closure = tuple(types.CellType(one) for one in ours)
        return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__,
                                  closure)  # fmt: skip

    def value(self, value: Any) -> Any:
        """The twin's counterpart of an attribute value: modules are replaced by their twins, also in containers."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is dict or kind is OrderedDict:
            return kind((key, self.value(one)) for key, one in list(value.items()))
        if kind in (list, tuple, set):
            return kind(map(self.value, list(value)))
        if isinstance(value, nn.Module):
            return self.module(value)
        if kind is types.MethodType and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if kind is functools.partial:
            function, args, options = (self.value(part) for part in (value.func, value.args, value.keywords))
            return functools.partial(function, *args, **options)
        if isinstance(value, PreTrainedConfig):
            return (
                value if self.attention is None else self.shallow(value, _attn_implementation_internal=self.attention)
            )
        if isinstance(value, TransformersDriver):
            return self.shallow(value)
        return value

    def shallow(self, thing: Any, **changes: Any) -> Any:
        """A shallow copy of an object whose attributes are replaced by their counterparts."""
        if id(thing) not in self.made:
            twin = self.made[id(thing)] = object.__new__(type(thing))
            twin.__dict__.update({name: self.value(value) for name, value in vars(thing).items()} | changes)
        return self.made[id(thing)]


def _told_of(hook: Callable[..., Any], module: nn.Module, _: nn.Module, *rest: Any) -> Any:
    return hook(module, *rest)


def _names_in(hook: Any) -> str:
    """The qualified names of a hook and of the functions that TransformerLens wrapped in it."""
    inner = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    return " ".join(str(getattr(one, "__qualname__", "")) for one in (hook, *inner))
