"""Conditions that edit the residual stream at the last token, or the outputs of attention and MLP blocks."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sitelens.checks.arguments import checked
from sitelens.conditions.base import Condition, Scope
from sitelens.engine.capture import run_with_callbacks
from sitelens.engine.forward import Hook
from sitelens.errors import SitelensError
from sitelens.models.model import Model, ModelLike, check_fit
from sitelens.models.provenance import Origin


def stream_hook(layer: int) -> str:
    """The hook point of the residual stream after a layer, `[batch pos d_model]`."""
    return f"blocks.{layer}.hook_resid_post"


def at_last_token(x: Float[Tensor, "row pos d_model"], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A new x in which the last position is replaced by `change` of it, in the dtype of x."""
    return torch.cat([x[:, :-1], change(x[:, -1:]).to(x.dtype)], dim=1)


def added(last: Float[Tensor, "row 1 d_model"], vector: Float[Tensor, " d_model"]) -> Tensor:
    """`last` plus `vector`, in the dtype of `vector`."""
    return last.to(vector.dtype) + vector


Part = Literal["attn", "mlp"]
MODULES: tuple[Part, Part] = ("attn", "mlp")
INNER: dict[Part, str] = {"attn": "o", "mlp": "out"}


def output_hooks(part: Part, model: ModelLike) -> list[str]:
    """Hook points, one per layer, of the output of attention or MLP before it is added to the residual stream.

    Some architectures add the residual stream inside the module (both modules in BLOOM, the MLP in MPT); for those, it
    is the output of the module's last projection. One forward pass over two tokens finds out which do.

    Raises:
        SitelensError: if a module adds the residual stream and has no hook point for its own output.
    """
    whole = Model.of(model)
    return whole.once(f"outputs of {part}", lambda: _found_outputs(part, whole))


def _found_outputs(part: Part, model: Model) -> list[str]:
    layers = model.shape.layers
    outer = [f"blocks.{layer}.{part}.hook_out" for layer in range(layers)]
    inner = [f"blocks.{layer}.{part}.{INNER[part]}.hook_out" for layer in range(layers)]
    # The whole residual stream: the block's output after the MLP, the input of the second norm after attention.
    whole = [f"blocks.{layer}.{'hook_out' if part == 'mlp' else 'ln2.hook_in'}" for layer in range(layers)]
    seen: dict[str, Tensor] = {}
    points = [name for name in (*outer, *inner, *whole) if name in model.bridge.hook_dict]
    run_with_callbacks(
        torch.tensor([[0, 1]]), model, {name: functools.partial(seen.__setitem__, name) for name in points}
    )
    found = []
    for out, own, stream in zip(outer, inner, whole, strict=True):
        adds = out in seen and stream in seen and _alike(seen[out], seen[stream])
        if adds and (own not in seen or _alike(seen[own], seen[stream])):
            raise SitelensError(
                f"{out} of {model.name} is the whole residual stream, and what the {part} adds to it is not "
                "shown: this method does not support the architecture"
            )
        found.append(own if adds else out)
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@checked
@dataclass(frozen=True, eq=False)
class _StreamCondition(Condition):
    """Vectors `[layer d_model]` for the residual stream after each of `layers`.

    `model` is the fingerprint of the model they were made for (None: any model with this d_model).
    """

    positions = "last"
    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    model: str | None = None
    scope: Scope = "generation"
    n_trained: int = 0  # number of trained parameters
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.vectors) or any(layer < 0 for layer in self.layers):
            raise SitelensError(f"{len(self.vectors)} vectors cannot stand after the layers {self.layers}")
        if self.scope not in get_args(Scope) or self.n_trained < 0:
            both = f"{self.scope!r} and {self.n_trained}"
            raise SitelensError(f"scope must be 'prompt' or 'generation' and n_trained at least 0, not {both}")

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        check_stream(f"a {type(self).__name__}", self.model, self.vectors.shape[1], model, self.origin)
        if max(self.layers) >= Model.of(model).shape.layers:
            raise SitelensError(f"{Model.of(model).name} has no layer {max(self.layers)}")
        return [
            (stream_hook(layer), functools.partial(self._act, vector=vector))
            for layer, vector in zip(self.layers, self.vectors, strict=True)
        ]

    def _act(self, x: Tensor, hook: Any = None, *, vector: Tensor) -> Tensor:
        return at_last_token(x, lambda last: self.changed(last, vector.to(x.device)))

    @abstractmethod
    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        """The new state of the last token, given the old one `[batch 1 d_model]` and the layer's vector."""


@checked
@dataclass(frozen=True, eq=False)
class AddToStream(_StreamCondition):
    """x <- x + vector at the last token, after each of `layers`; `vectors` has one row per layer.

    Source:
        Function vectors (Todd et al. 2024, arXiv 2310.15213), learnable task vectors (Saglam et al. 2025, arXiv
        2502.05390).
    """

    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        return added(last, vector)


