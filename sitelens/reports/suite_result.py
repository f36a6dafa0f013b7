"""SuiteResult: the result of `run_suite`, with scores per task and means per group as in the paper's table."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sitelens import figures
from sitelens.checks.schema import packed
from sitelens.conditions.base import Condition
from sitelens.evaluation.result import Result
from sitelens.evaluation.summary import summarize
from sitelens.evaluation.tables import INTERVALS, Table, format_interval
from sitelens.figures.style import accuracy_label
from sitelens.store.artifact import Artifact

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class SuiteResult(Result):
    """Scores of every task of a suite under every condition.

    Attributes:
        name: name of the suite.
        scores: one row per task, condition and item: task, group, condition, seed, item, metric, score, logprob, rank,
            model, training_seed.
        tasks: one row per task, with the columns

            - task, group, digest, note (how it was split);
            - train, valid, test: number of items per split;
            - dropped: number of items, from all splits, that are too long for the context;
            - shared: share of test items whose answer begins with the same token as another answer of the task.
        left_out: reasons by task, for tasks without scores; by "TASK, METHOD" if only one method failed.
        conditions: the fitted conditions by method and task; not saved.
        record: how it was made, as plain JSON.
    """

    kind: ClassVar[str] = "suite"
    name: str
    scores: pd.DataFrame
    tasks: pd.DataFrame
    left_out: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Condition]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:  # type: ignore[override]
        """One row per task and condition: group, task, condition, metric, mean, low, high (95% Wilson interval), n."""
        return summarize(self.scores, by=("group", "task", "condition", "metric")).drop(columns="interval")

    def summary(self) -> pd.DataFrame:
        """Means over tasks, one row per group and condition, and one per condition over the whole suite.

        Columns: group ("all" for the whole suite), condition, metric, mean, low, high (95% interval over items of these
        tasks), n (number of answers), tasks_low, tasks_high (95% interval over tasks as well, if a group has several),
        tasks (their number).
        """
        whole = self.scores.assign(group="all")
        several = self.scores["group"].nunique() > 1
        rows = pd.concat([self.scores, whole] if several else [whole], ignore_index=True)
        means = summarize(rows, by=("group", "condition", "metric")).drop(columns="interval")
        return means.assign(tasks=means["group"].map(rows.groupby("group")["task"].nunique()))

    def tables(self) -> list[Table]:
        """One table of means over tasks, as in the paper: one row per condition, one column per group."""
        means = self.summary()
        most = means.groupby("group")["n"].max()
        texts, columns = [], []
        for row in means.to_dict("records"):
            group, n_tasks = row["group"], row["tasks"]
            count = f" (n={row['n']})" if row["n"] != most[group] else ""
            texts.append(format_interval(row, 1) + count)
            columns.append(f"{group} ({n_tasks} task{'' if n_tasks == 1 else 's'}, n={most[group]})")
        cells = means.assign(text=texts, column=columns)
        wide = cells.pivot_table(index="condition", columns="column", values="text", aggfunc="first", sort=False)
        metric = accuracy_label(str(means["metric"].iloc[0]))
        caption = f"{metric} in percent on the suite {self.name}: means over tasks (n: answers)."
        return [Table(wide, caption, INTERVALS if "tasks_low" in means else "")]

    def figure(self, title: str | None = None) -> go.Figure:
        """Every task under every condition, by group; tasks are sorted by the last condition, best first."""
        return figures.suite(self.frame, title or "")

    def frames(self) -> dict[str, pd.DataFrame]:
        """The DataFrames that are saved as CSV, by the suffix of the file name."""
        return {**super().frames(), "-tasks": self.tasks, "-scores": self.scores}

    @property
    def default_name(self) -> str:
        """The file name without suffix, if `save` is given no name."""
        return f"{self.kind}-{self.name}"

    def saved_record(self) -> dict[str, Any]:
        """The content of NAME.json, except the command."""
        table = json.loads(self.summary().round(5).to_json(orient="records"))
        return {**self.record, "table": table, "left_out": dict(self.left_out)}

    def artifact(self) -> Artifact:
        """The content of NAME.safetensors."""
        return Artifact(self.kind, {}, *packed(replace(self, conditions={})))

    def description(self) -> dict[str, Any]:
        """The entries of its repr."""
        return {"suite": self.name, "tasks": self.scores["task"].nunique(), "left_out": len(self.left_out),
                "conditions": list(self.scores["condition"].unique()), "model": self.model_name}  # fmt: skip
