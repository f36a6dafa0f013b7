"""run_suite: every task of a suite under prompting, SITE and other methods; resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.engine.lengths import item_sizes, within_context
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.labels import shared_first_tokens, warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.methods.base import Method
from sitelens.methods.registry import methods_by_label
from sitelens.metrics import Metric, checked_metrics
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelSource
from sitelens.progress import Job, portions
from sitelens.reports.suite_result import SuiteResult as SuiteResult
from sitelens.suggestions import did_you_mean
from sitelens.tasks import Suite, Task, task_of, the_suite

NEW_TOKENS = 20  # room in the context for generated tokens
NOT_REQUESTED = "not requested"
SCORE = "score"  # name of the last stage


@checked
@warned_once()
def run_suite(
    suite: str | Suite,
    model: ModelSource | None = None,
    *,
    methods: Sequence[Method | str] = ("SITE",),
    tasks: Sequence[str] | None = None,
    metric: str | Metric = "first_token",
    n_items: Count | None = None,
    n_shots: Count = 10,
    seed: Seed = 0,
) -> SuiteResult:
    """Scores of every task of a suite under zero-shot prompting, few-shot prompting and the given methods.

    As in the paper, SITE and few-shot prompting draw from all training items; the other methods see at most 200. (In
    `compare`, all methods see at most 200.) A task whose data are unavailable, or a method that fails on a task, is
    listed in `left_out`; the others continue.

    Items longer than (context - 20) / (n_shots + 1) tokens, including the answer, are dropped from all splits first, so
    that every few-shot prompt fits and all conditions see the same items; the result's `tasks` counts them.

    Finished parts (embeddings, head selections, fits, scores) and the state of an unfinished training are cached on
    disk: if a call is interrupted, the same call resumes it.

    Args:
        suite: "fv57", "anli", "mmlu-pro", "bbh", "builtin", the name of a registered suite, or a `Suite` of your own.
        model: a model or its name; the default model if None.
        methods: methods, or names of methods with default hyperparameters, as in `compare`.
        tasks: names of tasks of the suite; None for all.
        metric: a metric or its name.
        n_items: maximum number of test items per task; None for all.
        n_shots: demonstrations per few-shot prompt.
        seed: decides prompts, training items and test items.

    Raises:
        SitelensError: for an unknown suite, method, metric or task, or if no task of the suite can be run.

    Example:
        >>> suite = sl.run_suite("builtin", model, methods=["TV"], tasks=["antonym"], n_shots=2, n_items=4)
        >>> suite.frame["condition"].unique().tolist()
        ['zero-shot', '2-shot', 'TV']
    """
    suite = the_suite(suite)
    names = check_suite(suite, tasks=tasks, metric=metric, n_items=n_items)
    prompting: dict[str, Condition] = {"zero-shot": ZeroShot(), f"{n_shots}-shot": FewShot(n_shots)}
    fitted = {label: method for label, method in methods_by_label(methods).items() if label not in prompting}
    model = resolve_model(model)
    left_out = {task: NOT_REQUESTED for task in suite.names() if task not in names}
    loaded: list[Task] = []
    about: list[dict[str, Any]] = []
    for task, row, reason in _loaded(suite, names, model, n_shots):
        if reason is None:
            loaded.append(task)
            about.append(row)
        else:
            left_out[task.name] = reason
    (scored_by,) = checked_metrics(metric)
    if not scored_by.generates:
        warn_of_shared_first_tokens(loaded, model)
    run = _Run(model, seed, {"n_items": n_items, "metrics": (scored_by,), "seed": seed}, left_out)
    stages = {f"fit {label}": method.work(loaded, model.bridge) for label, method in fitted.items()}
    costs = (_scoring_work(task, model, n_items, n_shots + 2 + len(fitted)) for task in loaded)
    stages[SCORE] = sum(costs, 0.0)
    with model.unchanged(), Job(f"suite {suite.name}", list(stages)) as job:
        job.plan(stages)
        for label, method in fitted.items():
            with job.stage(f"fit {label}"):
                run.fit(label, method, loaded)
        with job.stage(SCORE):
            run.score(loaded, prompting, fitted)
    if not run.frames:
        reasons = [f"{task}: {reason}" for task, reason in left_out.items() if reason != NOT_REQUESTED]
        raise SitelensError(f"no task of the suite {suite.name!r} can be run: {'; '.join(reasons[:3])}")
    scores = pd.concat(run.frames, ignore_index=True)
    scores = scores.assign(model=model.name, training_seed=seed)
    scores.insert(1, "group", scores["task"].map({row["task"]: row["group"] for row in about}))
    record = experiment_record(
        "sl.run_suite", model, loaded, n_items, suite=suite.name, n_shots=n_shots, seed=seed, metric=scored_by.name,
        methods={label: method.record() for label, method in fitted.items()},
    )  # fmt: skip
    return SuiteResult(suite.name, scores, pd.DataFrame(about), left_out, run.conditions, record)


def check_suite(
    suite: str | Suite, *, tasks: Sequence[str] | None, metric: str | Metric, n_items: int | None
) -> list[str]:
    """The names of the tasks that `run_suite` would run with these arguments, which are checked without a model.

    Raises:
        SitelensError: for an unknown suite, metric or task, or an invalid n_items.
    """
    suite = the_suite(suite)
    names = list(suite.names())
    checked_metrics([metric])
    if n_items is not None and n_items < 1:
        raise SitelensError(f"n_items must be at least 1, got {n_items}")
    for task in tasks or ():
        if task not in names:
            hint = did_you_mean(task, names)
            raise SitelensError(f"the suite {suite.name!r} has no task {task!r}{hint and f': {hint}'}")
    return [task for task in names if tasks is None or task in tasks]


@dataclass(eq=False)
class _Run:
    """Mutable state of a suite run. A part that fails is recorded in `left_out`; the others continue.

    Attributes:
        scored: arguments of `score_conditions`.
        left_out: reasons by "TASK" or "TASK, METHOD".
        frames: scores so far.
        conditions: fitted conditions by label of the method and name of the task.
    """

    model: Model
    seed: int
    scored: dict[str, Any]
    left_out: dict[str, str]
    frames: list[pd.DataFrame] = field(default_factory=list)
    conditions: dict[str, dict[str, Condition]] = field(default_factory=dict)

    def fit(self, label: str, method: Method, tasks: Sequence[Task]) -> None:
        """Fit a method to each task and store its conditions."""
        conditions = self.conditions.setdefault(label, {})
        outcomes = method.fit_all([method.capped(task) for task in tasks], self.model.bridge, seed=self.seed)
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, SitelensError):
                self.left_out[f"{task.name}, {label}"] = str(outcome)
            else:
                conditions[task.name] = outcome

    def score(self, tasks: Sequence[Task], prompting: dict[str, Condition], methods: Mapping[str, Method]) -> None:
        """Score each task under prompting, and under each method with the training items that the method may see."""
        for task, part in portions(tasks):
            with part:
                self._score(task, prompting, "prompt")
                for label, method in methods.items():
                    if (condition := self.conditions[label].get(task.name)) is not None:
                        self._score(method.capped(task), {label: condition}, label, with_echo=False)

    def _score(self, task: Task, conditions: dict[str, Condition], part: str, with_echo: bool | None = None) -> None:
        try:
            self.frames.append(score_conditions(task, conditions, self.model, with_echo=with_echo, **self.scored))
        except SitelensError as error:
            self.left_out[f"{task.name}, {part}"] = str(error)


def _scoring_work(task: Task, model: Model, n_items: int | None, n_prompts: int) -> float:
    """Approximate number of prompt tokens for scoring a task; each test item takes `n_prompts` items' tokens."""
    sizes = item_sizes(task.train[:50], task, model.tokenizer)
    return n_prompts * min(len(task.test), n_items or len(task.test)) * sum(sizes) / len(sizes)