@checked
@dataclass(frozen=True, eq=False)
class ReplaceStream(_StreamCondition):
    """x <- vector at the last token, after each of `layers`; `vectors` has one row per layer.

    Source:
        Task vectors (Hendel et al. 2023, arXiv 2310.15916).
    """

    scope: Scope = "prompt"

    def changed(self, last: Tensor, vector: Tensor) -> Tensor:
        return vector.expand(last.shape)


def check_stream(what: str, made_for: str | None, width: int, model: ModelLike, origin: Origin | None = None) -> None:
    """Raise SitelensError unless vectors of `width` entries, made for the fingerprint `made_for`, fit `model`."""
    model = Model.of(model)
    if width != model.d_model:
        raise SitelensError(f"{what} has vectors of {width} entries, {model.name} has d_model {model.d_model}")
    check_fit(what, made_for, (), model, origin)


@checked
@dataclass(frozen=True, eq=False)
class InContextVector(Condition):
    """Rotates the output x of every MLP towards a direction, at every position and step, keeping its norm.

    x <- |x| u / |u| with u = x / |x| + strength (1 + max(0, cos(x, -v))) v, for the unit direction v of the layer.

    Attributes:
        directions: `[layer d_model]`, unit vectors.
        strength: lambda in the paper.
        model: fingerprint of the model they were made for (None: any model with this d_model).
        origin: where they came from, if known.

    Source:
        In-context vectors (Liu et al. 2024, arXiv 2311.06668).
    """

    directions: Float[Tensor, "layer d_model"]
    strength: float
    model: str | None = None
    origin: Origin | None = None
    scope = "generation"

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        check_stream("an in-context vector", self.model, self.directions.shape[1], model, self.origin)
        return [
            (point, functools.partial(self._turn, direction=direction))
            for point, direction in zip(output_hooks("mlp", model), self.directions, strict=True)
        ]

    def _turn(self, x: Tensor, hook: Any = None, *, direction: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        state, v = x.to(wide), direction.to(x.device, wide)
        length = state.norm(dim=-1, keepdim=True)
        unit = state / length.clamp(min=1e-12)
        u = unit + self.strength * (1 + (unit @ -v).clamp(min=0)[..., None]) * v
        return (length * normalize(u, dim=-1)).to(x.dtype)


@checked
@dataclass(frozen=True, eq=False)
class LinearCombination(Condition):
    """out <- b out + a context for the outputs of attention and MLP in every layer, at every position and step.

    Attributes:
        context: `[layer module d_model]`; the modules are attention and MLP, in this order.
        a: `[layer module]`, weights of the context.
        b: `[layer module]`, weights of the output.
        model: fingerprint of the model they were made for (None: any model with this d_model).
        origin: where they came from, if known.

    Source:
        Implicit in-context learning (Li et al. 2024, arXiv 2405.14660).
    """

    context: Float[Tensor, "layer module d_model"]
    a: Float[Tensor, "layer module"]
    b: Float[Tensor, "layer module"]
    model: str | None = None
    origin: Origin | None = None
    scope = "generation"

    def __post_init__(self) -> None:
        if self.a.shape[1] != len(MODULES):
            raise SitelensError(f"a linear combination is of {' and '.join(MODULES)}, not of {self.a.shape[1]} modules")

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        check_stream("a linear combination", self.model, self.context.shape[2], model, self.origin)
        return combining(self.context, self.a, self.b, points=output_points(model))


def combining(
    context: Float[Tensor, "layer module d_model"],
    a: Float[Tensor, "layer module"],
    b: Float[Tensor, "layer module"],
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    points: Sequence[str] | None = None,
) -> list[Hook]:
    """The hooks of a `LinearCombination` with these parameters.

    Args:
        context: vectors added to the outputs of attention and MLP.
        a: weights of the context.
        b: weights of the outputs.
        noise: standard deviation of Gaussian noise per coordinate, as a share of the norm of the mixed output.
        generator: random generator of the noise, on the CPU.
        points: hook points, layer by layer (`output_points`; default: each module's hook_out).
    """

    def act(out: Tensor, hook: Any = None, *, layer: int, module: int) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        parts = (side[layer, module].to(out.device) for side in (a, b, context))
        of_context, of_out, vector = parts
        mixed = of_out * out.to(wide) + of_context * vector.to(wide)
        if noise:
            random = torch.randn(mixed.shape, generator=generator, dtype=torch.float32).to(mixed)
            mixed = mixed + noise * mixed.detach().norm(dim=-1, keepdim=True) * random
        return mixed.to(out.dtype)

    where = points or [f"blocks.{layer}.{module}.hook_out" for layer in range(len(context)) for module in MODULES]
    acts = [functools.partial(act, layer=layer, module=i) for layer in range(len(context)) for i in range(len(MODULES))]
    return list(zip(where, acts, strict=True))


def output_points(model: ModelLike) -> list[str]:
    """Hook points of the outputs of attention and MLP, layer by layer."""
    return [point for both in zip(*(output_hooks(part, model) for part in MODULES), strict=True) for point in both]
