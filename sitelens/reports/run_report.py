"""What `run` returns, and the folder that it is written to: tables, heatmaps, selections and a run.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sitelens import figures
from sitelens.checks.schema import packed
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.selection import HeadSelection
from sitelens.evaluation.record import task_record
from sitelens.evaluation.result import Result
from sitelens.evaluation.summary import summarize
from sitelens.evaluation.tables import Table, format_interval
from sitelens.figures.style import accuracy_label
from sitelens.files.escaping import visible
from sitelens.files.writing import Outputs, check_file_name, file_names, write_csv, write_text
from sitelens.methods.site.train import TrainResult
from sitelens.models.model import Model
from sitelens.models.provenance import provenance
from sitelens.reports.records import run_command
from sitelens.reports.run_config import RunConfig
from sitelens.store.artifact import Artifact
from sitelens.tasks import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class RunReport(Result):
    """Every task of a run under every condition.

    Attributes:
        config: what was asked for.
        embeddings, results: by task.
        scores: one row per item, condition and metric, as `evaluate` gives them, with the columns model and
            training_seed, and `draw` for the draws of the random condition.
        frame: one row per task, condition and metric: `summarize(scores)`, and spread, the standard deviation over
            draws where there are some.
        seconds: by stage.
        record: how it was made, what run.json says.
        model, tasks: what ran; they are not saved.
    """

    kind: ClassVar[str] = "run"
    columns: ClassVar[tuple[str, ...]] = ("task", "condition", "metric", "mean", "low", "high", "n", "spread")
    config: RunConfig
    embeddings: Mapping[str, TaskEmbedding]
    results: Mapping[str, TrainResult]
    scores: pd.DataFrame
    frame: pd.DataFrame
    seconds: Mapping[str, float]
    record: Mapping[str, Any] = field(default_factory=dict)
    model: Model | None = None
    tasks: Sequence[Task] = ()

    @property
    def n_items(self) -> list[int]:
        """How many test items of each task were evaluated."""
        counts = self.scores.groupby("task")["item"].nunique()
        return [int(counts[name]) for name in self.results]

    def summary(self) -> pd.DataFrame:
        """Means over the tasks, one row per condition and metric.

        Columns: condition, metric, mean, low, high (95%, over items of these tasks), n, interval, and where there are
        several tasks tasks_low, tasks_high (over tasks as well).
        """
        return summarize(self.scores, by=("condition", "metric"))

    def tables(self) -> list[Table]:
        """One table per metric, in percent: tasks with their numbers of items down, conditions across."""
        counts = dict(zip(self.results, self.n_items, strict=True))
        tables = []
        for metric, rows in self.frame.groupby("metric", sort=False):
            cells = rows.assign(text=[format_interval(row) for row in rows.to_dict("records")])
            table = cells.pivot_table(index="task", columns="condition", values="text", aggfunc="first", sort=False)
            table.insert(0, "n", [str(counts[name]) for name in table.index])
            caption = (
                f"{accuracy_label(str(metric))} in percent with 95% intervals (n: test items; ±: standard deviation "
                f"over random draws); model {self.config.model}."
            )
            tables.append(Table(table, caption, heading=str(metric)))
        return tables

    def figure(self, title: str | None = None) -> go.Figure:
        """Every task under every condition, by the first metric."""
        metric = self.config.metrics[0]
        rows = self.frame[self.frame["metric"] == metric]
        return figures.dots(rows, labels={"mean": accuracy_label(metric)}, title=title or "")

    def text(self, metric: str | None = None) -> str:
        """The frame as text for a terminal, in percent: conditions down, tasks with their numbers of items across."""
        counts = dict(zip(self.results, self.n_items, strict=True))
        rows = self.frame[self.frame["metric"] == (metric or self.config.metrics[0])]
        lines = []
        tasks = list(dict.fromkeys(rows["task"]))
        for start in range(0, len(tasks), 4):
            block = tasks[start : start + 4]
            names = [f"{visible(name)} (n={counts[name]})" for name in block]
            widths = [max(len(name), 16) for name in names]
            lines += ["", " " * 12 + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))]
            for condition in dict.fromkeys(rows["condition"]):
                line = f"{condition:<12}"
                for name, width in zip(block, widths, strict=True):
                    cell = rows[(rows["task"] == name) & (rows["condition"] == condition)]
                    text = "".join(format_interval(row) for row in cell.to_dict("records"))
                    line += f"  {text:>{width}}"
                lines.append(line)
        return "\n".join(lines[1:])

    def save(
        self,
        folder: str | Path,
        formats: Sequence[str] = ("html",),
        *,
        name: str | None = None,
        command: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write heatmaps, selections and embeddings, scores.csv, summary.csv (the frame), tables, figure and run.json.

        A file that cannot be written (a full disk, a picture without Chrome) does not keep the others from it: a
        `MissingOutputWarning` names it at the end.

        Args:
            formats: of the figures: "html", "png", "svg", "pdf".
            name: of the tables and the figure that shows them, without an ending (default: table).
            command: what made it, for run.json (default: the `sitelens run` command of the configuration).
            facts: further entries of run.json, plain JSON.

        Returns:
            The paths of what was written.

        Raises:
            SitelensError: for a name that is no file name or an unknown format, before anything is written; or if
                nothing could be written.
        """
        name, formats = check_file_name(name or "table", "name"), figures.check_formats(formats)
        record = {**self.record, **(facts or {})} | ({"made_by": command} if command else {})
        files = self._files(name)
        with Outputs(folder) as outputs:
            pictures: dict[str, Any] = {}
            for task, result in self.results.items():
                heatmap = result.selection.heatmap(f"Head selection: {task}\n{self.config.model}")
                pictures |= {f"{files[task]}.{ending}": heatmap for ending in formats}
                outputs.write(f"{files[task]}.selection.safetensors", result.selection.save)
                outputs.write(f"{files[task]}.embedding.safetensors", self.embeddings[task].save)
            for file, frame in (("scores", self.scores), ("summary", self.frame)):
                outputs.write(f"{file}.csv", functools.partial(write_csv, frame=frame))
            outputs.write("run.safetensors", self._artifact(files).save)
            outputs.write(f"{name}.md", lambda path: write_text(path, self.markdown() + "\n"))
            outputs.write(f"{name}.tex", lambda path: write_text(path, self.latex() + "\n"))
            overview = self.figure()
            pictures |= {f"{name}.{ending}": overview for ending in formats}
            data = [path.name for path in outputs.paths if path.suffix not in (".md", ".tex")]
            _write_record(outputs, record, [*data, *pictures])  # before Chrome is asked, which may take long or die
            for file, figure in pictures.items():
                outputs.write(file, functools.partial(figures.save, figure))
            if outputs.missing:
                _write_record(outputs, record, [*data, *(file for file in pictures if file not in outputs.missing)])
        return outputs.paths

    def _files(self, *taken: str) -> dict[str, str]:
        """What the files of each task are called."""
        return file_names(self.results, taken)

    def artifact(self) -> Artifact:
        """What run.safetensors holds: all but embeddings and selections, which have their own files beside it."""
        return self._artifact(self._files())

    def _artifact(self, files: Mapping[str, str]) -> Artifact:
        histories = [result.history.assign(task=name) for name, result in self.results.items()]
        saved = _Saved(
            self.config, self.scores, self.frame, pd.concat(histories, ignore_index=True), dict(self.seconds),
            dict(self.record), tuple(files.items()),
        )  # fmt: skip
        return Artifact(self.kind, {}, *packed(saved))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> RunReport:
        """The report that `artifact` described, with the embeddings and selections beside its file.

        Raises:
            SitelensError: naming what is missing or not what it must be.
        """
        saved = artifact.made(_Saved)
        folder = artifact.path.parent if artifact.path else Path()
        embeddings: dict[str, TaskEmbedding] = {}
        results: dict[str, TrainResult] = {}
        for name, file in saved.files:
            file = check_file_name(file, f"{artifact.where}: the files of {name!r}")
            embeddings[name] = TaskEmbedding.load(folder / f"{file}.embedding.safetensors")
            selection = HeadSelection.load(folder / f"{file}.selection.safetensors")
            history = saved.histories[saved.histories["task"] == name].drop(columns="task").reset_index(drop=True)
            results[name] = TrainResult(selection, history, saved.config.train)
        return RunReport(
            saved.config, embeddings, results, saved.scores, saved.frame, saved.seconds, saved.record
        )  # fmt: skip

    def description(self) -> dict[str, Any]:
        """What it is in a few words, for its repr."""
        conditions = list(self.frame["condition"].unique())
        return {"tasks": len(self.results), "conditions": conditions, "model": self.config.model}


