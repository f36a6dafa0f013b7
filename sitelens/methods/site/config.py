"""Hyperparameters of training alpha: the paper's values, and what may be varied."""

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
    """Hyperparameters of training alpha; the defaults are the paper's.

    Attributes:
        n_steps: Adam steps.
        lr: learning rate of Adam.
        batch_size: training items per step.
        eval_every: steps between two measurements of the validation loss.
        n_valid: validation items used, the first of the split.
        checkpoint: "best" keeps the alpha with the lowest validation loss (the paper's text), "last" the final one (its
            released code).
        init: initial alpha, a number between 0 and 1, or "random" (each head uniform in [0.01, 0.99], different for
            every task and seed).
        mixing: "convex", as published, or "additive".
    """

    n_steps: Count = 400
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
    """Hyperparameters and seed of training alpha; the defaults are the paper's.

    Attributes:
        n_steps: Adam steps.
        lr: learning rate of Adam.
        batch_size: training items per step.
        eval_every: steps between two measurements of the validation loss.
        n_valid: validation items used, the first of the split.
        checkpoint: "best" keeps the alpha with the lowest validation loss (the paper's text), "last" the final one (its
            released code).
        init: initial alpha, a number between 0 and 1, or "random" (each head uniform in [0.01, 0.99], different for
            every task and seed).
        mixing: "convex", as published, or "additive".
        seed: fixes which items are drawn, and a random init.

    Raises:
        SitelensError: for an unknown field, or a value out of range.
    """

    seed: Seed = 0

    @classmethod
    def _from_argument(cls, value: Any) -> TrainConfig | None:
        """The configuration that a dict of fields describes."""
        return cls(**value) if isinstance(value, Mapping) else None
