"""RunReport: the result of `run`, saved as tables, heatmaps, head selections and a run.json."""

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
    """Scores of every task under every condition, with embeddings and trained head selections.

    Attributes:
        config: the configuration of the run.
        embeddings, results: the task embedding and the training result of each task, by name.
        scores: one row per item, condition and metric: the rows of `evaluate` with the further columns model,
            training_seed and draw (the number of the draw, for the random condition only).
        frame: one row per task, condition and metric: `summarize(scores)` with the further column spread, the standard
            deviation of the accuracy over draws (missing for conditions without draws).
        seconds: run time by stage.
        record: how it was made, the content of run.json.
        model, tasks: the model and the tasks that were used; they are not saved.
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
        """Number of evaluated test items per task, in the order of `results`."""
        counts = self.scores.groupby("task")["item"].nunique()
        return [int(counts[name]) for name in self.results]

    def summary(self) -> pd.DataFrame:
        """Means over tasks, one row per condition and metric.

        Columns: condition, metric, mean, low, high (95% interval over items of these tasks), n (rows), interval (see
        `summarize`), and with several tasks also tasks_low, tasks_high (95% interval over tasks as well).
        """
        return summarize(self.scores, by=("condition", "metric"))

    def tables(self) -> list[Table]:
        """One table per metric, in percent: one row per task with its number of items, one column per condition."""
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
        """A dot plot of the first metric: every task under every condition."""
        metric = self.config.metrics[0]
        rows = self.frame[self.frame["metric"] == metric]
        return figures.dots(rows, labels={"mean": accuracy_label(metric)}, title=title or "")

    def text(self, metric: str | None = None) -> str:
        """The scores as text for a terminal, in percent: one row per condition, one column per task.

        Args:
            metric: name of a metric; None for the first metric of the run.
        """
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
        """Write the report to a folder; returns the paths of the written files.

        Per task a heatmap, the head selection and the embedding; for the run scores.csv, summary.csv (`frame`),
        run.safetensors (from which `load` restores the report), NAME.md and NAME.tex (the tables), a figure and
        run.json. If a file cannot be written (a full disk, an image without Chrome), the others still are, and a
        `MissingOutputWarning` at the end names it.

        Args:
            folder: where the files are written.
            formats: file formats of the figures: "html", "png", "svg", "pdf".
            name: file name of the tables and their figure, without suffix (default: table).
            command: what made the report, for run.json (default: the `sitelens run` command of the configuration).
            facts: further entries of run.json, plain JSON.

        Raises:
            SitelensError: for an invalid file name or an unknown format, before anything is written; or if nothing
                could be written.
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
            _write_record(outputs, record, [*data, *pictures])  # before Chrome draws images, which may fail
            for file, figure in pictures.items():
                outputs.write(file, functools.partial(figures.save, figure))
            if outputs.missing:
                _write_record(outputs, record, [*data, *(file for file in pictures if file not in outputs.missing)])
        return outputs.paths

    def _files(self, *taken: str) -> dict[str, str]:
        """The file names of the tasks, without suffix, by task; none is in `taken`."""
        return file_names(self.results, taken)

    def artifact(self) -> Artifact:
        """The content of run.safetensors: everything except embeddings and selections, which have their own files."""
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
        """The report in a run.safetensors, with the embeddings and selections in the same folder.

        Raises:
            SitelensError: naming what is missing or invalid.
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
        """The entries of its repr."""
        conditions = list(self.frame["condition"].unique())
        return {"tasks": len(self.results), "conditions": conditions, "model": self.config.model}


@dataclass(frozen=True, eq=False)
class _Saved:
    """The content of run.safetensors; `files` holds pairs of a task and the name of its files without suffix."""

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
    """Configuration, versions, model and numbers of a run as plain JSON: everything needed to repeat it."""
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
