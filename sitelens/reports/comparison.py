"""compare: ways of adapting a model to a task, side by side, with what each costs."""

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
from sitelens.checks.schema import check_names, unpacked
from sitelens.checks.values import Count, Seed
from sitelens.conditions import embedding
from sitelens.conditions.base import Condition
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.engine.keys import ResultStore
from sitelens.engine.network import metered
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation import cached as scoring
from sitelens.evaluation.evaluate import evaluate
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.evaluation.summary import summarize
from sitelens.methods import METHODS, checked_options
from sitelens.methods.items import fitting
from sitelens.methods.site import state as training_state
from sitelens.models.fingerprints import unchanged
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, model_name
from sitelens.progress import Job, portion
from sitelens.reports.comparison_result import Comparison as Comparison
from sitelens.store.artifact import Artifact
from sitelens.store.folder import Contents, empty_cache
from sitelens.store.kinds import Kind
from sitelens.suggestions import did_you_mean
from sitelens.tasks import Task, load_tasks

ALGORITHM = 1  # of prompting; the methods have their own
PROMPTING = {"zero-shot": ZeroShot(), "10-shot": FewShot(10)}
NAMES = (*PROMPTING, *METHODS)
FIT_SHARE = 0.9  # of a cell's time, for the progress bar


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method's condition for a task, and what fitting it cost.

    trained: numbers that were trained; forward_tokens, backward_tokens: tokens that went through the model, choices on
    valid and padding included; fit_seconds: of this machine.
    """

    condition: Condition
    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float


def fit_method(
    name: str, task: Task, model: Model, *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Fitted:
    """The fitted method, kept on disk; fitted with an empty cache, so that its cost is its own.

    Raises:
        SitelensError: for an unknown method, and as the method's own `fit`.
    """
    (name,) = checked_methods([name])
    options = checked_options({name: options} if options else None).get(name)
    if name in PROMPTING:
        return Fitted(PROMPTING[name], 0, 0, 0, 0.0)
    store = ResultStore(model, [task])
    spec = _spec(name, task, store.key, seed, options)

    def make() -> Contents:
        with empty_cache(), metered() as spent:
            condition = METHODS[name].fit(task, Model.of(model).bridge, seed=seed, **(options or {}))
        cost = {
            "trained": METHODS[name].trained(condition), "forward_tokens": spent.forward,
            "backward_tokens": spent.backward, "fit_seconds": spent.seconds,
        }  # fmt: skip
        tensors, meta = condition.state()
        return tensors, {"state": meta, "cost": cost}

    return store.cached(Kind.METHOD, spec, make, _fitted)


def _fitted(artifact: Artifact) -> Fitted:
    """The fitted method that an artifact holds.

    Raises:
        SitelensError: if it holds something else.
    """
    check_names(artifact.meta, ("state", "cost"), artifact.where)
    condition = Condition.remade(artifact.tensors, artifact.meta.get("state"), artifact.where)
    return Fitted(condition, **vars(unpacked(_Cost, artifact.meta.get("cost"), {}, f"{artifact.where}: cost")))


@dataclass(frozen=True)
class _Cost:
    """What a fit cost, as it is kept."""

    trained: int
    forward_tokens: int
    backward_tokens: int
    fit_seconds: float

    def __post_init__(self) -> None:
        if any(value < 0 for value in vars(self).values()):
            raise SitelensError("costs are not negative")


@checked
@warned_once()
def compare(
    tasks: Iterable[Task | str],
    methods: Sequence[str] | Literal["all"] = "all",
    model: Model | str | None = None,
    *,
    n_items: Count | None = 100,
    seed: Seed = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Accuracy and costs of every task under every method.

    All methods see the same splits and template and at most 200 training items. `options` are further arguments of a
    method's fit, by its name: {"LTV": {"steps": 400}}. Every cell is kept on disk, so that an interrupted comparison
    goes on where it was. Seconds are of the machine that fitted.

    Raises:
        SitelensError: for an unknown method or option, and as each method's fit.
    """
    names, options = checked_methods(methods), checked_options(options)
    loaded, model = [fitting(task) for task in load_tasks(tasks)], resolve_model(model)
    rows: list[dict[str, Any]] = []
    frames: list[pd.DataFrame] = []
    for fitted, scores, seconds in _cells(loaded, names, model, n_items, seed, options):
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
        "sl.compare", model, loaded, n_items, metric="first_token", seed=seed, methods=names, options=options
    )
    return Comparison(pd.DataFrame(rows), pd.concat(frames, ignore_index=True), record)


def checked_methods(names: Sequence[str] | Literal["all"]) -> list[str]:
    """The names, each once.

    Raises:
        SitelensError: for an unknown one, with the nearest names.
    """
    if isinstance(names, str) and names == "all":
        return list(NAMES)
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in NAMES:
            hint = did_you_mean(name, NAMES) or f"there are {', '.join(NAMES)}"
            raise SitelensError(f"unknown method {name!r}: {hint}")
    return list(dict.fromkeys(names))


def _cells(
    loaded: Sequence[Task], names: Sequence[str], model: Model,
    n_items: int | None, seed: int, options: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[Fitted, pd.DataFrame, float]]:  # fmt: skip
    """Each task under each method: the fitted method, its scores, and the seconds that they took."""
    warn_of_shared_first_tokens(loaded, model)
    cells = {f"{task.name}, {name}": (task, name) for task in loaded for name in names}
    with Job("compare", list(cells)) as job:
        job.plan(dict.fromkeys(cells, 1.0))
        for stage, (task, name) in cells.items():
            chosen = options.get(name)
            with job.stage(stage), unchanged(model):
                with portion(0.0, FIT_SHARE):
                    fitted = fit_method(name, task, model, seed=seed, options=chosen)
                with portion(FIT_SHARE, 1.0):
                    scores, seconds = _scored(name, fitted, task, model, n_items, seed, chosen)
            yield fitted, scores, seconds


def _scored(
    name: str, fitted: Fitted, task: Task, model: Model, n_items: int | None, seed: int, options: Any
) -> tuple[pd.DataFrame, float]:
    """Scores on test, and the seconds that they took."""
    store = ResultStore(model, [task])
    spec = _spec(name, task, store.key, seed, options) | {"n_items": n_items}

    def make() -> Contents:
        with metered() as spent:
            scores = evaluate(task, {name: fitted.condition}, model, n_items=n_items, seed=seed)
        tensors = {column: torch.tensor(scores[column].to_numpy()) for column in ("item", "score")}
        return tensors, {"seconds": spent.seconds}

    read = functools.partial(_read_scores, n_items=n_items, task=task)
    answers = store.cached(Kind.COMPARISON, spec, make, read)
    columns = {column: getattr(answers, column).numpy() for column in ("item", "score")}
    about = {"task": task.name, "condition": name, "metric": "first_token", "seed": seed,
             "training_seed": seed, "model": model_name(model)}  # fmt: skip
    return pd.DataFrame(columns).assign(**about), answers.seconds


@dataclass(frozen=True, eq=False)
class _Scores:
    """A method's scores on a task, as they are kept."""

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


def _spec(
    name: str, task: Task, key: Mapping[str, str], seed: int, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that decides what a method gives; it rests on embeddings, training and evaluation, whose numbers stand by."""
    own = METHODS[name].algorithm if name in METHODS else ALGORITHM
    algorithm = [own, embedding.ALGORITHM, training_state.ALGORITHM, scoring.ALGORITHM]
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in (options or {}).items()}
    return {
        "algorithm": algorithm, "method": name, "task": task.name, "items": task.digest,
        **key, "seed": seed, "options": plain,
    }  # fmt: skip
