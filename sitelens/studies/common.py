"""What the studies share: tasks with embeddings and selections, and conditions measured with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import pandas as pd

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_tasks
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.summary import summarize
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import TrainResult, train_selections
from sitelens.models.model import Model
from sitelens.tasks import Task, load_tasks

Facts = Mapping[str, Any]


class Options(TypedDict, total=False):
    """Options that every study accepts by name: the fields of `Sample`.

    Attributes:
        n_items: test items per task (default 100; None for all).
        split: "test" (default) or "valid".
        seed: fixes the prompts, the demonstrations and the sample of items.
    """

    n_items: Count | None
    split: str
    seed: Seed


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task with its embedding and the alpha trained for it.

    Attributes:
        task: the task.
        embedding: its task embedding.
        result: the trained selection with its history.
    """

    task: Task
    embedding: TaskEmbedding
    result: TrainResult

    @property
    def selection(self) -> HeadSelection:
        """The trained alpha."""
        return self.result.selection

    def patch(self, selection: HeadSelection | None = None) -> PatchHeads:
        """The task's embedding injected at a selection (default: the trained one), with the mixing of its training."""
        return PatchHeads(selection or self.selection, self.embedding, self.result.config.mixing)


@checked
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which items are evaluated; see `Options`."""

    n_items: Count | None = 100
    split: str = "test"
    seed: Seed = 0


def prepare(
    tasks: Iterable[Task | str], model: Model, config: TrainConfig | None, sample: Sample, at_least: int = 1
) -> list[Prepared]:
    """All tasks, embedded and trained in one batch, or read from the cache.

    Args:
        tasks: the tasks.
        model: the model.
        config: training of alpha (default: the paper's).
        sample: its seed fixes the prompts of the embeddings.
        at_least: smallest number of tasks.

    Raises:
        SitelensError: for fewer tasks than `at_least`, before anything is trained.
    """
    loaded, config = some_tasks(tasks, at_least), config or TrainConfig()
    vectors = embed_tasks(loaded, model, seed=sample.seed)
    runs = train_selections(loaded, model, embeddings=vectors, seeds=(config.seed,), config=config)
    return [Prepared(task, vectors[task.name], runs[task.name, config.seed]) for task in loaded]


def some_tasks(tasks: Iterable[Task | str], at_least: int = 1) -> list[Task]:
    """The tasks, loaded.

    Raises:
        SitelensError: for fewer tasks than `at_least`, and as `load_tasks`.
    """
    loaded = load_tasks(tasks)
    if len(loaded) < at_least:
        raise SitelensError(f"give at least {'one task' if at_least == 1 else f'{at_least} tasks'}, got {len(loaded)}")
    return loaded


def measure(task: Task, settings: Sequence[tuple[Facts, Condition]], model: Model, sample: Sample) -> pd.DataFrame:
    """Accuracy and loss of each condition on a task: one row per setting.

    Columns: task, the facts of the setting, mean, low, high (first-token accuracy and its 95% interval over items), n
    (items), loss (mean cross-entropy of the answer's first token in nats).

    Args:
        task: the task.
        settings: (facts, condition) pairs; facts are columns that describe the condition.
        model: the model.
        sample: which items are evaluated.
    """
    conditions = {str(i): condition for i, (_, condition) in enumerate(settings)}
    scores = score_conditions(task, conditions, model, **asdict(sample))
    summary = summarize(scores).set_index("condition")
    losses = -scores.groupby("condition")["logprob"].mean()
    rows = []
    for name, (facts, _) in zip(conditions, settings, strict=True):
        row = summary.loc[name]
        rows.append({"task": task.name, **facts, "mean": row["mean"], "low": row["low"], "high": row["high"],
                     "n": row["n"], "loss": losses[name]})  # fmt: skip
    return pd.DataFrame(rows)


def head_counts_up_to(n_heads: int) -> tuple[int, ...]:
    """Numbers of heads to try: 0, all, and about twenty in between, denser at small numbers."""
    some = {0, 1, 2, 4, 8, n_heads} | {round(n_heads * share / 16) for share in range(1, 16)}
    return tuple(sorted(k for k in some if k <= n_heads))


def checked_counts(ks: Iterable[int] | None, model: Model) -> tuple[int, ...]:
    """The numbers of heads to try (default: `head_counts_up_to` the model's number of heads).

    Raises:
        SitelensError: if one is negative or exceeds the number of heads.
    """
    layers, heads, _ = model.shape
    chosen = head_counts_up_to(layers * heads) if ks is None else tuple(ks)
    wrong = [k for k in chosen if not 0 <= k <= layers * heads]
    if wrong:
        raise SitelensError(f"k must lie in 0 to {layers * heads}, the number of heads; got {wrong[0]}")
    return chosen
