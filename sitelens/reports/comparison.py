"""compare: accuracy and costs of several methods of adapting a model to tasks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.engine.keys import ResultStore
from sitelens.engine.network import metered
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.evaluate import evaluate
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.evaluation.summary import summarize
from sitelens.methods.base import Fitted, Method
from sitelens.methods.items import cap_training_items
from sitelens.methods.registry import methods_by_label
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.progress import Job, portion
from sitelens.reports.comparison_result import Comparison as Comparison
from sitelens.store.artifact import Artifact
from sitelens.store.folder import Contents
from sitelens.store.kinds import Kind
from sitelens.tasks import Task, load_tasks

FIT_SHARE = 0.9  # fraction of the time for one task and method that fitting takes, for the progress bar


@checked
@warned_once()
def compare(
    tasks: Iterable[Task | str],
    methods: Sequence[Method | str] | Literal["all"] = "all",
    model: ModelSource | None = None,
    *,
    n_items: Count | None = 100,
    seed: Seed = 0,
) -> Comparison:
    """Accuracy and costs of every method on every task.

    All methods see the same splits, the same template and at most 200 training items. The result of each task and
    method is cached on disk; if a comparison is interrupted, the same call resumes it. Seconds are those of the machine
    that fitted the method.

    Args:
        tasks: tasks or their names.
        methods: methods, or names of methods with default hyperparameters: `["SITE", sl.methods.LTV(n_steps=100)]`.
            "all" stands for all methods of sitelens. A method of your own is a subclass of `sl.Method`.
        model: a model or its name; the default model if None.
        n_items: maximum number of test items per task; None for all.
        seed: decides prompts, training items and test items.

    Raises:
        SitelensError: for no task, no method or an unknown one, two methods with the same label, or an error while
            fitting a method.

    Example:
        >>> comparison = sl.compare([task], ["zero-shot", sl.methods.FewShot(n_shots=2)], model, n_items=4)
        >>> comparison.frame[["method", "n"]].values.tolist()
        [['zero-shot', 4], ['2-shot', 4]]
    """
    chosen = methods_by_label(methods)
    if not chosen:
        raise SitelensError('give at least one method, for example ["SITE", sl.methods.LTV(n_steps=100)]')
    loaded = [cap_training_items(task) for task in load_tasks(tasks)]
    if not loaded:
        raise SitelensError("give at least one task")
    model = resolve_model(model)
    rows: list[dict[str, Any]] = []
    frames: list[pd.DataFrame] = []
    for fitted, scores, seconds in _cells(loaded, chosen, model, n_items, seed):
        mean = summarize(scores).iloc[0]
        rows.append({
            "task": mean["task"], "method": mean["condition"], "accuracy": mean["mean"], "low": mean["low"],
            "high": mean["high"], "n": int(mean["n"]), "trained": fitted.trained,
            "forward_tokens": fitted.forward_tokens, "backward_tokens": fitted.backward_tokens,
            "fit_seconds": fitted.fit_seconds, "seconds_per_prompt": seconds / int(mean["n"]),
            **scores[["model", "seed", "training_seed"]].iloc[0],
        })  # fmt: skip
        frames.append(scores)
    record = experiment_record(
        "sl.compare",
        model,
        loaded,
        n_items,
        metric="first_token",
        seed=seed,
        methods={label: method.record() for label, method in chosen.items()},
    )
    return Comparison(pd.DataFrame(rows), pd.concat(frames, ignore_index=True), record)


def _cells(
    tasks: Sequence[Task], methods: Mapping[str, Method], model: Model, n_items: int | None, seed: int
) -> Iterator[tuple[Fitted, pd.DataFrame, float]]:
    """For each task and method: the fitted method, its scores on test, and the seconds that scoring took."""
    warn_of_shared_first_tokens(tasks, model)
    cells = {f"{task.name}, {label}": (task, label) for task in tasks for label in methods}
    with Job("compare", list(cells)) as job:
        job.plan(dict.fromkeys(cells, 1.0))
        for stage, (task, label) in cells.items():
            method = methods[label]
            with job.stage(stage), model.unchanged():
                with portion(0.0, FIT_SHARE):
                    fitted = method.measured_fit(task, model, seed=seed)
                with portion(FIT_SHARE, 1.0):
                    scores, seconds = _scored(method, fitted, task, model, n_items, seed)
            yield fitted, scores.assign(condition=label), seconds


def _scored(
    method: Method, fitted: Fitted, task: Task, model: Model, n_items: int | None, seed: int
) -> tuple[pd.DataFrame, float]:
    """Scores of a fitted method on test (cached), and the seconds that scoring took."""
    store = ResultStore(model, [task])
    spec = method.spec(task, store.key, seed)

    def make() -> Contents:
        with metered() as spent:
            scores = evaluate(task, {method.label: fitted.condition}, model, n_items=n_items, seed=seed)
        tensors = {column: torch.tensor(scores[column].to_numpy()) for column in ("item", "score")}
        return tensors, {"seconds": spent.seconds}

    read = functools.partial(_read_scores, n_items=n_items, task=task)
    if spec is None:
        answers = read(Artifact(Kind.COMPARISON, {}, *make()))
    else:
        answers = store.cached(Kind.COMPARISON, spec | {"n_items": n_items}, make, read)
    columns = {column: getattr(answers, column).numpy() for column in ("item", "score")}
    about = {"task": task.name, "condition": method.label, "metric": "first_token", "seed": seed,
             "training_seed": seed, "model": model.name}  # fmt: skip
    return pd.DataFrame(columns).assign(**about), answers.seconds


@dataclass(frozen=True, eq=False)
class _Scores:
    """The scores of a method on a task, as the cache stores them."""

    item: Int[Tensor, " item"]
    score: Int[Tensor, " item"]
    seconds: float


def _read_scores(artifact: Artifact, n_items: int | None, task: Task) -> _Scores:
    scores = artifact.made(_Scores)
    expected = len(task.test) if n_items is None else min(n_items, len(task.test))
    in_range = (scores.item >= 0) & (scores.item < len(task.test)) & (scores.score >= 0) & (scores.score <= 1)
    if len(set(scores.item.tolist())) != expected or not bool(in_range.all()) or scores.seconds < 0:
        raise SitelensError(f"{artifact.where} does not hold a score of each of {expected} items")
    return scores
