"""run_suite: a whole benchmark under prompting, SITE and other methods, in batches across tasks, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sitelens import figures
from sitelens.comparison import PROMPTING, checked_methods, fit_method
from sitelens.conditions import Condition, FewShot, PatchHeads, ZeroShot
from sitelens.config import TrainConfig
from sitelens.defaults import SitelensError, tracked
from sitelens.embedding import embed_task
from sitelens.fingerprints import unchanged
from sitelens.gallery import save_figure
from sitelens.metrics import checked_metrics
from sitelens.models import Model, context_length, own_tokenizer, resolve_model
from sitelens.prompts import item_sizes, shared_first_tokens, within_context
from sitelens.scoring import score_conditions
from sitelens.summary import summarize
from sitelens.tasks import Task, group_of, load_task, suite_names
from sitelens.training import train_selections

if TYPE_CHECKING:
    import plotly.graph_objects as go

TOGETHER = 16  # tasks that train in one batch: past this the time per task no longer falls
SITE = "SITE"
NEW_TOKENS = 20  # that may follow a prompt
# What the parts of the work cost, in prompt tokens of one forward pass: for the progress bar's estimate only.
STEP, FIT = 25, 50_000


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """What a suite gave.

    scores: one row per task, condition and item: task, group, condition, item, metric, score, logprob, rank.
    tasks: one row a task: task, group, train, valid, test (items that were used at most), dropped (items too long for
    the context, from all splits), shared (share of test items whose answer's first token is also that of another answer
    of the task), note (how it was split), digest.
    left_out: every task of the suite that is not among them, and why.
    """

    name: str
    model: Model
    scores: pd.DataFrame
    tasks: pd.DataFrame
    left_out: dict[str, str]
    facts: dict[str, Any]

    def summary(self) -> pd.DataFrame:
        """One row per task and condition: task, group, condition, metric, mean, low, high (95%, Wilson), n."""
        found = summarize(self.scores, by=("group", "task", "condition", "metric"))
        return found.drop(columns="interval")

    def table(self) -> pd.DataFrame:
        """Means over tasks with 95% intervals (stratified bootstrap): conditions by groups, and over all tasks.

        Columns: condition, metric, group ("all" for the whole suite), tasks, mean, low, high, n (answers).
        """
        whole = self.scores.assign(group="all")
        several = self.scores["group"].nunique() > 1
        rows = pd.concat([self.scores, whole] if several else [whole], ignore_index=True)
        found = summarize(rows, by=("group", "condition", "metric")).drop(columns="interval")
        counts = rows.groupby("group")["task"].nunique()
        return found.assign(tasks=found["group"].map(counts))

    def markdown(self) -> str:
        """The table as Markdown, like the paper's: conditions down, groups across, per cent."""
        table = self.table()
        cells = table.assign(
            text=[f"{100 * row.mean:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]" for row in _rows(table)],
            column=[f"{row.group} ({row.tasks} tasks)" for row in _rows(table)],
        )
        wide = cells.pivot_table(index="condition", columns="column", values="text", aggfunc="first", sort=False)
        lines = [["condition", *wide.columns], ["---"] * (len(wide.columns) + 1)]
        lines += [[str(name), *row] for name, row in wide.iterrows()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def figure(self, title: str = "") -> go.Figure:
        """Every task under every condition, by group, best under the last condition first."""
        return figures.suite(self.summary(), title)

    def save(
        self, folder: str | Path, command: str, formats: Sequence[str] = ("html",), name: str | None = None
    ) -> list[Path]:
        """Write NAME.csv (a row per task and condition), NAME-tasks.csv, NAME.md, NAME.json and the figure.

        `command` is recorded as what made them; `name` defaults to suite-NAME.

        Raises:
            SitelensError: for a static format without Chrome; all else is written before.
        """
        folder, name = Path(folder), name or f"suite-{self.name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.tasks.to_csv(folder / f"{name}-tasks.csv", index=False, float_format="%.6g")
        (folder / f"{name}.md").write_text(self.markdown() + "\n", "utf-8")
        table = json.loads(self.table().round(5).to_json(orient="records"))
        facts = {**self.facts, "table": table, "left_out": self.left_out}
        written = save_figure(self.figure(), self.summary(), name, folder, formats, command, self.model, facts)
        return [folder / f"{name}-tasks.csv", folder / f"{name}.md", *written]


def run_suite(
    name: str,
    model: Model | str | None = None,
    *,
    methods: Sequence[str] = (SITE,),
    tasks: Sequence[str] | None = None,
    metric: str = "first_token",
    n_items: int | None = None,
    n_prompts: int = 50,
    n_shots: int = 10,
    config: TrainConfig | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> SuiteResult:
    """All tasks of "fv57", "anli", "mmlu-pro", "bbh" or "builtin", zero-shot, few-shot and by some methods.

    `methods` are names of `sl.methods`; SITE trains up to 16 tasks in one batch, the others are fitted task by task,
    with `options` as in `compare`. `tasks` chooses some of the suite by name; the others are in `left_out`, as are
    those whose data cannot be had. `n_items` test items a task at most.

    An item longer than its share of the context, (context - 20) / (n_shots + 1) tokens with its answer, is dropped from
    its split beforehand, so that every few-shot prompt fits and all conditions see the same items; `tasks` counts them.

    Everything that is finished (an embedding, a batch of selections, a task's scores, a method's fit) is kept on disk:
    an interrupted call, started again, goes on from there.

    Raises:
        SitelensError: for an unknown suite, method, metric or task, or if no task of the suite can be had.
    """
    names = suite_names(name)
    chosen = _chosen(name, names, tasks)
    methods = [method for method in checked_methods(methods) if method not in PROMPTING]
    (metric,) = checked_metrics([metric])
    model, config = resolve_model(model), config or TrainConfig()
    left_out = {task: "not asked for" for task in names if task not in chosen}
    loaded = []
    facts: list[dict[str, Any]] = []
    for task, row, reason in _loaded(chosen, model, n_shots):
        if reason is None:
            loaded.append(task)
            facts.append(row)
        else:
            left_out[task.name] = reason
    if not loaded:
        reasons = "; ".join(f"{task}: {left_out[task]}" for task in chosen[:3])
        raise SitelensError(f"no task of the suite {name!r} can be run: {reasons}")
    measured: dict[str, Any] = {"n_prompts": n_prompts, "n_shots": n_shots, "seed": seed}
    quiet: dict[str, Any] = {"memory_budget": memory_budget, "progress": False}
    scored: dict[str, Any] = {"n_items": n_items, "metrics": (metric,), "seed": seed, **quiet}
    bar = _Bar(name, [_work(task, model, n_prompts, n_shots, n_items, config, methods) for task in loaded], progress)
    prompting: dict[str, Condition] = {"zero-shot": ZeroShot(), f"{n_shots}-shot": FewShot(n_shots)}
    frames = []
    with unchanged(model):
        for start in range(0, len(loaded), TOGETHER):
            some = loaded[start : start + TOGETHER]
            patches = {}
            if SITE in methods:
                embeddings = {}
                for i, task in enumerate(some, start):
                    embeddings[task.name] = embed_task(task, model, **measured, **quiet)
                    bar.done(i, "embed")
                seeds = (config.seed,)
                results = train_selections(some, model, embeddings=embeddings, seeds=seeds, config=config, **quiet)
                for i, task in enumerate(some, start):
                    selection = results[task.name, config.seed].selection
                    patches[task.name] = PatchHeads(selection, embeddings[task.name], config.mixing)
                    bar.done(i, "train")
            for i, task in enumerate(some, start):
                frames.append(score_conditions(task, prompting, model, **scored))
                bar.done(i, "prompt")
                for method in methods:
                    condition = patches.get(task.name) if method == SITE else None
                    if condition is None:
                        fitted = fit_method(method, task, model, seed=seed, options=(options or {}).get(method))
                        condition = fitted.condition
                    frames.append(score_conditions(task, {method: condition}, model, **scored))
                    bar.done(i, method)
    bar.close()
    scores = pd.concat(frames, ignore_index=True)
    scores.insert(1, "group", scores["task"].map({row["task"]: row["group"] for row in facts}))
    recorded = {
        "suite": name, "tasks": [task.name for task in loaded], "n_items": n_items, **measured, "metric": metric,
        "train": asdict(config), "options": {key: dict(value) for key, value in (options or {}).items()},
    }  # fmt: skip
    return SuiteResult(name, model, scores.drop(columns="seed"), pd.DataFrame(facts), left_out, recorded)


def _chosen(suite: str, names: Sequence[str], tasks: Sequence[str] | None) -> list[str]:
    if tasks is None:
        return list(names)
    unknown = [task for task in tasks if task not in names]
    if unknown:
        raise SitelensError(f"the suite {suite!r} has no task {unknown[0]!r}; `sitelens tasks {suite}` lists them")
    return [task for task in names if task in set(tasks)]


def _loaded(names: Iterable[str], model: Model, n_shots: int) -> Iterator[tuple[Task, dict[str, Any], str | None]]:
    """Each task without its too long items, a row about it, and why it cannot be run (None: it can)."""
    tokenizer, context = own_tokenizer(model), context_length(model)
    for name in names:
        try:
            whole = load_task(name)
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
            "task": name, "group": group_of(name), **splits, "dropped": dropped,
            "shared": sum(item.output in shared for item in task.test) / splits["test"], "note": task.note,
            "digest": task.digest,
        }  # fmt: skip
        yield task, row, None


def _work(
    task: Task, model: Model, n_prompts: int, n_shots: int, n_items: int | None, config: TrainConfig,
    methods: Sequence[str],
) -> dict[str, int]:  # fmt: skip
    """The parts of a task's work and their cost in prompt tokens, roughly."""
    sizes = item_sizes(task.train[:50], task.template, own_tokenizer(model))
    one = sum(sizes) // len(sizes)
    test = min(len(task.test), n_items or len(task.test))
    parts = {"prompt": test * one * (n_shots + 2)}
    if SITE in methods:
        training = config.steps * config.batch_size * (one + STEP)
        parts |= {"embed": n_prompts * one * (n_shots + 1), "train": training, SITE: test * one}
    return parts | {method: FIT + test * one for method in methods if method != SITE}


class _Bar:
    """One progress bar over parts of unequal cost, in thousands of prompt tokens."""

    def __init__(self, name: str, work: Sequence[Mapping[str, int]], progress: bool | None) -> None:
        self._work = work
        self._done = self._shown = 0
        total = sum(cost for parts in work for cost in parts.values()) // 1000
        self._bar = tracked(range(total), f"suite {name}", progress=progress)

    def done(self, place: int, part: str) -> None:
        self._done += self._work[place][part]
        while self._shown < self._done // 1000:
            next(self._bar, None)
            self._shown += 1

    def close(self) -> None:
        for _ in self._bar:
            pass


def _rows(frame: pd.DataFrame) -> Iterator[Any]:
    return frame.itertuples(index=False)
