"""Interference: anything that changes a model's computation but cannot be part of a cache key, such as user hooks.

What a user's function does can neither be read nor compared. If one is detected, results are computed with it, as they
should be, but are neither read from the cache nor written to it.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers.modeling_utils import AttentionInterface

from sitelens.contexts import bound
from sitelens.models.facts import modules_of

# Libraries whose code is identified by a version, which is in the keys.
LIBRARIES = (
    "sitelens", "torch", "transformers", "transformer_lens", "peft", "accelerate", "bitsandbytes", "torchao", "optimum",
    "gptqmodel", "awq", "auto_gptq", "hqq", "compressed_tensors", "quanto", "kernels", "flash_attn", "xformers",
    "triton", "causal_conv1d", "mamba_ssm", "fla", "numpy", "einops", "jaxtyping", "beartype", "typing_extensions",
    "tokenizers", "safetensors", "huggingface_hub",
)  # fmt: skip
_HOOKS = {
    "_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook", "_backward_pre_hooks": "a backward pre-hook",
    "_state_dict_hooks": "a state-dict hook", "_state_dict_pre_hooks": "a state-dict pre-hook",
    "_load_state_dict_pre_hooks": "a load-state-dict hook", "_load_state_dict_post_hooks": "a load-state-dict hook",
}  # fmt: skip
_RUNNING_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
                 "_global_backward_pre_hooks")  # fmt: skip


def heard(model: TransformerBridge) -> str | None:
    """What changes the model's computation now and is not covered by cache keys, in words; None if there is nothing.

    Detected are: hooks on hook points and modules (of the bridge and of its network), global module hooks, functions
    replaced on an instance, in a class or in a modeling file, user-defined module classes and attention functions,
    compiled modules, and PyTorch's function and dispatch modes. Hooks that libraries install for themselves are
    ignored.
    """
    if mode := _mode():
        return mode
    classes: set[type] = set()
    for name, module in modules_of(model, hook_points=True):
        kind = type(module)
        inside = vars(module)
        for attribute in _RUNNING_HOOKS if kind is HookPoint else _HOOKS:
            if inside[attribute] and users_hooks(module, attribute):
                return f"{_HOOKS[attribute]} on {_usual_name(name, module, model)}"
        if kind is HookPoint:
            continue
        classes.add(kind)
        for attribute, value in inside.items():
            if type(value) in _FUNCTIONS and hasattr(kind, attribute) and is_foreign(value):
                return f"a replaced {attribute} of {name}"
        if inside.get("_compiled_call_impl") is not None:
            return f"torch.compile on {name}"
    return _replaced_code(classes) or _attention(model)


def users_hooks(module: nn.Module, attribute: str) -> set[int]:
    """Keys of the user's hooks of one kind on a module.

    Not counted are hooks of libraries on modules, their permanent hooks on hook points, those of a `run_with_cache` in
    another thread, and sitelens's own hooks of another context.

    Args:
        module: a module or hook point.
        attribute: name of the dict of hooks, for example "_forward_hooks".
    """
    hooks = list(vars(module)[attribute].items())
    if type(module) is not HookPoint:
        return {key for key, hook in hooks if (hook.active if isinstance(hook, Here) else is_foreign(hook))}
    handles = {handle.hook.id: handle for handle in [*module.fwd_hooks, *module.bwd_hooks]}
    found = set()
    for key, hook in hooks:
        own = Here.inside(hook)
        if own is not None:
            if own.active:
                found.add(key)
        elif key not in handles or (
            "run_with_cache" not in getattr(handles[key].user_hook, "__qualname__", "")
            and (not handles[key].is_permanent or is_foreign(handles[key].user_hook))
        ):
            found.add(key)
    return found


def _usual_name(name: str, module: nn.Module, model: TransformerBridge) -> str:
    """The usual TransformerLens name of a hook point, such as blocks.0.attn.hook_z."""
    names = [alias for alias, point in model.hook_dict.items() if point is module]
    return next((alias for alias in names if not alias.endswith(("hook_in", "hook_out"))), name)


def heard_in_tokenizer(tokenizer: Any) -> str | None:
    """What changes a tokenizer's output and is not in its files, in words: user-defined code, dropout; else None."""
    kind = type(tokenizer)
    if not is_library(kind.__module__):
        return f"a tokenizer of the class {kind.__qualname__}, whose code sitelens does not know"
    for name, value in vars(tokenizer).items():
        if type(value) in _FUNCTIONS and hasattr(kind, name) and is_foreign(value):
            return f"a replaced {name} of the tokenizer"
    if replaced := _replaced_methods(set(kind.__mro__)):
        return replaced
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(getattr(backend, "model", None), "dropout", None):
        return "the dropout of the tokenizer"
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        rule = getattr(backend, step, None)
        try:
            if rule is not None:
                rule.__getstate__()
        except Exception:  # steps written in Python cannot be serialized
            return f"a {step} of the tokenizer that is written in Python"
    return None


