"""The prompting baselines as methods: nothing is fitted, the demonstrations stand in the prompt."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Seed
from sitelens.conditions import prompting
from sitelens.engine.lengths import item_sizes
from sitelens.engine.prompts import few_shot_prompt
from sitelens.methods.base import Fitted, Method
from sitelens.methods.items import MAX_TRAIN, cap_training_items
from sitelens.models.loading import resolve_model
from sitelens.models.model import Model, ModelLike, ModelSource
from sitelens.tasks import Task, load_task

ROOM = 32  # tokens kept for the answer


@checked
@dataclass(frozen=True, kw_only=True)
class ZeroShot(Method):
    """Zero-shot prompting: the query alone."""

    name = "zero-shot"
    max_train: ClassVar[int | None] = None

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.ZeroShot:
        """Prompts without demonstrations."""
        return prompting.ZeroShot()

    def measured_fit(self, task: Task, model: Model, *, seed: int = 0) -> Fitted:
        """The condition; it costs nothing and is not kept."""
        return Fitted(self.fit(task, model, seed=seed), 0, 0, 0, 0.0)

    def work(self, tasks: Any, model: ModelLike) -> float:
        """Nothing: there is nothing to fit."""
        return 0.0


@checked
@dataclass(frozen=True, kw_only=True)
class FewShot(Method):
    """Few-shot prompting with `n_shots` demonstrations, drawn anew for each query.

    Its names are "5-shot", "10-shot" and so on.
    """

    name = "10-shot"
    max_train: ClassVar[int | None] = None
    n_shots: Count = 10

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.FewShot:
        """Prompts with `n_shots` demonstrations."""
        return prompting.FewShot(self.n_shots)

    def measured_fit(self, task: Task, model: Model, *, seed: int = 0) -> Fitted:
        """The condition; it costs nothing and is not kept."""
        return Fitted(self.fit(task, model, seed=seed), 0, 0, 0, 0.0)

    def work(self, tasks: Any, model: ModelLike) -> float:
        """Nothing: there is nothing to fit."""
        return 0.0

    @property
    def label(self) -> str:
        """The number of demonstrations: "10-shot"."""
        return f"{self.n_shots}-shot"

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Whether a name is a number of demonstrations: "5-shot"."""
        return re.fullmatch(r"[1-9]\d{0,3}-shot", name) is not None

    @classmethod
    def from_name(cls, name: str, **values: Any) -> FewShot:
        """Prompting with as many demonstrations as the name says."""
        return cls(**{"n_shots": int(name.removesuffix("-shot")), **values})


@checked
@dataclass(frozen=True, kw_only=True)
class ManyShot(Method):
    """Many-shot prompting: as many demonstrations as the context holds, or `limit`."""

    name = "many-shot"
    limit: CountOrZero | None = None

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.FewShot:
        """Few-shot prompting with as many training items (at most 200) as fit into the context with any query.

        The longest items and the longest query are counted, so that whichever are drawn fit. Items with the query's own
        input never stand in its prompt, so that as many are left out of the count. Nothing else of test items is looked
        at. Which 200 of more items are used is decided where the condition is evaluated: `compare` draws from the same
        200 that every method is fitted to.

        Raises:
            SitelensError: for a task without training or validation items.
        """
        model, task = resolve_model(model), load_task(task)
        cap_training_items(task)  # is it a task to fit anything to?
        tokenizer = model.tokenizer
        queries = [few_shot_prompt(task, [], item, tokenizer).text for item in (*task.valid, *task.test)]
        sizes = sorted(item_sizes(task.train, task, tokenizer), reverse=True)
        left = (model.context_length or 2**31) - max(map(len, tokenizer(queries)["input_ids"])) - ROOM
        repeats = Counter(item.input for item in task.train)
        own = max(repeats[item.input] for item in (*task.valid, *task.test))
        count, most = 0, min(MAX_TRAIN, len(sizes)) - max(1, own)
        for size in sizes[: max(0, most if self.limit is None else min(self.limit, most))]:
            left -= size
            if left < 0:
                break
            count += 1
        return prompting.FewShot(count)
