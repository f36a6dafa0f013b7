"""Comparison: the result of `compare`, accuracy and costs of every method on every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sitelens import figures
from sitelens.errors import SitelensError
from sitelens.evaluation.result import Result
from sitelens.evaluation.summary import summarize
from sitelens.evaluation.tables import INTERVALS, Table, format_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

COSTS = ("trained", "forward_tokens", "backward_tokens", "fit_seconds", "seconds_per_prompt")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Accuracy and costs of every method on every task.

    Attributes:
        frame: one row per task and method, with the columns

            - task, method, model, seed, training_seed;
            - accuracy: first-token accuracy (full vocabulary, unfiltered test items); low, high: its 95% interval;
            - n: number of test items;
            - trained: number of trained parameters;
            - forward_tokens, backward_tokens: tokens that fitting takes, including choices made on valid;
            - fit_seconds; seconds_per_prompt: seconds per test prompt, evaluated in batches.
        scores: one row per task, condition (the label of the method) and test item: item, score, task, condition,
            metric, seed, training_seed, model.
        record: how it was made, as plain JSON.
    """

    kind: ClassVar[str] = "comparison"
    columns: ClassVar[tuple[str, ...]] = ("task", "method", "accuracy", "low", "high", "n", *COSTS)
    frame: pd.DataFrame
    scores: pd.DataFrame
    record: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """Means over tasks, one row per method in the order of `frame`.

        Columns: method, tasks (their number), accuracy, low, high (95% interval over items of these tasks, see
        `summarize`), tasks_low, tasks_high (95% interval over tasks as well; only with several tasks), and mean costs.
        """
        means = summarize(self.scores, by=("condition",)).rename(columns={"condition": "method", "mean": "accuracy"})
        means = means.set_index("method").drop(columns=["n", "interval"])
        grouped = self.frame.groupby("method", sort=False)
        means = means.join(grouped[list(COSTS)].mean())
        means.insert(0, "tasks", grouped["task"].nunique())
        return means.reset_index()

    def differences(self, against: str, by: tuple[str, ...] = ("task",)) -> pd.DataFrame:
        """Paired differences in accuracy between each method and `against` on the same items, with 95% intervals.

        Args:
            against: label of the reference method.
            by: ("task",) for one row per task and method; () for one row per method, over all tasks.

        Returns:
            The rows of `summarize(scores, against=against)` for the other methods, with the column condition renamed
            to method.

        Raises:
            SitelensError: for an unknown method.
        """
        if against not in set(self.frame["method"]):
            raise SitelensError(f"no method {against!r}; there are: {', '.join(self.frame['method'].unique())}")
        rows = summarize(self.scores, by=(*by, "condition"), against=against)
        return rows[rows["condition"] != against].rename(columns={"condition": "method"}).reset_index(drop=True)

    def tables(self) -> list[Table]:
        """Two tables: accuracy per task and method, with the mean over tasks; mean accuracy and costs per method."""
        means = self.summary().set_index("method")
        average = means.reset_index().assign(task=f"mean of {means['tasks'].max()}")
        cells = pd.concat([self.frame, average], ignore_index=True)
        cells["text"] = [format_interval(row, mean="accuracy") for row in cells.to_dict("records")]
        scores = cells.pivot_table(index="task", columns="method", values="text", aggfunc="first", sort=False)
        counts = self.frame.groupby("task", sort=False)["n"].max()
        accuracies = scores.iloc[-1]
        scores.insert(0, "n", [str(counts.get(task, counts.sum())) for task in scores.index])
        costs = means[list(COSTS)]
        texts = pd.DataFrame({
            "accuracy": accuracies.reindex(means.index),
            "trained parameters": [f"{value:,.0f}" for value in costs["trained"]],
            "forward tokens": [f"{value:,.0f}" for value in costs["forward_tokens"]],
            "backward tokens": [f"{value:,.0f}" for value in costs["backward_tokens"]],
            "seconds to fit": [f"{value:,.0f}" for value in costs["fit_seconds"]],
            "seconds per test prompt": [f"{value:.3f}" for value in costs["seconds_per_prompt"]],
        }).rename_axis("method")  # fmt: skip
        accuracy = "First-token accuracy in percent with 95% intervals"
        return [
            Table(scores, f"{accuracy} (n: test items).", INTERVALS if "tasks_low" in means else ""),
            Table(texts, f"{accuracy}, and costs: means over tasks."),
        ]

    def figure(self, title: str | None = None) -> go.Figure:
        """Mean accuracy per method against the number of trained parameters, and against the tokens of fitting."""
        return figures.comparison(self.frame, title or "")

    def frames(self) -> dict[str, pd.DataFrame]:
        """The DataFrames that are saved as CSV, by the suffix of the file name."""
        return {**super().frames(), "-scores": self.scores}

    def description(self) -> dict[str, Any]:
        """The entries of its repr."""
        models = self.frame["model"].unique() if "model" in self.frame else []
        return {"tasks": self.frame["task"].nunique(), "methods": list(self.frame["method"].unique()),
                "model": ", ".join(map(str, models))}  # fmt: skip
