"""Scores kept on disk: `evaluate` for analyses that ask the same again, without the texts.

Only conditions and metrics that sitelens itself defines are kept; what one of a user's own does may depend on more than
its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from sitelens.conditions import Condition
from sitelens.decoding import end_tokens
from sitelens.defaults import warned_once
from sitelens.evaluation import COLUMNS, evaluate
from sitelens.keys import ResultStore
from sitelens.labels import warn_of_shared_first_tokens
from sitelens.metrics import METRICS, Metric, checked_metrics
from sitelens.models import Model, own_tokenizer
from sitelens.store import Artifact, content_digest, digest
from sitelens.tasks import Task

ALGORITHM = 2  # to be raised when the numbers change
NUMBERS = ("item", "score", "logprob", "rank")
KEPT = [name for name in COLUMNS if name not in ("input", "answer", "predicted")]


@warned_once()
def score_conditions(
    task: Task,
    conditions: Mapping[str, Condition],
    model: Model,
    *,
    split: str = "test",
    n_items: int | None = None,
    metrics: Sequence[str | Metric] = ("first_token",),
    seed: int = 0,
    with_echo: bool | None = None,
    memory_budget: int | str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The rows of `evaluate`, but for input, answer and predicted; taken from the cache where they are known.

    All conditions are kept as one entry, so that an analysis over many of them reads one file.

    Raises:
        SitelensError: as `evaluate`.
    """
    options: dict[str, Any] = {
        "split": split, "n_items": n_items, "metrics": metrics, "seed": seed, "with_echo": with_echo,
        "memory_budget": memory_budget, "progress": progress,
    }  # fmt: skip
    chosen = checked_metrics(metrics)
    own = any(type(condition).__module__.split(".")[0] != "sitelens" for condition in conditions.values())
    if own or any(METRICS.get(metric.name) is not metric for metric in chosen):
        return evaluate(task, conditions, model, **options)[KEPT]
    store = ResultStore(model, [task])
    spec = {
        "algorithm": ALGORITHM, "task": task.name, "items": task.digest, **store.key, "split": split,
        "n_items": n_items, "metrics": [metric.name for metric in chosen], "seed": seed, "with_echo": with_echo,
        "conditions": [[name, _digest(condition)] for name, condition in conditions.items()],
    }  # fmt: skip
    if any(metric.generates for metric in chosen):
        spec["ends"] = sorted(end_tokens(model, own_tokenizer(model)))
    if not all(metric.generates for metric in chosen):
        warn_of_shared_first_tokens([task], model)
    kept = store.get("scores", spec)
    if kept is None:
        scores = evaluate(task, conditions, model, **options)
        labels = {name: list(dict.fromkeys(scores[name])) for name in ("condition", "metric")}
        tensors = {name: torch.tensor(scores[name].to_numpy()) for name in NUMBERS}
        for name, values in labels.items():
            tensors[name] = torch.tensor([values.index(value) for value in scores[name]])
        kept = Artifact("scores", spec, tensors, labels)
        store.put(kept)
    frame = pd.DataFrame({name: kept.tensors[name].numpy() for name in NUMBERS})
    for name in ("condition", "metric"):
        frame[name] = [kept.meta[name][i] for i in kept.tensors[name].tolist()]
    return frame.assign(task=task.name, seed=seed)[KEPT]


def _digest(condition: Condition) -> str:
    tensors, meta = condition.state()
    return digest([{name: content_digest(tensor) for name, tensor in tensors.items()}, meta])[:32]
