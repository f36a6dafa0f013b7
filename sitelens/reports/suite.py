"""run_suite: a whole benchmark under prompting, SITE and other methods, in batches across tasks, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.prompts import within_context
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.labels import shared_first_tokens, warn_of_shared_first_tokens
from sitelens.evaluation.record import experiment_record
from sitelens.methods import checked_options
from sitelens.methods.items import fitting
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.methods.site.workload import FIT_TOKENS, total, workload
from sitelens.metrics import Metric, checked_metrics
from sitelens.models.fingerprints import unchanged
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, context_length, model_name, own_tokenizer
from sitelens.progress import Job, portions
from sitelens.reports.comparison import PROMPTING, checked_methods, fit_method
from sitelens.reports.suite_result import SuiteResult as SuiteResult
from sitelens.suggestions import did_you_mean
from sitelens.tasks import Suite, Task, task_of, the_suite

TOGETHER = 16  # tasks that train in one batch: past this the time per task no longer falls
SITE = "SITE"
NEW_TOKENS = 20  # that may follow a prompt
NOT_ASKED = "not asked for"
EMBED, TRAIN, SCORE = "embed", "train", "score"  # the stages of a batch


@checked
@warned_once()
def run_suite(
    suite: str | Suite,
    model: Model | str | None = None,
    *,
    methods: Sequence[str] = (SITE,),
    tasks: Sequence[str] | None = None,
    metric: str | Metric = "first_token",
    n_items: Count | None = None,
    n_prompts: Count = 50,
    n_shots: Count = 10,
    config: TrainConfig | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: Seed = 0,
) -> SuiteResult:
    """All tasks of a suite, zero-shot, few-shot and by some methods.

    `suite` is "fv57", "anli", "mmlu-pro", "bbh", "builtin", the name of a registered one, or a `Suite` of your own.

    `methods` are names of `sl.methods`; SITE trains up to 16 tasks in one batch, the others are fitted task by task,
    with `options` as in `compare`. As in the paper, SITE and few-shot prompting draw from all training items; the other
    methods see at most 200, as in `compare`, which gives SITE no more than them. `tasks` chooses some of the suite by
    name; the others are in `left_out`, as are those whose data cannot be had and those that fail. `n_items` test items
    a task at most.

    An item longer than its share of the context, (context - 20) / (n_shots + 1) tokens with its answer, is dropped from
    its split beforehand, so that every few-shot prompt fits and all conditions see the same items; `tasks` counts them.

    Everything that is finished (an embedding, a batch of selections, a task's scores, a method's fit) is kept on disk,
    and so is the state of a batch in training: an interrupted call, started again, goes on from there.

    Raises:
        SitelensError: for an unknown suite, method, metric, option or task, or if no task of the suite can be run.
    """
    suite = the_suite(suite)
    chosen = check_suite(suite, tasks=tasks, methods=methods, metric=metric, n_items=n_items, options=options)
    model, config = resolve_model(model), config or TrainConfig()
    left_out = {task: NOT_ASKED for task in suite.names() if task not in chosen}
    loaded: list[Task] = []
    about: list[dict[str, Any]] = []
    for task, row, reason in _loaded(suite, chosen, model, n_shots):
        if reason is None:
            loaded.append(task)
            about.append(row)
        else:
            left_out[task.name] = reason
    (scored_by,) = checked_metrics(metric)
    if SITE in methods or not scored_by.generates:
        warn_of_shared_first_tokens(loaded, model)
    measured: dict[str, Any] = {"n_prompts": n_prompts, "n_shots": n_shots, "seed": seed}
    scored: dict[str, Any] = {"n_items": n_items, "metrics": (scored_by,), "seed": seed}
    fitted = tuple(method for method in checked_methods(methods) if method not in PROMPTING)
    chosen_options = checked_options(options)
    batches = [loaded[start : start + TOGETHER] for start in range(0, len(loaded), TOGETHER)]
    work = workload(loaded, model, n_prompts=n_prompts, n_shots=n_shots, n_items=n_items, config=config)
    stages = {}
    for number, batch in enumerate(batches, start=1):
        costs = {task.name: work[task.name] for task in batch}
        part = f" (part {number} of {len(batches)})" if len(batches) > 1 else ""
        if SITE in fitted:
            stages |= {EMBED + part: total(costs, "embed"), TRAIN + part: total(costs, "train")}
        n_fits = len(batch) * (len(fitted) - (SITE in fitted))
        stages[SCORE + part] = total(costs, "prompt", "patch") + FIT_TOKENS * n_fits
    run = _Run(model, fitted, config, measured, scored, chosen_options, left_out)
    with unchanged(model), Job(f"suite {suite.name}", list(stages)) as job:
        job.plan(stages)
        names = iter(stages)
        for batch in batches:
            if SITE in fitted:
                with job.stage(next(names)):
                    run.embed(batch)
                with job.stage(next(names)):
                    run.train(batch)
            with job.stage(next(names)):
                run.score(batch)
    if not run.frames:
        reasons = [f"{task}: {reason}" for task, reason in left_out.items() if reason != NOT_ASKED]
        raise SitelensError(f"no task of the suite {suite.name!r} can be run: {'; '.join(reasons[:3])}")
    scores = pd.concat(run.frames, ignore_index=True)
    scores = scores.assign(model=model_name(model), training_seed=config.seed)
    scores.insert(1, "group", scores["task"].map({row["task"]: row["group"] for row in about}))
    record = experiment_record(
        "sl.run_suite", model, loaded, n_items, suite=suite.name, **measured, metric=scored_by.name,
        train=asdict(config), methods=list(methods), options=chosen_options,
    )  # fmt: skip
    about_tasks = pd.DataFrame(about)
    return SuiteResult(suite.name, scores, about_tasks, left_out, run.embeddings, run.selections, record)


def check_suite(
    suite: str | Suite,
    *,
    tasks: Sequence[str] | None,
    methods: Sequence[str],
    metric: str | Metric,
    n_items: int | None,
    options: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    """The names of the tasks that these arguments of `run_suite` choose; no model is needed to refuse them.

    Raises:
        SitelensError: for anything that cannot be run.
    """
    suite = the_suite(suite)
    names = list(suite.names())
    fitted = [method for method in checked_methods(methods) if method not in (*PROMPTING, SITE)]
    checked_metrics([metric])
    if n_items is not None and n_items < 1:
        raise SitelensError(f"n_items must be at least 1, got {n_items}")
    for method in options or {}:
        if method not in fitted:
            raise SitelensError(f"options are given for {method!r}, which is not fitted here; "
                                f"methods with options: {', '.join(fitted) or 'none'}")  # fmt: skip
    checked_options(options)
    for task in tasks or ():
        if task not in names:
            hint = did_you_mean(task, names)
            raise SitelensError(f"the suite {suite.name!r} has no task {task!r}{hint and f': {hint}'}")
    return [task for task in names if tasks is None or task in tasks]


@dataclass(eq=False)
class _Run:
    """What a suite's run has come to; a part that fails is left out, and the rest goes on."""

    model: Model
    methods: tuple[str, ...]
    config: TrainConfig
    measured: dict[str, Any]
    scored: dict[str, Any]
    options: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    frames: list[pd.DataFrame] = field(default_factory=list)
    embeddings: dict[str, TaskEmbedding] = field(default_factory=dict)
    selections: dict[str, HeadSelection] = field(default_factory=dict)

    def embed(self, tasks: Sequence[Task]) -> None:
        """SITE's embeddings."""
        for task, part in portions(tasks):
            with part:
                self._try(task, "embed", self._embed)

    def train(self, tasks: Sequence[Task]) -> None:
        """SITE's selections of the tasks that have an embedding."""
        self._train([task for task in tasks if task.name in self.embeddings])

    def score(self, tasks: Sequence[Task]) -> None:
        """Prompting, SITE, and the other methods, which are fitted one by one."""
        n_shots = self.measured["n_shots"]
        prompting: dict[str, Condition] = {"zero-shot": ZeroShot(), f"{n_shots}-shot": FewShot(n_shots)}
        for task, part in portions(tasks):
            with part:
                self._try(task, "prompt", lambda task: self._score(task, prompting))
                for method in self.methods:
                    if method != SITE:
                        self._try(task, method, functools.partial(self._fit, method=method))
                    elif task.name in self.selections:
                        self._try(task, SITE, self._patch)

    def _try(self, task: Task, part: str, act: Callable[[Task], None]) -> None:
        try:
            act(task)
        except SitelensError as error:
            self.left_out[f"{task.name}, {part}"] = str(error)

    def _embed(self, task: Task) -> None:
        self.embeddings[task.name] = embed_task(task, self.model, **self.measured)

    def _train(self, tasks: Sequence[Task]) -> None:
        """In one batch; if that fails, one by one, and those that fail are left out."""
        options: dict[str, Any] = {"embeddings": self.embeddings, "seeds": (self.config.seed,), "config": self.config}
        try:
            results = train_selections(tasks, self.model, **options) if tasks else {}
        except SitelensError as error:
            if len(tasks) == 1:
                self.left_out[f"{tasks[0].name}, {SITE}"] = str(error)
                return
            for task in tasks:
                self._train([task])
            return
        self.selections |= {name: result.selection for (name, _), result in results.items()}

    def _patch(self, task: Task) -> None:
        patched = PatchHeads(self.selections[task.name], self.embeddings[task.name], self.config.mixing)
        self._score(task, {SITE: patched}, with_echo=False)

    def _fit(self, task: Task, method: str) -> None:
        small, seed = fitting(task), self.scored["seed"]
        fitted = fit_method(method, small, self.model, seed=seed, options=self.options.get(method))
        self._score(small, {method: fitted.condition}, with_echo=False)

    def _score(self, task: Task, conditions: Mapping[str, Condition], with_echo: bool | None = None) -> None:
        self.frames.append(score_conditions(task, conditions, self.model, with_echo=with_echo, **self.scored))


def _loaded(
    suite: Suite, names: Iterable[str], model: Model, n_shots: int
) -> Iterator[tuple[Task, dict[str, Any], str | None]]:
    """Each task without its too long items, a row about it, and why it cannot be run (None: it can)."""
    tokenizer, context = own_tokenizer(model), context_length(model)
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
