"""RunConfig: all that decides a run's numbers but the weights, as a value and as a run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sitelens.checks.arguments import checked
from sitelens.checks.schema import unpacked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.errors import SitelensError
from sitelens.methods.site.config import TrainConfig
from sitelens.models.sources import DEFAULT_MODEL
from sitelens.reports.records import read_record


@checked
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides a run's numbers but the weights.

    tasks, model: names (a task may be a file).
    template, instruction, template_arguments: instead of the tasks' own, as fields of `Task`.
    n_prompts, n_shots: of the embedding; n_shots is also that of the few-shot condition.
    k: heads in the high-alpha, low-alpha and random conditions (None: a quarter of the model's heads).
    draws: random selections of k heads. n_items: test items a task (None: all). seed: of everything but training.
    """

    tasks: tuple[str, ...]
    model: str = DEFAULT_MODEL
    template: str | None = None
    instruction: str | None = None
    template_arguments: Any = None
    n_prompts: Count = 50
    n_shots: CountOrZero = 10
    train: TrainConfig = field(default_factory=TrainConfig)
    k: Count | None = None
    draws: CountOrZero = 5
    n_items: Count | None = 100
    metrics: tuple[str, ...] = ("first_token",)
    seed: Seed = 0

    @classmethod
    def _from_argument(cls, value: Any) -> RunConfig | None:
        """A configuration from a list of tasks, or from a dict of its fields."""
        if isinstance(value, Mapping):
            return cls(**value)
        tasks: Any = value
        return cls(tasks=tasks) if isinstance(value, str | Path | list | tuple) else None

    @staticmethod
    def load(path: str | Path) -> RunConfig:
        """The configuration that a run.json records.

        Raises:
            SitelensError: if the file is not there or is no run.json, naming the field that is not what it must be.
        """
        where, content = f"{path} is no run.json of sitelens: config", read_record(path)["config"]
        if "train" not in content:
            raise SitelensError(f"{where}: train is missing")
        return unpacked(RunConfig, content, {}, where)
