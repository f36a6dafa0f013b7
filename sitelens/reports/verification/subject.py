"""Subject: a model to verify, with prompts, the raw network, and the tolerance of comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.prompts import few_shot_prompts
from sitelens.engine.twins import network_twin
from sitelens.errors import SitelensError
from sitelens.heads.direct import tolerance
from sitelens.models.model import Model
from sitelens.tasks import Task

SHOTS = (3, 2, 1)  # demonstrations per prompt, so that prompts differ in length
NEW_TOKENS = 8


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        detail: the outcome in words.
        error: the largest difference, relative to the scale of what is compared; NaN if no numbers are compared.
        limit: the largest error that passes; NaN if no numbers are compared.
        right: False if the check fails for another reason.
    """

    detail: str = ""
    error: float = float("nan")
    limit: float = float("nan")
    right: bool = True

    @property
    def holds(self) -> bool:
        return self.right and (math.isnan(self.limit) or self.error <= self.limit)


@dataclass(eq=False)
class Subject:
    """A model to verify, with few-shot prompts of `task` and the results of the raw network for them."""

    model: Model
    task: Task
    seed: int

    @cached_property
    def batch(self) -> PromptBatch:
        tokenizer, items = self.model.tokenizer, self.task.valid[: len(SHOTS)]
        prompts = [
            few_shot_prompts(self.task, [item], shots, tokenizer, self.seed, "valid", [place])[0]
            for place, (item, shots) in enumerate(zip(items, SHOTS, strict=False))
        ]
        return tokenize(prompts, tokenizer, self.model.context_length, f"task {self.task.name!r}", NEW_TOKENS)

    @cached_property
    def ids(self) -> list[Int[Tensor, "1 pos"]]:
        """Token ids of each prompt, without padding."""
        rows = zip(self.batch.tokens, self.batch.mask, strict=True)
        return [tokens[mask][None].to(self.model.device) for tokens, mask in rows]

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """Names in the raw network of the modules that the bridge wraps, by id of the module."""
        found: dict[int, list[str]] = {}
        for name, module in self.model.network.named_modules(remove_duplicate=False):
            found.setdefault(id(module), []).append(name.replace("._original_component", ""))
        return found

    def module(self, network: Any, point: str) -> nn.Module:
        """The module of the raw network that corresponds to a component of the bridge.

        Args:
            network: the raw network.
            point: name of the component, such as "blocks.0.attn.o".

        Raises:
            SitelensError: if the raw network has no such module.
        """
        wrapped: Any = self.model.bridge.get_submodule(point)
        for name in self.names.get(id(wrapped.original_component), []):
            try:
                return network.get_submodule(name)
            except AttributeError:
                continue
        raise SitelensError(f"{point} of {self.model.name} is not found in the raw network")

    def raw(self, attention: str = "eager") -> Any:
        """The raw network, with this attention implementation of transformers."""
        return network_twin(self.model.bridge, attention)

    @cached_property
    def logits(self) -> Float[Tensor, "row vocab"]:
        """Logits of the raw network after the last token of each prompt."""
        network = self.raw()
        with torch.no_grad():
            return torch.cat([network(ids, use_cache=False).logits[:, -1] for ids in self.ids]).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.computing_dtype

    @cached_property
    def limit(self) -> float:
        """The largest difference that passes, relative to the scale (see `sitelens.reports.verification.verify`)."""
        if self.model.dtype in (torch.float32, torch.float64):
            return tolerance(self.model)
        mask = self.batch.mask.to(self.model.device)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        network, tokens = self.raw(), self.batch.tokens.to(self.model.device)
        with torch.no_grad():
            padded = network(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        noise = distance(padded.to(self.dtype), self.logits)
        spacing = torch.finfo(self.model.dtype).eps
        return min(2 * tolerance(self.model), 4 * max(spacing, 0.0 if math.isnan(noise) else noise))

    def compared(self, found: Tensor, expected: Tensor, detail: str = "") -> Finding:
        return Finding(detail, distance(found.to(self.dtype), expected.to(self.dtype)), self.limit)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest deviation of the expected values from their mean."""
    scale = (expected - expected.mean(-1, keepdim=True)).abs().max().clamp(min=1e-30)
    return float((found.to(expected) - expected).abs().max() / scale)
