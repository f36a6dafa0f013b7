"""The main job as one call: tasks in, trained selections, a table of conditions, heatmaps and a run.json out."""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.schema import unpacked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embedded
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.errors import SitelensError, SitelensWarning, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.record import task_record
from sitelens.evaluation.summary import summarize
from sitelens.evaluation.tables import Table, format_interval
from sitelens.files.escaping import visible
from sitelens.files.writing import Outputs, file_names, write_csv, write_text
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import TrainResult, train_selections
from sitelens.methods.site.workload import total, workload
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, head_shape, model_name, tokenization
from sitelens.models.provenance import provenance
from sitelens.models.sources import DEFAULT_MODEL
from sitelens.progress import Job, portions
from sitelens.reports.records import read_record, run_command
from sitelens.tasks import Task, load_tasks, rewritten

RANDOM = "random"
SOFT_HARD_GAP = 0.05  # a soft minus hard accuracy above this is worth a warning


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


@dataclass(frozen=True, eq=False)
class RunReport:
    """What a run found.

    scores: one row per item, condition and metric, as `evaluate` gives them, with the columns model and training_seed,
        and `draw` for the draws of the random condition.
    summary: `summarize(scores)`, and `spread`, the standard deviation over draws where there are some.
    """

    config: RunConfig
    model: Model
    tasks: list[Task]
    embeddings: dict[str, TaskEmbedding]
    results: dict[str, TrainResult]
    scores: pd.DataFrame
    summary: pd.DataFrame
    seconds: dict[str, float]

    @property
    def n_items(self) -> list[int]:
        """How many test items of each task were evaluated."""
        counts = self.scores.groupby("task")["item"].nunique()
        return [int(counts[task.name]) for task in self.tasks]

    def table(self, metric: str | None = None) -> str:
        """The summary as text, per cent with 95% intervals: conditions down, tasks with numbers of items across."""
        counts = {task.name: n for task, n in zip(self.tasks, self.n_items, strict=True)}
        chosen = self.summary[self.summary["metric"] == (metric or self.config.metrics[0])]
        lines = []
        tasks = list(dict.fromkeys(chosen["task"]))
        for start in range(0, len(tasks), 4):
            block = tasks[start : start + 4]
            names = [f"{visible(name)} (n={counts[name]})" for name in block]
            widths = [max(len(name), 16) for name in names]
            lines += ["", " " * 12 + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))]
            for condition in dict.fromkeys(chosen["condition"]):
                line = f"{condition:<12}"
                for name, width in zip(block, widths, strict=True):
                    cell = chosen[(chosen["task"] == name) & (chosen["condition"] == condition)]
                    text = "".join(format_interval(row) for row in cell.to_dict("records"))
                    line += f"  {text:>{width}}"
                lines.append(line)
        return "\n".join(lines[1:])

    def save(self, folder: str | Path, formats: Sequence[str] = ("html",)) -> list[Path]:
        """Write heatmaps, selections and embeddings, scores.csv, summary.csv, table.md and run.json.

        A file that cannot be written (a full disk, a picture without Chrome) does not keep the others from it: a
        `MissingOutputWarning` names it at the end. Returns the paths of what was written.

        Raises:
            SitelensError: for an unknown format, before anything is written; or if nothing could be written.
        """
        formats = figures.check_formats(formats)
        files = file_names(task.name for task in self.tasks)
        with Outputs(folder) as outputs:
            maps: dict[str, Any] = {}
            for task in self.tasks:
                file, selection = files[task.name], self.results[task.name].selection
                heatmap = selection.heatmap(f"Head selection: {task.name}\n{self.config.model}")
                maps |= {f"{file}.{ending}": heatmap for ending in formats}
                outputs.write(f"{file}.selection.safetensors", selection.save)
                outputs.write(f"{file}.embedding.safetensors", self.embeddings[task.name].save)
            for name, frame in (("scores", self.scores), ("summary", self.summary)):
                outputs.write(f"{name}.csv", functools.partial(write_csv, frame=frame))
            outputs.write("table.md", lambda path: write_text(path, self.markdown() + "\n"))
            names = [path.name for path in outputs.paths if path.suffix != ".md"]
            self._write_record(outputs, [*names, *maps])  # before Chrome is asked, which may take long or die
            for name, figure in maps.items():
                outputs.write(name, functools.partial(figures.save, figure))
            if outputs.missing:
                self._write_record(outputs, [*names, *(name for name in maps if name not in outputs.missing)])
        return outputs.paths

    def _write_record(self, outputs: Outputs, names: Sequence[str]) -> None:
        record = self.record([outputs.folder / name for name in names])
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        outputs.write("run.json", lambda path: write_text(path, text))

    def markdown(self) -> str:
        """The summary as Markdown tables, one per metric, per cent: tasks with their numbers of items by conditions."""
        counts = {task.name: n for task, n in zip(self.tasks, self.n_items, strict=True)}
        parts = []
        for metric, rows in self.summary.groupby("metric", sort=False):
            cells = rows.assign(text=[format_interval(row) for row in rows.to_dict("records")])
            table = cells.pivot_table(index="task", columns="condition", values="text", aggfunc="first", sort=False)
            table.insert(0, "n", [str(counts[name]) for name in table.index])
            parts.append(Table(table, heading=str(metric)).markdown())
        return "\n\n".join(parts)

    def record(self, files: Sequence[Path] = ()) -> dict[str, Any]:
        """Configuration, versions, model and figures as plain JSON, enough to make the run again."""
        selections = {
            name: {
                "heads": result.selection.n_heads,
                "alpha_above_half": result.selection.default_k,
                "share_within_0.1_of_0_or_1": round(result.selection.share_binary, 4),
                "best_step": result.best_step,
                "valid_loss": round(float(result.history["valid_loss"].min()), 4),
            }
            for name, result in self.results.items()
        }
        rows = json.loads(self.summary.round(4).to_json(orient="records"))
        sources = {
            task.name: {**task_record(task), "n_items": int(count)}
            for task, count in zip(self.tasks, self.n_items, strict=True)
        }
        return {
            **provenance(run_command(self.config, self.model), self.model),
            "tokenizer": tokenization(self.model),
            "config": asdict(self.config),
            "tasks": sources,
            "selections": selections,
            "results": rows,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "files": [path.name for path in files],
        }


