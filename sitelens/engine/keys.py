"""Cache keys: everything that determines a model's result, and the store that uses them.

A key covers the model's fingerprint, its tokenizer and the setting (versions, autocast, precision, the bridge's
switches). While something acts on the model that no key can describe (see `sitelens.models.interference`), the store
is neither read nor written.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sitelens.engine.prompts import few_shot_prompt
from sitelens.errors import SitelensWarning
from sitelens.models.facts import Facts, bridge_facts, modules_of, rotary_state
from sitelens.models.identity import tensor_sums
from sitelens.models.interference import heard, heard_in_tokenizer
from sitelens.models.model import Model
from sitelens.store.artifact import Artifact
from sitelens.store.digests import digest
from sitelens.store.folder import Cache, default_store
from sitelens.tasks import Task

ALGORITHM = 1  # of prompts, tokenization and forward passes: increase when any cached number changes
_LIBRARIES = ("torch", "transformers", "transformer_lens")
_FLAGS = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
          "fp32_precision")  # fmt: skip


STRETCHED = "rotary"  # key entry of models whose rotary embedding was permanently rescaled by longer prompts


Modules = Sequence[tuple[str, nn.Module]]


class ResultStore(Cache):
    """The default store for results of a model on some tasks; not used while an effect without a key is active.

    Args:
        model: the model that computes the results.
        tasks: the tasks that they are about.

    Attributes:
        key: entries that the spec of every result must contain (`model_key`).
        open: whether results may be read from the store; if not, a warning has said why.
    """

    def __init__(self, model: Model, tasks: Sequence[Task] = ()) -> None:
        self._model, self._tasks = model, tuple(tasks)
        self.open = not _is_heard(self._model)
        self.key = model_key(model, self._tasks)

    def get(self, kind: str, spec: Mapping[str, Any], read: Callable[[Artifact], Any] | None = None) -> Any:
        """The stored artifact, or `read(artifact)` if `read` is given; None if there is none."""
        return default_store().get(kind, spec, read) if self.open else None

    def put(self, artifact: Artifact) -> Path | None:
        """Store an artifact, unless the model or its setting has changed since the computation began.

        Returns:
            The path of the artifact, or None if it was not stored.
        """
        if not self.open or _is_heard(self._model):
            return None
        now = model_key(self._model, self._tasks)
        if any(now.get(name) != self.key.get(name) for name in now.keys() | self.key if name != STRETCHED):
            return None
        return default_store().put(artifact)


def model_key(model: Model, tasks: Sequence[Task] = ()) -> dict[str, str]:
    """Cache-key entries for results of a model on these tasks: model, tokenizer, setting, rendering of chat prompts."""
    modules = list(modules_of(model.bridge))
    surroundings = digest(setting(model, modules))[:32]
    key = {"model": model.fingerprint(), "tokenizer": model.tokenization(), "setting": surroundings}
    if chats := [task for task in tasks if task.template == "chat"]:
        key["rendering"] = digest([_rendering(task, model) for task in chats])[:32]
    if stretched := _rotary(modules):
        key[STRETCHED] = digest(stretched)[:32]
    return key


def setting(model: Model, modules: Modules) -> dict[str, Any]:
    """What a result depends on besides the model itself, as plain JSON.

    That is: versions of the libraries that compute; default dtype, autocast and precision of matrix products; the
    attention implementation; the bridge's switches and its compatibility mode. Devices and numbers of threads are left
    out: they only cause rounding differences.
    """
    facts = bridge_facts(model.bridge, modules)
    classes = {type(module) for _, module in modules}
    roots = {kind.__module__.split(".")[0] for kind in classes}
    return {
        "algorithm": ALGORITHM,
        "versions": {name: _version(name) for name in sorted(roots.union(_LIBRARIES))},
        "numbers": _numbers(model),
        "attention": getattr(model.network.config, "_attn_implementation", None),
        "bridge": [facts.plain, tensor_sums(facts.tensors)],
    }


def _numbers(model: Model) -> list[Any]:
    device = torch.device(model.device or "cpu").type
    kinds = sorted({device, "cpu"})
    casts = [[kind, torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))] for kind in kinds]
    casts = [cast[:2] if not cast[1] else cast for cast in casts]  # the dtype does not matter if autocast is off
    flags = [
        str(getattr(backend, flag, None)).replace("none", "ieee")  # PyTorch's default when the flag is not set
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
        for flag in _FLAGS
    ]
    return [str(torch.get_default_dtype()), casts, torch.get_float32_matmul_precision(), flags]


def _rotary(modules: Modules) -> list[Any]:
    state = Facts()
    for name, module in modules:
        rotary_state(name, module, state)
    return [state.plain, tensor_sums(state.tensors)] if state.plain else []


def _rendering(task: Task, model: Model) -> list[str]:
    """Two chat prompts of a task: the template may write today's date into them."""
    items = [*task.train, *task.valid, *task.test][:2]
    if not items:
        return []
    prompts = [few_shot_prompt(task, items[:n], items[-1], model.tokenizer) for n in (0, 1)]
    return [prompt.text for prompt in prompts]


@functools.cache
def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_heard(model: Model) -> bool:
    """Whether something changes the model's computation that a key cannot describe; a warning names it once."""
    what = heard(model.bridge) or heard_in_tokenizer(model.tokenizer)
    named: set[str] = model.once("interference", set)
    if what is not None and what not in named:
        named.add(what)
        warnings.warn(
            f"{what} may change what {model.name} computes: while it is there, results are computed with it and "
            "are neither taken from the cache nor put there",
            SitelensWarning, stacklevel=3,
        )  # fmt: skip
    return what is not None
