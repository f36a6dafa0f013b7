"""State of a training: its history and best alphas, and a checkpoint from which an interrupted training resumes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sitelens.conditions.selection import saturated
from sitelens.errors import SitelensError
from sitelens.methods.site.config import TrainConfig
from sitelens.store.artifact import Artifact
from sitelens.store.folder import default_store
from sitelens.store.kinds import Kind

ALGORITHM = 1  # version of training; raise it whenever the numbers change
ALGORITHM_RANDOM_INIT = 2  # likewise, with a random init; raise it whenever ALGORITHM is raised, too
KEEP_SECONDS = 10  # least time between two saves of a training's state
HISTORY = ("step", "loss", "valid_loss", "mean_alpha", "fraction_saturated")


class Record:
    """History of a training, and each run's alpha at its best (or last) checkpoint so far."""

    def __init__(self, runs: int, config: TrainConfig, alpha: Float[Tensor, "run layer head"]) -> None:
        self.history = torch.full((config.n_steps, runs, len(HISTORY)), torch.nan, dtype=torch.float64)
        self.best = torch.full((runs,), torch.inf, dtype=torch.float64)
        self.alpha = alpha
        self._keep_last = config.checkpoint == "last"

    def step(self, step: int, loss: Float[Tensor, " run"], alpha: Float[Tensor, "run layer head"]) -> None:
        now = self.history[step]
        now[:, 0], now[:, 1], now[:, 3] = step + 1, loss, alpha.mean((1, 2))
        now[:, 4] = saturated(alpha).double().mean((1, 2))

    def validation(self, step: int, loss: Float[Tensor, " run"], alpha: Float[Tensor, "run layer head"]) -> None:
        self.history[step, :, 2] = loss
        better = torch.ones_like(loss, dtype=torch.bool) if self._keep_last else loss < self.best
        self.best = torch.where(better, loss, self.best)
        self.alpha = torch.where(rearrange(better, "run -> run 1 1").to(alpha.device), alpha, self.alpha)


class State:
    """Everything needed to resume a training, saved as an artifact while it runs."""

    def __init__(self, keys: Sequence[str], logits: Tensor, optimizer: torch.optim.Adam, record: Record) -> None:
        self._spec = {"algorithm": ALGORITHM, "runs": list(keys)}
        self._known = all(keys)
        self._logits, self._optimizer, self._record = logits, optimizer, record
        self._saved = time.monotonic()

    def restore(self) -> int:
        """Restores the saved state, if there is one; returns the number of steps already done."""
        kept = default_store().get(Kind.TRAINING, self._spec, self._checked) if self._known else None
        if kept is None:
            return 0
        with torch.no_grad():
            self._logits.copy_(kept.tensors["logits"])
        names = ("step", "exp_avg", "exp_avg_sq")
        self._optimizer.state[self._logits] = {
            name: kept.tensors[name].to(self._logits.device if name != "step" else "cpu") for name in names
        }
        self._record.history, self._record.best = kept.tensors["history"], kept.tensors["best"]
        self._record.alpha = kept.tensors["alpha"].to(self._logits.device)
        return int(kept.meta["steps"])

    def _checked(self, kept: Artifact) -> Artifact:
        record, like = self._record, self._logits
        expected = {"logits": like, "exp_avg": like, "exp_avg_sq": like, "alpha": record.alpha, "best": record.best,
                    "history": record.history, "step": torch.empty(())}  # fmt: skip
        steps = kept.meta.get("steps")
        if type(steps) is not int or not 0 < steps < len(record.history) or set(kept.meta) != {"steps"}:
            raise SitelensError(f"{kept.where}: steps must be between 0 and {len(record.history)}, not {steps!r}")
        if set(kept.tensors) != set(expected):
            raise SitelensError(f"{kept.where} holds the tensors {', '.join(sorted(kept.tensors))}")
        for name, tensor in expected.items():
            one = kept.tensors[name]
            gaps = name in ("history", "best")  # NaN or infinite for steps still to come
            if (one.shape, one.dtype) != (tensor.shape, tensor.dtype) or not (gaps or torch.isfinite(one).all()):
                raise SitelensError(f"{kept.where}: {name} is not what this training keeps")
        if (
            not bool(((kept.tensors["alpha"] >= 0) & (kept.tensors["alpha"] <= 1)).all())
            or kept.tensors["step"] != steps
        ):
            raise SitelensError(f"{kept.where}: alpha or step is not what this training keeps")
        return kept

    def keep(self, steps: int) -> None:
        """Saves the state, at most every KEEP_SECONDS."""
        if not self._known or steps == len(self._record.history) or time.monotonic() - self._saved < KEEP_SECONDS:
            return
        record = self._record
        tensors = {"logits": self._logits, "history": record.history, "best": record.best, "alpha": record.alpha}
        default_store().put(
            Artifact(Kind.TRAINING, self._spec, tensors | self._optimizer.state[self._logits], {"steps": steps})
        )
        self._saved = time.monotonic()

    def forget(self) -> None:
        """Deletes the saved state; the training has ended and its results are stored."""
        default_store().remove(Kind.TRAINING, self._spec)
