"""How alpha is trained: the paper's settings, and what may be varied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sitelens.defaults import SitelensError
from sitelens.forward import Mixing


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How alpha is trained; the defaults are the paper's.

    steps, lr, batch_size: Adam steps, its learning rate, training items a step.
    eval_every, n_valid: validation loss after every so many steps, on the first so many validation items.
    checkpoint: keep the alpha of the "best" validation loss (the paper's text), or the "last" (its released code).
    init: alpha at the start, a number between 0 and 1, or "random" (each head uniform in [0.01, 0.99],
        different for every task and seed).
    mixing: "convex", as published, or "additive".
    seed: decides which items are drawn, and a random init.
    """

    steps: int = 400
    lr: float = 0.2
    batch_size: int = 1
    eval_every: int = 50
    n_valid: int = 100
    checkpoint: Literal["best", "last"] = "best"
    init: float | Literal["random"] = 0.5
    mixing: Mixing = "convex"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "n_valid"):
            if getattr(self, name) < 1:
                raise SitelensError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise SitelensError(f"TrainConfig.lr must be positive, got {self.lr}")
        if self.checkpoint not in ("best", "last"):
            raise SitelensError(f"TrainConfig.checkpoint must be 'best' or 'last', got {self.checkpoint!r}")
        if self.mixing not in get_args(Mixing):
            raise SitelensError(f"TrainConfig.mixing must be one of {', '.join(get_args(Mixing))}, got {self.mixing!r}")
        if self.init != "random" and not (isinstance(self.init, int | float) and 0 < self.init < 1):
            raise SitelensError(f"TrainConfig.init must be 'random' or lie between 0 and 1, got {self.init!r}")
