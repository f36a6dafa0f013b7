"""Conditions: what a task is evaluated under, from plain prompting to patched heads.

Few-shot prompting changes the prompt; the other conditions install hooks or adapters while a prompt is run. A condition
that edits only the last prompt token also implements `patch()`, and the evaluator then runs it as rows of one batch
over a shared prefix.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sitelens.checks.schema import packed, unpacked
from sitelens.checks.values import CountOrZero, converted
from sitelens.conditions.registry import KINDS, kind_of, register
from sitelens.engine.forward import HeadEdit, Hook, Mixing
from sitelens.engine.network import Passes
from sitelens.engine.twins import hooked_here
from sitelens.errors import SitelensError
from sitelens.models.model import Bridge, Model, ModelLike
from sitelens.models.provenance import model_label
from sitelens.store.artifact import Artifact
from sitelens.store.digests import canonical_json
from sitelens.store.kinds import Kind

Positions = Literal["last", "all"]
Scope = Literal["prompt", "generation"]
_OLD_SCOPES = {"prompt": "prompt", "every": "generation"}  # `steps` in conditions saved by earlier versions


@dataclass(frozen=True, eq=False)
class Patch:
    """An edit of every head: its mask alpha, the vectors mixed in, and how (see `HeadEdit.mix`)."""

    alpha: Float[Tensor, "layer head"]
    vectors: Float[Tensor, "layer head d_head"]
    mixing: Mixing = "convex"

    def edit(self, model: ModelLike, everywhere: bool = False) -> HeadEdit:
        """A `HeadEdit` of one row on the model's device, at the last token or (with `everywhere`) at all positions."""
        model = Model.of(model)
        dtype, device = model.computing_dtype, model.device
        alpha, vectors = self.alpha.to(device, dtype), self.vectors.to(device, dtype)
        return HeadEdit.mix(alpha[None], vectors[None], self.mixing, everywhere)