def _loaded(
    suite: Suite, names: Iterable[str], model: Model, n_shots: int
) -> Iterator[tuple[Task, dict[str, Any], str | None]]:
    """For each name: the task without items that are too long, its row of `SuiteResult.tasks`, and None or an error."""
    tokenizer, context = model.tokenizer, model.context_length
    for name in names:
        try:
            whole = task_of(suite, name)
        except SitelensError as error:
            yield Task(name, "", (), (), ()), {}, str(error)
            continue
        task = whole if context is None else within_context(whole, tokenizer, context - NEW_TOKENS, n_shots)
        splits = {split: len(task.split(split)) for split in ("train", "valid", "test")}
        dropped = sum(len(whole.split(split)) for split in splits) - sum(splits.values())
        short = splits["train"] < n_shots + 1 or not splits["valid"] or not splits["test"]
        if short:
            sizes = ", ".join(f"{count} {split}" for split, count in splits.items())
            yield task, {}, f"too few items are left ({sizes}; {dropped} longer than the context allows)"
            continue
        shared = shared_first_tokens(task, tokenizer)
        row = {
            "task": name, "group": suite.group(name), **splits, "dropped": dropped,
            "shared": sum(item.output in shared for item in task.test) / splits["test"], "note": task.note,
            "digest": task.digest,
        }  # fmt: skip
        yield task, row, None
