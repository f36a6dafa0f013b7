"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the query and value projections, by way of the peft library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sitelens.conditions import Condition
from sitelens.defaults import SitelensError
from sitelens.fingerprints import fingerprint
from sitelens.forward import Hook
from sitelens.methods.common import answer_loss, answered, best_on_valid, drawn, fitting
from sitelens.models import Model, check_fit, head_shape, resolve_model
from sitelens.tasks import Task, load_task

RATES = (1e-4, 3e-4, 1e-3)
PROJECTIONS = ("q", "v")
ADAPTER = "sitelens"


@dataclass(frozen=True, eq=False)
class LowRank(Condition):
    """Low-rank adapters on every layer's query and value projection, in place while the condition is applied.

    weights: "q.A" `[layer rank d_in]`, "q.B" `[layer d_out rank]`, and the same for "v".
    """

    weights: dict[str, Tensor]
    alpha: int
    model: str | None = None
    steps = "every"

    def fwd_hooks(self, model: Model) -> list[Hook]:
        """None: adapters are weights.

        Raises:
            SitelensError: always.
        """
        raise SitelensError("LoRA changes weights, which hooks cannot: run the model in condition.applied(model)")

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        check_fit("the adapters", self.model, (len(self.weights["q.A"]),), model)
        with adapted(model, self.weights["q.A"].shape[1], self.alpha) as parameters:
            for name, layers in parameters.items():
                for parameter, values in zip(layers, self.weights[name], strict=True):
                    parameter.data.copy_(values)
            yield

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.weights, {"condition": "LowRank", "alpha": self.alpha, "model": self.model}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> LowRank:
        return cls(tensors, **meta)


@contextmanager
def adapted(model: Model, rank: int, alpha: int) -> Iterator[dict[str, list[Tensor]]]:
    """Adapters of peft around the projections of every layer; yields their parameters, by name and layer.

    The bridge calls the linear layers that its wrappers hold, on models with fused projections its own split ones:
    there the adapters stand, and there the layers are put back.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    wrappers: dict[str, Any] = {}
    for layer in range(head_shape(model)[0]):
        block: Any = model.blocks[layer]
        wrappers |= {f"{name}{layer}": getattr(block.attn, name) for name in PROJECTIONS}
    originals: dict[str, Any] = {key: wrapper.original_component for key, wrapper in wrappers.items()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(originals))
    adapters: Any = inject_adapter_in_model(config, nn.ModuleDict(originals), ADAPTER).eval()
    parameters: dict[str, list[Tensor]] = {f"{name}.{side}": [] for name in PROJECTIONS for side in "AB"}
    try:
        for key, wrapper in wrappers.items():
            adapter = adapters[key]
            wide = torch.promote_types(originals[key].weight.dtype, torch.float32)
            for side, half in (("A", adapter.lora_A[ADAPTER]), ("B", adapter.lora_B[ADAPTER])):
                parameters[f"{key[0]}.{side}"].append(half.to(originals[key].weight.device, wide).weight)
            wrapper._modules["_original_component"] = adapter
        yield parameters
    finally:
        for key, wrapper in wrappers.items():
            wrapper._modules["_original_component"] = originals[key]


def check_installed() -> None:
    """Raise SitelensError unless the peft library can be imported."""
    try:
        import peft  # noqa: F401
    except Exception as error:  # also one that does not fit the installed transformers
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__}: {error})"
        raise SitelensError(f"LoRA needs the peft library{reason}: pip install 'sitelens[lora]'") from error


def fit(
    task: Task | str,
    model: Model | str | None = None,
    *,
    rank: int = 8,
    alpha: int = 8,
    n_steps: int = 400,
    batch_size: int = 1,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> LowRank:
    """Adapters of rank 8 on q and v, trained on whole answers (AdamW); the learning rate is chosen on valid.

    As many steps of as many items as SITE takes; the rest are peft's defaults (no dropout).

    Raises:
        SitelensError: for a task without training or validation items, where peft is not installed, or if the loss is
            not finite at any of the rates.
    """
    check_installed()
    model, task = resolve_model(model), fitting(load_task(task))
    made_for = fingerprint(model)
    rows = answered(task, task.train, model)
    candidates = {}
    for rate in rates:
        with adapted(model, rank, alpha) as parameters:
            generator = torch.Generator().manual_seed(seed)
            for name, layers in parameters.items():
                for parameter in layers:  # the usual start: A uniform, B zero, so that nothing changes
                    bound = parameter.shape[1] ** -0.5 if name.endswith("A") else 0.0
                    parameter.data.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))
                    parameter.requires_grad_()
            flat = [parameter for layers in parameters.values() for parameter in layers]
            optimizer = torch.optim.AdamW(flat, lr=rate)
            for index in drawn(rows, n_steps, min(batch_size, len(rows)), f"lora/{task.name}/{seed}"):
                optimizer.zero_grad()
                answer_loss([rows[i] for i in index], model).backward()
                optimizer.step()
            weights = {name: torch.stack([p.detach().cpu() for p in layers]) for name, layers in parameters.items()}
        candidates[rate] = LowRank(weights, alpha, made_for)
    return candidates[best_on_valid(task, candidates, model)]
