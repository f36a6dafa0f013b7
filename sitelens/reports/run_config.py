"""RunConfig: everything that decides the numbers of a run, except the weights of the model."""

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
    """Everything that decides the numbers of a run, except the weights of the model.

    Attributes:
        tasks: names of tasks, or paths of task files.
        model: name of the model.
        template, instruction, template_arguments: replace the tasks' own (see `Task`); None keeps them.
        n_prompts: number of few-shot prompts in a task embedding.
        n_shots: demonstrations per prompt, in the embedding and in the few-shot condition.
        train: training of the head selections.
        k: number of heads in the high-alpha, low-alpha and random conditions; None: a quarter of the model's heads.
        draws: number of random selections of k heads.
        n_items: maximum number of test items per task; None for all.
        metrics: names of metrics.
        seed: decides prompts and test items; training has its own seed, `train.seed`.
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
        """A configuration from a list of tasks or a dict of its fields; None for any other value."""
        if isinstance(value, Mapping):
            return cls(**value)
        tasks: Any = value
        return cls(tasks=tasks) if isinstance(value, str | Path | list | tuple) else None

    @staticmethod
    def load(path: str | Path) -> RunConfig:
        """The configuration in a run.json.

        Raises:
            SitelensError: if the file does not exist or is not a run.json, naming the invalid field.
        """
        where, content = f"{path} is no run.json of sitelens: config", read_record(path)["config"]
        if "train" not in content:
            raise SitelensError(f"{where}: train is missing")
        train = content["train"]
        if isinstance(train, dict) and "steps" in train and "n_steps" not in train:  # its name in version 0.1
            content = {**content, "train": {"n_steps" if key == "steps" else key: train[key] for key in train}}
        return unpacked(RunConfig, content, {}, where)