@dataclass(frozen=True, eq=False)
class _Saved:
    """A report as it is saved; `files`: each task, and what its files are called."""

    config: RunConfig
    scores: pd.DataFrame
    frame: pd.DataFrame
    histories: pd.DataFrame
    seconds: dict[str, float]
    record: dict[str, Any]
    files: tuple[tuple[str, str], ...]


def run_record(
    config: RunConfig, model: Model, tasks: Sequence[Task], results: Mapping[str, TrainResult], scores: pd.DataFrame,
    frame: pd.DataFrame, seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Configuration, versions, model and numbers of a run as plain JSON, enough to make it again."""
    selections = {
        name: {
            "heads": result.selection.n_heads,
            "alpha_above_half": result.selection.n_selected,
            "share_within_0.1_of_0_or_1": round(result.selection.fraction_saturated, 4),
            "best_step": result.best_step,
            "valid_loss": round(float(result.history["valid_loss"].min()), 4),
        }
        for name, result in results.items()
    }
    n_items = scores.groupby("task")["item"].nunique()
    record = {
        **provenance(run_command(config, model), model),
        "tokenizer": model.tokenization(),
        "config": asdict(config),
        "tasks": {task.name: {**task_record(task), "n_items": int(n_items[task.name])} for task in tasks},
        "selections": selections,
        "results": json.loads(frame.round(4).to_json(orient="records")),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return json.loads(json.dumps(record))


def _write_record(outputs: Outputs, record: Mapping[str, Any], files: Sequence[str]) -> None:
    text = json.dumps({**record, "files": list(files)}, indent=1, ensure_ascii=False) + "\n"
    outputs.write("run.json", lambda path: write_text(path, text))