class Condition(ABC):
    """What a task is evaluated under. Subclasses implement `fwd_hooks`, and `patch` if it applies.

    Attributes:
        n_shots: number of demonstrations in the prompt, drawn separately for each item.
        positions: "last" if nothing before the last prompt token is edited, so that other conditions can share the
            prefix; "all" otherwise.
        scope: "prompt" if only the forward pass of the prompt is edited, "generation" if each decoding step is as well.
        registry: the condition classes by the name they are saved under.
        saved_as: the name this class is saved under.
    """

    n_shots: int = 0
    positions: Positions = "all"
    scope: Scope = "prompt"
    registry: ClassVar[dict[str, type[Condition]]] = KINDS
    saved_as: ClassVar[str] = ""

    def __init_subclass__(cls, saved_as: str | None = None, **options: Any) -> None:
        """Register the class under the name used in saved files: "MODULE:CLASS", or `saved_as`.

        Raises:
            SitelensError: if another class has that name, or the class sets `steps` (the former name of `scope`).
        """
        super().__init_subclass__(**options)
        if isinstance(steps := vars(cls).get("steps"), str) and steps in _OLD_SCOPES:
            raise SitelensError(f"{cls.__name__}.steps is called scope: write scope = {_OLD_SCOPES[steps]!r}")
        cls.saved_as = register(cls, saved_as)
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # keeps the inherited one: a dataclass's own repr would print whole tensors

    def __repr__(self) -> str:
        """One line with the fields that differ from their defaults; tensors are shown by their shapes."""
        if not is_dataclass(self):
            return super().__repr__()
        known = vars(self)
        words = []
        for field in fields(self):
            value = known.get(field.name)
            if field.name == "model":
                words.append(model_label(known.get("origin"), value))
            elif field.name != "origin" and not (type(value) is type(field.default) and value == field.default):
                words.append(f"{field.name}={_brief(value)}")
        return f"{type(self).__name__}({', '.join(words)})"

    @abstractmethod
    def fwd_hooks(self, model: Bridge) -> list[Hook]:
        """TransformerLens hooks for your own `run_with_hooks`; they act in every forward pass in which they are called.

        Prompts must be left-padded, so that each ends at position -1.

        Raises:
            SitelensError: if this condition was made for another model.
        """

    def patch(self, model: Bridge) -> Patch | None:
        """The last-token edit, if that is all this condition does while a prompt is run; None if it does more.

        Raises:
            SitelensError: if this condition was made for another model.
        """
        return None

    @contextmanager
    def applied(self, model: ModelLike) -> Iterator[None]:
        """Context manager in which the condition is in effect, for one prompt's forward pass and its decoding.

        It affects only this thread or async task, not passes that others run on the same model. Hooks that act on the
        prompt only (`scope` "prompt") do nothing after their first call.

        Raises:
            SitelensError: if this condition was made for another model.
        """
        bridge = Model.of(model).bridge
        hooks = self.fwd_hooks(bridge)
        if self.scope == "prompt":
            hooks = [(name, _once(hook)) for name, hook in hooks]
        with hooked_here(bridge, hooks):
            yield

    def _passes(self, model: Model) -> Passes:
        """Internal passes with this condition in effect, for one batch of prompts and their decoding."""
        passes = Passes(model)
        passes.install([(name, self._hook(hook, passes)) for name, hook in self.fwd_hooks(model.bridge)])
        return passes

    def _hook(self, own: Any, passes: Passes) -> Any:
        """`own`, adapted to passes over a prompt and then token by token, or over whole texts run again per token."""
        step_by_step = own if self.scope == "generation" else _once(own)

        def act(tensor: Tensor, hook: Any = None) -> Tensor | None:
            length = passes.prompt
            if length is None or (self.scope == "generation" and self.positions == "all"):
                return step_by_step(tensor, hook=hook)
            for end in [length] if self.scope == "prompt" else range(length, tensor.shape[1] + 1):
                new = own(tensor[:, :end], hook=hook)
                tensor = tensor if new is None else torch.cat([new, tensor[:, end:]], dim=1)
            return tensor

        return act

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file, which `Condition.load` reads on any machine; returns its path.

        Raises:
            SitelensError: for a user-defined condition with fields that are neither tensors nor plain JSON.
        """
        tensors, meta = self.state()
        try:
            canonical_json(meta)
        except (TypeError, ValueError) as error:
            raise SitelensError(f"{type(self).__name__} cannot be saved: it must define state ({error})") from error
        return Artifact(Kind.CONDITION, {}, tensors, meta).save(path)

    @staticmethod
    def load(path: str | Path) -> Condition:
        """The condition saved in a file, of whichever class.

        Raises:
            SitelensError: if there is no such file, it is damaged or holds something else, or it needs a user-defined
                class that has not been imported.
        """
        artifact = Artifact.load(path, Kind.CONDITION)
        return Condition.from_saved(artifact.tensors, artifact.meta, artifact.where)

    @staticmethod
    def from_saved(tensors: dict[str, Tensor], meta: Any, where: str = "the condition") -> Condition:
        """The condition that `state` described, of whichever class.

        Args:
            tensors: as returned by `state`.
            meta: as returned by `state`; "condition" names the class.
            where: where it was read from, for error messages.

        Raises:
            SitelensError: if the class is unknown, or the contents do not fit it.
        """
        name = meta.get("condition") if isinstance(meta, dict) else None
        if not isinstance(name, str):
            raise SitelensError(f"{where}: the kind of condition must be text, not {name!r}")
        kind: type[Condition] = kind_of(name, where)
        rest = {key: value for key, value in meta.items() if key != "condition"}
        if isinstance(steps := rest.get("steps"), str) and steps in _OLD_SCOPES and "scope" not in rest:
            rest["scope"] = _OLD_SCOPES[rest.pop("steps")]
        try:
            return kind.from_state(dict(tensors), rest)
        except (SitelensError, TypeError, KeyError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            what = "" if isinstance(error, SitelensError) else f"no {kind.__name__} can be made of it: "
            raise SitelensError(f"{where}: {what}{error}") from error

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON (with the key "condition") for `from_state`: by default, the fields of a dataclass.

        Override it for fields that are neither tensors nor plain JSON.
        """
        tensors, meta = packed(self) if is_dataclass(self) else ({}, {})
        return tensors, {"condition": self.saved_as, **meta}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Condition:
        """The condition that `state` described: by default, its fields, checked against their type hints.

        Raises:
            SitelensError: if a field does not match its declared type; the message names the field.
        """
        if is_dataclass(cls):
            return unpacked(cls, meta, tensors, cls.__name__)
        return cls(**tensors, **meta)


@contextmanager
def in_effect(condition: Condition, model: Model) -> Iterator[Passes]:
    """Context manager of passes with a condition in effect; a user's subclass may override `applied`."""
    kinds = type(condition).__mro__
    applied, passes = (next(kind for kind in kinds if name in vars(kind)) for name in ("applied", "_passes"))
    if kinds.index(applied) < kinds.index(passes):
        with condition.applied(model.bridge):
            yield Passes(model)
    else:
        yield condition._passes(model)


def checked_conditions(conditions: Mapping[str, Condition] | Condition) -> dict[str, Condition]:
    """Conditions by name; a single condition is named after its class.

    Raises:
        SitelensError: if there is none, or for an invalid `scope`, `positions` or `n_shots`.
    """
    named = {type(conditions).__name__: conditions} if isinstance(conditions, Condition) else dict(conditions)
    if not named:
        raise SitelensError("give at least one condition, for example {'zero-shot': sl.ZeroShot()}")
    for name, condition in named.items():
        for field, kind in (("scope", Scope), ("positions", Positions), ("n_shots", CountOrZero)):
            converted(f"{field} of the condition {name!r}", getattr(condition, field), kind)
    return named


def _brief(value: Any) -> str:
    """A short form of a value: a tensor's shape; long texts and lists are abbreviated."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values()):
        return f"{len(value)} tensors"
    return reprlib.repr(value) if isinstance(value, str | tuple | list | dict) else repr(value)


def _once(hook: Any) -> Any:
    remaining = iter([hook])

    def first_call_only(tensor: Tensor, hook: Any = None) -> Any:
        act = next(remaining, None)
        return None if act is None else act(tensor, hook=hook)

    return first_call_only