class Here:
    """A sitelens hook on the user's model that acts only in the context (thread or async task) that installed it."""

    _present: ClassVar[ContextVar[frozenset[object]]] = ContextVar("present", default=frozenset())

    def __init__(self, hook: Callable[..., Any], token: object) -> None:
        self.hook, self.token = hook, token

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.hook(*args, **options) if self.active else None

    @property
    def active(self) -> bool:
        """Whether the current context is the one that installed it."""
        return self.token in self._present.get()

    @classmethod
    def active_for(cls, token: object) -> AbstractContextManager[None]:
        """Context manager in which hooks with this token are active, for the current context."""
        return bound(cls._present, cls._present.get() | {token})

    @staticmethod
    def inside(hook: Any) -> Here | None:
        """The sitelens hook in `hook`, or None; on a hook point it is in the closure that TransformerLens makes."""
        inner: list[Any] = []
        if getattr(hook, "__module__", "") == HookPoint.__module__ and getattr(hook, "__closure__", None):
            inner = [cell.cell_contents for cell in hook.__closure__]
        return next((one for one in (hook, *inner) if isinstance(one, Here)), None)


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def _mode() -> str | None:
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    for mode in (*modes, *_get_current_dispatch_mode_stack()):
        return f"the mode {type(mode).__qualname__}"
    for attribute in _GLOBAL_HOOKS:
        if any(map(is_foreign, getattr(torch_module, attribute).values())):
            return "a hook on all modules (torch.nn.modules.module)"
    return None


def _replaced_code(classes: set[type]) -> str | None:
    """A user-defined class or a replaced function among the modules' code, in words; else None."""
    files: set[str] = {"torch.nn.functional"}
    bases: set[type] = set()
    for kind in classes:
        if not is_library(kind.__module__):
            return f"a module of the class {kind.__qualname__}, whose code sitelens does not know"
        if not issubclass(kind, GeneralizedComponent):
            files.add(kind.__module__)
        bases.update(kind.__mro__)
    if replaced := _replaced_methods(bases):
        return replaced
    for file in files:
        for name, value in vars(sys.modules[file]).items():
            if isinstance(value, types.FunctionType) and is_foreign(value):
                return f"a replaced {file}.{name}"
    return None


def _replaced_methods(classes: set[type]) -> str | None:
    for kind in classes - {object}:
        for name, value in vars(kind).items():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and is_foreign(function):
                return f"a replaced {kind.__qualname__}.{name}"
    return None


def _attention(model: TransformerBridge) -> str | None:
    network: Any = model.original_model
    name = getattr(network.config, "_attn_implementation", None)
    function = AttentionInterface().get(name) if isinstance(name, str) else None
    return f"the attention function {name!r}" if function is not None and is_foreign(function) else None


# Functions known to be a library's own; the weak references keep none of them alive.
_libraries_own: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()


def is_foreign(function: Any, depth: int = 3) -> bool:
    """Whether a function, or one that it wraps (to `depth` levels), is not code of a library with a known version.

    Classes and modules are not functions: modules are checked one by one elsewhere.
    """
    if isinstance(function, types.FunctionType):
        own = (function.__module__ or "").split(".")[0] == "sitelens"  # also if wrapped by a type checker
        if own or function in _libraries_own:
            return False
        if not _is_libraries_code(function):
            return True
        if depth:
            wrapped = [getattr(function, "__wrapped__", None)]
            for cell in function.__closure__ or ():
                try:
                    wrapped.append(cell.cell_contents)
                except ValueError:  # the cell is still empty
                    continue
            if any(isinstance(inner, _FUNCTIONS) and is_foreign(inner, depth - 1) for inner in wrapped):
                return True
        if not function.__closure__:  # the contents of a closure can change
            _libraries_own.add(function)
        return False
    if isinstance(function, types.MethodType):
        return is_foreign(function.__func__, depth)
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return any(is_foreign(part, depth - 1) for part in parts if depth and callable(part))
    if isinstance(function, (type, nn.Module)):
        return False
    if isinstance(inner := getattr(function, "hook", None), Callable):  # some hooks are wrapped by PyTorch
        return is_foreign(inner, depth)
    return not is_library(type(function).__module__)


def is_library(module: str | None) -> bool:
    """Whether a Python module belongs to a library whose version is in the keys, or to the standard library."""
    root = (module or "").split(".")[0]
    return root in LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


def _is_libraries_code(function: types.FunctionType) -> bool:
    if not is_library(function.__module__):
        return False
    file = function.__code__.co_filename
    if file.startswith("<"):  # generated code (dataclasses, namedtuples), but not `python -c`
        return file.startswith("<frozen") or function.__name__.startswith("__")
    return _is_libraries_file(file)


_libraries_files: set[str] = set()
_STDLIB = sysconfig.get_paths()["stdlib"]


def _is_libraries_file(file: str) -> bool:
    if file not in _libraries_files:
        origins = [getattr(sys.modules.get(name), "__file__", None) for name in LIBRARIES]
        folders = [str(Path(origin).parent) for origin in origins if origin and origin.endswith("__init__.py")]
        of_python = file.startswith(_STDLIB) and "-packages" not in file
        if of_python or file.startswith(tuple(folders)) or file in origins:
            _libraries_files.add(file)
    return file in _libraries_files
