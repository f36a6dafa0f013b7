"""Low-rank adapters (LoRA) on the query and value projections, as a condition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as linear_map

from sitelens.checks.arguments import checked
from sitelens.checks.schema import check_names, checked_tensor, unpacked
from sitelens.checks.values import Count
from sitelens.conditions.base import Condition
from sitelens.engine.forward import Hook
from sitelens.engine.network import Passes
from sitelens.engine.twins import hooked_here
from sitelens.errors import SitelensError
from sitelens.models.model import Bridge, Model, ModelLike, check_fit
from sitelens.models.provenance import Origin

PROJECTIONS = ("q", "v")
HALVES = {
    "q.A": Float[Tensor, "layer rank d_in"], "q.B": Float[Tensor, "layer q_out rank"],
    "v.A": Float[Tensor, "layer rank d_in"], "v.B": Float[Tensor, "layer v_out rank"],
}  # fmt: skip


@checked
@dataclass(frozen=True, eq=False)
class LowRank(Condition):
    """Low-rank adapters on every layer's query and value projection, active while the condition is applied.

    Attributes:
        weights: "q.A" `[layer rank d_in]`, "q.B" `[layer d_out rank]`, and the same for "v".
        alpha: scale of the adapters, which add (alpha / rank) B A x.
        model: fingerprint of the model they were trained on (None: any model with this number of layers).
        origin: where they came from, if known.

    Source:
        LoRA (Hu et al. 2021, arXiv 2106.09685), as computed by peft.
    """

    weights: dict[str, Tensor]
    alpha: Count
    model: str | None = None
    origin: Origin | None = None
    scope = "generation"

    def __post_init__(self) -> None:
        check_names(self.weights, HALVES, "the adapters")
        sizes: dict[str, int] = {}
        for name, hint in HALVES.items():
            if name not in self.weights:
                raise SitelensError(f"the adapters: {name} is missing")
            checked_tensor(self.weights[name], hint, f"the adapters: {name}", sizes)
        if self.alpha < 1:
            raise SitelensError(f"the adapters' alpha must be at least 1, got {self.alpha}")

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        """Not available: adapters cannot be written as TransformerLens hooks.

        Raises:
            SitelensError: always.
        """
        raise SitelensError("LoRA changes weights, which hooks cannot: run the model in condition.applied(model)")

    @contextmanager
    def applied(self, model: ModelLike) -> Iterator[None]:
        bridge = Model.of(model).bridge
        with hooked_here(bridge, module_hooks=self._adapters(Model(bridge)).hooks(bridge)):
            yield

    def _passes(self, model: Model) -> Passes:
        passes = Passes(model)
        passes.adapt(self._adapters(model).hooks)
        return passes

    def _adapters(self, model: Model) -> Adapters:
        check_fit("the adapters", self.model, (len(self.weights["q.A"]),), model, self.origin)
        adapters = Adapters(model, self.weights["q.A"].shape[1], self.alpha)
        for name, layers in adapters.weights.items():
            for weight, values in zip(layers, self.weights[name], strict=True):
                weight.data.copy_(values)
        return adapters

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> LowRank:
        """The adapters that `state` described.

        Raises:
            SitelensError: if a field does not match its declared type; the message names the field.
        """
        named = {name if name.startswith("weights.") else f"weights.{name}": half for name, half in tensors.items()}
        return unpacked(cls, meta, named, cls.__name__)


class Adapters:
    """Low-rank additions to the projections of every layer, as peft computes them: x -> (alpha / rank) B A x.

    They are added to the output of the projection, which may be quantized to 4 bits or carry adapters of the user;
    those are not changed. On models with fused projections the bridge calls its own split ones.

    Args:
        model: the model whose projections give the sizes, dtypes and devices.
        rank: inner dimension of A and B.
        alpha: scale; the addition is multiplied by alpha / rank.

    Attributes:
        weights: "q.A", "q.B", "v.A" and "v.B", each with one tensor per layer, `[rank d_in]` or `[d_out rank]`;
            initially zero.
    """

    def __init__(self, model: Model, rank: int, alpha: int) -> None:
        self.scaling = alpha / rank
        self.weights: dict[str, list[Tensor]] = {f"{name}.{side}": [] for name in PROJECTIONS for side in "AB"}
        for name, _, linear in _projections(model.bridge):
            weight = linear.weight
            options: Any = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
            self.weights[f"{name}.A"].append(torch.zeros(rank, linear.in_features, **options))
            self.weights[f"{name}.B"].append(torch.zeros(linear.out_features, rank, **options))

    def hooks(self, bridge: Bridge) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        """The projections of a bridge (or of a twin of it), each with the forward hook that adds its adapter."""
        return [
            (linear, functools.partial(self._add, name=name, layer=layer))
            for name, layer, linear in _projections(bridge)
        ]

    def _add(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor, *, name: str, layer: int) -> Tensor:
        down, up = (self.weights[f"{name}.{side}"][layer] for side in "AB")
        return (out + linear_map(linear_map(args[0].to(down.dtype), down), up) * self.scaling).to(out.dtype)


def _projections(bridge: Bridge) -> list[tuple[str, int, Any]]:
    """(name, layer, linear layer) of every layer's query and value projection."""
    blocks: Any = bridge.blocks
    return [
        (name, layer, getattr(blocks[layer].attn, name).original_component)
        for layer in range(bridge.cfg.n_layers)
        for name in PROJECTIONS
    ]
