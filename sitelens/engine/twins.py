"""Twins: a model's modules once more, with the same weights, for forward passes of our own.

A twin has every parameter and buffer of its model, and modules of its own, in evaluation mode. What a pass needs
(hooks, another attention, adapters) is put on the twin and goes with it. The model itself is never touched: any number
of threads may run passes while the user runs hers, and an interrupt leaves nothing to be put back.
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

# Model types whose wrappers have no weights of their own, and whose z reaches the output projection as attention gave
# it: those that the tests compare with raw forward passes. All others run through the bridge.
BRIDGE_FREE = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3", "gemma3_text"})
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)
_ATOMS = {str, int, float, bool, type(None), Tensor, nn.Parameter, types.FunctionType, types.BuiltinFunctionType}
_TAKEN = {  # what a twin shares with its module, or what is seen to apart
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks",
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_hook_alias_registry", "_property_alias_registry", "hook_aliases",
}  # fmt: skip


def network_twin(bridge: Bridge, attention: str = "eager") -> Any:
    """The Hugging Face network beneath the bridge, without hook points, with `attention`."""
    return _Maker(bridged=False, attention=attention).module(bridge.original_model)


def bridge_twin(bridge: Bridge) -> Bridge:
    """The whole bridge, with the hooks that are on it now; those get the modules of the bridge, not of the twin."""
    return _Maker(bridged=True).module(bridge)


def is_user_hooked(bridge: Bridge) -> bool:
    """Whether code of the user's takes part in a forward pass: a hook on any module, or an instance's own `forward`."""
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
    """Whether a module's `forward` was replaced or compiled, so that it runs the model's modules and not a twin's."""
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
    """TransformerLens's hooks and torch's forward hooks on the bridge itself, heard by this context's passes only.

    They are off whenever and however the block ends.
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
    """Makes one twin. What modules hold is taken over as it is, but for other modules, containers and bound methods."""

    def __init__(self, bridged: bool, attention: str | None = None) -> None:
        self.bridged, self.attention = bridged, attention
        self.made: dict[int, Any] = {}
        self.wired: set[int] = set()  # ids of hooks that a block's twin makes anew for itself

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
        for name, value in list(own.items()):  # of the copy: another thread's pass may add to the original
            if type(value) not in _ATOMS and name not in _TAKEN:
                own[name] = self.value(value)
        if type(own.get("forward")) is types.FunctionType:  # a library's, as TransformerLens gives Falcon's linear maps
            own["forward"] = self.rebound(own["forward"])
        own["training"] = False
        own["_buffers"] = facts["_buffers"].copy()  # some rotary embeddings replace theirs in a forward pass
        own["_modules"] = {name: child and self.module(child) for name, child in list(facts["_modules"].items())}
        for name in HOOKS:
            own[name] = self.hooks(module, name) if facts[name] else OrderedDict()
        return twin

    def hooks(self, module: nn.Module, attribute: str) -> OrderedDict[int, Any]:
        """The twin's hooks of one kind: the user's, which get the module that they were put on, and the libraries'."""
        hers = users_hooks(module, attribute)
        found: OrderedDict[int, Any] = OrderedDict()
        for key, hook in list(vars(module)[attribute].items()):
            if key in hers:
                found[key] = hook if type(module) is HookPoint else functools.partial(_told_of, hook, module)
            elif key not in self.wired and Here.inside(hook) is None and "run_with_cache" not in _names_in(hook):
                found[key] = self.rebound(hook) if type(hook) is types.FunctionType else self.value(hook)
        return found

    def rebound(self, function: types.FunctionType) -> types.FunctionType:
        """A library's function with the twins of the modules that it holds in its closure."""
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        ours = [self.rebound(one) if type(one) is types.FunctionType else self.value(one) for one in held]
        if all(one is other for one, other in zip(held, ours, strict=True)):
            return function
        closure = tuple(types.CellType(one) for one in ours)
        return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__,
                                  closure)  # fmt: skip

    def value(self, value: Any) -> Any:
        """What the twin has for something that a module holds."""
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
        """Another of its kind that holds what the twin has for what it holds."""
        if id(thing) not in self.made:
            twin = self.made[id(thing)] = object.__new__(type(thing))
            twin.__dict__.update({name: self.value(value) for name, value in vars(thing).items()} | changes)
        return self.made[id(thing)]


def _told_of(hook: Callable[..., Any], module: nn.Module, _: nn.Module, *rest: Any) -> Any:
    return hook(module, *rest)


def _names_in(hook: Any) -> str:
    """The qualified names of a hook and of what TransformerLens wrapped in it."""
    inner = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    return " ".join(str(getattr(one, "__qualname__", "")) for one in (hook, *inner))
