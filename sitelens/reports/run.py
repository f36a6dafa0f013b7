"""run: the standard experiment in one call, from tasks to head selections, a table of conditions and a run.json."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_tasks
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.errors import SitelensError, SitelensWarning, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.summary import summarize
from sitelens.methods.site.train import TrainResult, train_selections
from sitelens.methods.site.workload import total, workload
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.progress import Job, portions
from sitelens.reports.run_config import RunConfig as RunConfig
from sitelens.reports.run_report import RunReport as RunReport
from sitelens.reports.run_report import run_record
from sitelens.tasks import Task, load_tasks, rewritten

RANDOM = "random"
SOFT_HARD_GAP = 0.05  # a larger difference (soft minus hard accuracy) causes a warning


@checked
@warned_once()
def run(
    config: RunConfig,
    model: ModelSource | None = None,
) -> RunReport:
    """Embed every task, train its head selection with SITE, and evaluate it under all conditions.

    The conditions are zero-shot and N-shot prompting, the trained selection ("SITE"), its rounded version ("hard"), the
    k heads with the highest and lowest alpha, k random heads, and the echo baseline.

    Args:
        config: everything that decides the numbers; a list of tasks stands for `RunConfig(tasks=...)`.
        model: a model or its name, in place of `config.model`.

    Raises:
        SitelensError: for tasks, a model or a configuration that cannot be used.

    Example:
        >>> options = {"n_prompts": 2, "n_shots": 2, "draws": 1, "n_items": 4, "train": config}
        >>> report = sl.run(sl.RunConfig(tasks=("country-capital",), **options), model)
        >>> report.frame["condition"].unique().tolist()
        ['zero-shot', '2-shot', 'SITE', 'hard', 'high-alpha', 'low-alpha', 'random', 'echo']
    """
    clock = _Clock()
    tasks = load_tasks(config.tasks)
    tasks = [rewritten(task, config.template, config.instruction, config.template_arguments) for task in tasks]
    with Job("run", ["load the model", "embed", "train", "evaluate"]) as job:
        with job.stage("load the model"):
            model = resolve_model(model if model is not None else config.model)
        layers, heads, _ = model.shape
        if config.k is not None and config.k > layers * heads:
            raise SitelensError(f"k must be at most {layers * heads}, the heads of {config.model}, got {config.k}")
        sizes = {name: getattr(config, name) for name in ("n_prompts", "n_shots", "n_items")}
        work = workload(tasks, model, config=config.train, **sizes)
        job.plan({"embed": total(work, "embed"), "train": total(work, "train"),
                  "evaluate": total(work, "prompt", "patch")})  # fmt: skip
        clock.stop("model")
        with job.stage("embed"):
            embeddings = embed_tasks(tasks, model, n_prompts=config.n_prompts, n_shots=config.n_shots, seed=config.seed)
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
    scores = pd.concat(frames, ignore_index=True).assign(model=model.name, training_seed=config.train.seed)
    frame = _frame(scores)
    record = run_record(config, model, tasks, results, scores, frame, clock.seconds)
    _warn_about_gaps(frame)
    return RunReport(config, embeddings, results, scores, frame, clock.seconds, record, model, tasks)


def _scores(task: Task, conditions: Mapping[str, Condition], model: Model, config: RunConfig) -> pd.DataFrame:
    """Scores of a task, with the echo baseline; the column `draw` distinguishes draws of the random condition."""
    sample = {"split": "test", "n_items": config.n_items, "metrics": config.metrics, "seed": config.seed}
    scores = score_conditions(task, conditions, model, with_echo=True, texts=True, **sample)
    is_draw = scores["condition"].str.startswith(f"{RANDOM} ")
    scores["draw"] = scores["condition"].str.removeprefix(f"{RANDOM} ").where(is_draw).astype("Int64")
    return scores.assign(condition=scores["condition"].where(~is_draw, RANDOM))


def run_conditions(result: TrainResult, embedding: TaskEmbedding, config: RunConfig) -> dict[str, Condition]:
    """The conditions of a run by name: prompting, and patching with the trained selection and its variants."""
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
    """Seconds since the previous stop (or since the start), by name of the stop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _frame(scores: pd.DataFrame) -> pd.DataFrame:
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
