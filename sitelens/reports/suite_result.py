"""What a suite gave: scores, a table like the paper's, a figure, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sitelens import figures
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.selection import HeadSelection
from sitelens.evaluation.summary import summarize
from sitelens.evaluation.tables import INTERVALS, Table, format_interval
from sitelens.files.writing import Outputs, check_file_name, write_csv, write_text
from sitelens.models.model import Model
from sitelens.reports.gallery import write_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """What a suite gave.

    scores: one row per task, condition and item: task, group, condition, seed, item, metric, score, logprob, rank,
        model, training_seed.
    tasks: one row a task: task, group, train, valid, test (items that were used at most), dropped (items too long for
    the context, from all splits), shared (share of test items whose answer's first token is also that of another answer
    of the task), note (how it was split), digest.
    left_out: every task of the suite that is not among them, and why; "TASK, METHOD" where only a method failed.
    embeddings, selections: SITE's, by task.
    """

    name: str
    model: Model
    scores: pd.DataFrame
    tasks: pd.DataFrame
    left_out: dict[str, str]
    embeddings: dict[str, TaskEmbedding]
    selections: dict[str, HeadSelection]
    facts: dict[str, Any]

    def summary(self) -> pd.DataFrame:
        """One row per task and condition: task, group, condition, metric, mean, low, high (95%, Wilson), n."""
        found = summarize(self.scores, by=("group", "task", "condition", "metric"))
        return found.drop(columns="interval")

    def table(self) -> pd.DataFrame:
        """Means over tasks with 95% intervals: conditions by groups, and over all tasks.

        Columns: condition, metric, group ("all" for the whole suite), tasks, mean, low, high (over items of these
        tasks), tasks_low, tasks_high (over tasks as well; where a group has several), n (answers).
        """
        whole = self.scores.assign(group="all")
        several = self.scores["group"].nunique() > 1
        rows = pd.concat([self.scores, whole] if several else [whole], ignore_index=True)
        found = summarize(rows, by=("group", "condition", "metric")).drop(columns="interval")
        counts = rows.groupby("group")["task"].nunique()
        return found.assign(tasks=found["group"].map(counts))

    def markdown(self) -> str:
        """The table as Markdown, like the paper's: conditions down, groups across, per cent, and what intervals are."""
        table = self.table()
        most = table.groupby("group")["n"].max()
        cells = table.assign(
            text=[
                format_interval(row, 1) + (f" (n={row['n']})" if row["n"] != most[row["group"]] else "")
                for row in table.to_dict("records")
            ],
            column=[
                f"{row.group} ({row.tasks} task{'' if row.tasks == 1 else 's'}, n={most[row.group]})"
                for row in _rows(table)
            ],
        )
        wide = cells.pivot_table(index="condition", columns="column", values="text", aggfunc="first", sort=False)
        return Table(wide, note=INTERVALS if "tasks_low" in table else "").markdown()

    def figure(self, title: str = "") -> go.Figure:
        """Every task under every condition, by group, best under the last condition first."""
        return figures.suite(self.summary(), title)

    def save(
        self, folder: str | Path, command: str, formats: Sequence[str] = ("html",), name: str | None = None
    ) -> list[Path]:
        """Write NAME.csv (a row per task and condition), NAME-tasks.csv, NAME.md, NAME.json and the figure.

        `command` is recorded as what made them; `name` defaults to suite-NAME. A file that cannot be written does not
        keep the others from it: a `MissingOutputWarning` names it at the end. Returns the paths of what was written.

        Raises:
            SitelensError: for a name that is no file name or an unknown format, before anything is written; or if
                nothing could be written.
        """
        name, formats = check_file_name(name or f"suite-{self.name}", "name"), figures.check_formats(formats)
        table = json.loads(self.table().round(5).to_json(orient="records"))
        facts = {**self.facts, "table": table, "left_out": self.left_out}
        with Outputs(folder) as outputs:
            outputs.write(f"{name}-tasks.csv", lambda path: write_csv(path, self.tasks, float_format="%.6g"))
            outputs.write(f"{name}.md", lambda path: write_text(path, self.markdown() + "\n"))
            facts |= {"n_items": int(self.scores.groupby("task")["item"].nunique().max()), "data": self._data()}
            write_figure(outputs, self.figure(), self.summary(), name, formats, command, self.model, facts)
        return outputs.paths

    def _data(self) -> dict[str, Any]:
        """Digest, note and number of test items that were used of each task."""
        used = self.scores.groupby("task")["item"].nunique().to_dict()
        return {
            row.task: {"digest": row.digest, "note": row.note, "n_items": int(used[row.task])}
            for row in _rows(self.tasks)
            if row.task in used
        }


def _rows(frame: pd.DataFrame) -> Iterator[Any]:
    return frame.itertuples(index=False)
