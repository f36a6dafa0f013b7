"""How alpha is trained: the paper's settings, and what may be varied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sitelens.checks.arguments import checked
from sitelens.checks.values import Between, Count, Positive, Seed
from sitelens.engine.forward import Mixing

INIT = "'random' or lie between 0 and 1"


@dataclass(frozen=True, kw_only=True)
class Training:
    """The hyperparameters of training alpha; the defaults are the paper's.

    steps, lr, batch_size: Adam steps, its learning rate, training items per step.
    eval_every, n_valid: validation loss after every so many steps, on the first so many validation items.
    checkpoint: keep the alpha of the "best" validation loss (the paper's text), or the "last" (its released code).
    init: alpha at the start, a number between 0 and 1, or "random" (each head uniform in [0.01, 0.99],
        different for every task and seed).
    mixing: "convex", as published, or "additive".
    """

    steps: Count = 400
    lr: Positive = 0.2
    batch_size: Count = 1
    eval_every: Count = 50
    n_valid: Count = 100
    checkpoint: Literal["best", "last"] = "best"
    init: Annotated[float, Between(0, 1, open_ends=True, words=INIT)] | Literal["random"] = 0.5
    mixing: Mixing = "convex"


@checked
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Training):
    """How alpha is trained: `Training`'s hyperparameters, and a seed; the defaults are the paper's.

    steps, lr, batch_size: Adam steps, its learning rate, training items per step.
    eval_every, n_valid: validation loss after every so many steps, on the first so many validation items.
    checkpoint: keep the alpha of the "best" validation loss (the paper's text), or the "last" (its released code).
    init: alpha at the start, a number between 0 and 1, or "random" (each head uniform in [0.01, 0.99],
        different for every task and seed).
    mixing: "convex", as published, or "additive".
    seed: decides which items are drawn, and a random init.

    Raises:
        SitelensError: for an unknown field, or a value out of range.
    """

    seed: Seed = 0

    @classmethod
    def _from_argument(cls, value: Any) -> TrainConfig | None:
        """A configuration from a dict of its fields."""
        return cls(**value) if isinstance(value, Mapping) else None