@checked
@warned_once()
def run(
    config: RunConfig,
    model: Model | str | None = None,
) -> RunReport:
    """Embed, train and evaluate every task of `config` under all conditions.

    `model` stands in for the one that `config` names; a list of tasks as `config` stands for
    `RunConfig(tasks=...)`.

    Raises:
        SitelensError: for bad input, as the functions it calls.
    """
    clock = _Clock()
    tasks = load_tasks(config.tasks)
    tasks = [rewritten(task, config.template, config.instruction, config.template_arguments) for task in tasks]
    with Job("run", ["load the model", "embed", "train", "evaluate"]) as job:
        with job.stage("load the model"):
            model = resolve_model(model if model is not None else config.model)
        layers, heads, _ = head_shape(model)
        if config.k is not None and config.k > layers * heads:
            raise SitelensError(f"k must be at most {layers * heads}, the heads of {config.model}, got {config.k}")
        sizes = {name: getattr(config, name) for name in ("n_prompts", "n_shots", "n_items")}
        work = workload(tasks, model, config=config.train, **sizes)
        job.plan({"embed": total(work, "embed"), "train": total(work, "train"),
                  "evaluate": total(work, "prompt", "patch")})  # fmt: skip
        clock.stop("model")
        with job.stage("embed"):
            embeddings = embedded(tasks, model, n_prompts=config.n_prompts, n_shots=config.n_shots, seed=config.seed)
        clock.stop("embeddings")
        with job.stage("train"):
            seeds = (config.train.seed,)
            runs = train_selections(tasks, model, embeddings=embeddings, seeds=seeds, config=config.train)
            results = {task.name: runs[task.name, config.train.seed] for task in tasks}
        clock.stop("training")
        with job.stage("evaluate"):
            frames = []
            for task, part in portions(tasks):
                with part:
                    conditions = run_conditions(results[task.name], embeddings[task.name], config)
                    frames.append(_scores(task, conditions, model, config))
        clock.stop("evaluation")
    scores = pd.concat(frames, ignore_index=True).assign(model=model_name(model), training_seed=config.train.seed)
    report = RunReport(config, model, tasks, embeddings, results, scores, _summary(scores), clock.seconds)
    _warn_about_gaps(report.summary)
    return report


def _scores(task: Task, conditions: Mapping[str, Condition], model: Model, config: RunConfig) -> pd.DataFrame:
    """A task's scores with the echo baseline; the draws of the random condition are told apart by `draw`."""
    sample = {"split": "test", "n_items": config.n_items, "metrics": config.metrics, "seed": config.seed}
    scores = score_conditions(task, conditions, model, with_echo=True, texts=True, **sample)
    is_draw = scores["condition"].str.startswith(f"{RANDOM} ")
    scores["draw"] = scores["condition"].str.removeprefix(f"{RANDOM} ").where(is_draw).astype("Int64")
    return scores.assign(condition=scores["condition"].where(~is_draw, RANDOM))


def run_conditions(result: TrainResult, embedding: TaskEmbedding, config: RunConfig) -> dict[str, Condition]:
    """The conditions of a run: prompting, and the trained selection in its variants."""
    alpha, mixing = result.selection, config.train.mixing
    k = config.k if config.k is not None else max(1, alpha.n_heads // 4)
    selections = {
        "SITE": alpha,
        "hard": alpha.hard(),
        "high-alpha": alpha.top(k),
        "low-alpha": alpha.bottom(k),
        **{f"{RANDOM} {draw}": alpha.random(k, seed=draw) for draw in range(config.draws)},
    }
    patched = {name: PatchHeads(selection, embedding, mixing) for name, selection in selections.items()}
    return {"zero-shot": ZeroShot(), f"{config.n_shots}-shot": FewShot(config.n_shots), **patched}


class _Clock:
    """Seconds between stops."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _summary(scores: pd.DataFrame) -> pd.DataFrame:
    summary = summarize(scores)
    by = ["task", "condition", "metric"]
    draws = scores.dropna(subset="draw").groupby([*by, "draw"])["score"].mean()
    return summary.merge(draws.groupby(by).std().rename("spread").reset_index(), how="left", on=by)


def _warn_about_gaps(summary: pd.DataFrame) -> None:
    means = summary.pivot_table(index=["task", "metric"], columns="condition", values="mean")
    if {"SITE", "hard"} <= set(means.columns):
        gaps = means["SITE"] - means["hard"]
        for (task, metric), gap in gaps[gaps > SOFT_HARD_GAP].items():  # type: ignore[misc]
            warnings.warn(f"task {task!r}: soft selection is {100 * gap:.0f} points above hard ({metric}): heads of "
                          "middle alpha matter", SitelensWarning, stacklevel=3)  # fmt: skip
