"""The prompting baselines as methods: nothing is fitted, the demonstrations are in the prompt."""

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

ROOM = 32  # tokens reserved for the answer


@checked
@dataclass(frozen=True, kw_only=True)
class ZeroShot(Method):
    """Zero-shot prompting: the query alone."""

    name = "zero-shot"
    max_train: ClassVar[int | None] = None

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.ZeroShot:
        """The condition of prompts without demonstrations."""
        return prompting.ZeroShot()

    def measured_fit(self, task: Task, model: Model, *, seed: int = 0) -> Fitted:
        """The condition at no cost; it is not cached."""
        return Fitted(self.fit(task, model, seed=seed), 0, 0, 0, 0.0)

    def work(self, tasks: Any, model: ModelLike) -> float:
        """Zero, because nothing is fitted."""
        return 0.0


@checked
@dataclass(frozen=True, kw_only=True)
class FewShot(Method):
    """Few-shot prompting, named "5-shot", "10-shot" and so on; each query has its own random demonstrations.

    Attributes:
        n_shots: demonstrations per prompt.
    """

    name = "10-shot"
    max_train: ClassVar[int | None] = None
    n_shots: Count = 10

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.FewShot:
        """The condition of prompts with `n_shots` demonstrations."""
        return prompting.FewShot(self.n_shots)

    def measured_fit(self, task: Task, model: Model, *, seed: int = 0) -> Fitted:
        """The condition at no cost; it is not cached."""
        return Fitted(self.fit(task, model, seed=seed), 0, 0, 0, 0.0)

    def work(self, tasks: Any, model: ModelLike) -> float:
        """Zero, because nothing is fitted."""
        return 0.0

    @property
    def label(self) -> str:
        """Name in tables, such as "10-shot"."""
        return f"{self.n_shots}-shot"

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Whether `name` has the form "5-shot"."""
        return re.fullmatch(r"[1-9]\d{0,3}-shot", name) is not None

    @classmethod
    def from_name(cls, name: str, **values: Any) -> FewShot:
        """Few-shot prompting with the number of demonstrations in `name`."""
        return cls(**{"n_shots": int(name.removesuffix("-shot")), **values})


@checked
@dataclass(frozen=True, kw_only=True)
class ManyShot(Method):
    """Many-shot prompting: as many demonstrations as fit the context.

    Attributes:
        limit: largest number of demonstrations; None for no limit but the 200 training items of every method.
    """

    name = "many-shot"
    limit: CountOrZero | None = None

    @checked
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> prompting.FewShot:
        """Few-shot prompting with as many training items (at most 200) as fit the context with any query.

        The count assumes the longest items and the longest query, so that any draw fits. A prompt never contains its
        query's own input, so repeats of an input reduce the count. Nothing else about test items is used. If there are
        more than 200 training items, the evaluation decides which are drawn from: in `compare`, the 200 that every
        method is fitted to.

        Args:
            task: the task.
            model: the model (default: the packaged one).
            seed: has no effect; demonstrations are drawn when the condition is evaluated.

        Raises:
            SitelensError: for a task without training or validation items.
        """
        model, task = resolve_model(model), load_task(task)
        cap_training_items(task)  # raises if there are no training or validation items
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
