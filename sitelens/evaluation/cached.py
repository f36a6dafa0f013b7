"""Cached scores: `evaluate` with its results stored on disk.

For user-defined conditions and metrics, the cache key contains a digest of their code (`code_digest`); if that cannot
be computed, the scores are not cached.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sitelens.checks.schema import conform, parsed_json
from sitelens.conditions.base import Condition
from sitelens.engine.decoding import end_tokens
from sitelens.engine.keys import ResultStore
from sitelens.errors import SitelensError, warned_once
from sitelens.evaluation.evaluate import COLUMNS, evaluate
from sitelens.evaluation.labels import warn_of_shared_first_tokens
from sitelens.metrics import METRICS, Metric, checked_metrics
from sitelens.models.model import Model
from sitelens.store.artifact import Artifact
from sitelens.store.code import code_digest
from sitelens.store.digests import content_digest, digest
from sitelens.store.folder import Contents
from sitelens.store.kinds import Kind
from sitelens.tasks import Task

ALGORITHM = 3  # version in cache keys: increase when the numbers or the stored columns change
NUMBERS = ("item", "score", "logprob", "rank")
TEXTS = ("input", "answer", "predicted")
KEPT = [name for name in COLUMNS if name not in TEXTS]


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
    texts: bool = False,
) -> pd.DataFrame:
    """The rows of `evaluate`, from the cache if they are there.

    All conditions are stored as one entry, so an analysis of many conditions reads one file.

    Args:
        task: the task to score.
        conditions: conditions by name.
        model: the model to run.
        split: as for `evaluate`, like the following arguments.
        n_items: number of items (None: all).
        metrics: names of metrics, or metrics.
        seed: seed of the sample and of the demonstrations.
        with_echo: whether to add rows of the echo baseline.
        texts: whether to include the columns input, answer and predicted.

    Raises:
        SitelensError: as `evaluate`.
    """
    options: dict[str, Any] = {
        "split": split, "n_items": n_items, "metrics": metrics, "seed": seed, "with_echo": with_echo,
    }  # fmt: skip
    chosen = checked_metrics(metrics)
    columns = list(COLUMNS) if texts else KEPT
    code = _code(conditions.values(), chosen)
    if code is None:
        return evaluate(task, conditions, model, **options)[columns]
    store = ResultStore(model, [task])
    spec = {
        "algorithm": ALGORITHM, "task": task.name, "items": task.digest, **store.key, "split": split,
        "n_items": n_items, "metrics": [metric.name for metric in chosen], "seed": seed, "with_echo": with_echo,
        "conditions": [[name, _digest(condition)] for name, condition in conditions.items()], **code,
    }  # fmt: skip
    if any(metric.generates for metric in chosen):
        spec["ends"] = sorted(end_tokens(model, model.tokenizer))
    if not all(metric.generates for metric in chosen):
        warn_of_shared_first_tokens([task], model)
    return store.cached(
        Kind.SCORES, spec, lambda: _contents(evaluate(task, conditions, model, **options)),
        functools.partial(_frame, task=task, split=split, seed=seed),
    )[columns]  # fmt: skip


def _contents(frame: pd.DataFrame) -> Contents:
    """Scores as they are stored, without input and answer, which are in the task."""
    labels = {name: list(dict.fromkeys(frame[name])) for name in ("condition", "metric")}
    tensors = {name: torch.tensor(frame[name].to_numpy()) for name in NUMBERS}
    for name, values in labels.items():
        tensors[name] = torch.tensor([values.index(value) for value in frame[name]])
    said = json.dumps(list(frame["predicted"])).encode()
    tensors["predicted"] = torch.from_numpy(np.frombuffer(said, dtype=np.uint8).copy())
    return tensors, labels


@dataclass(frozen=True)
class _Labels:
    """The names of conditions and metrics, as stored."""

    condition: tuple[str, ...]
    metric: tuple[str, ...]


def _frame(kept: Artifact, task: Task, split: str, seed: int) -> pd.DataFrame:
    """The rows of `evaluate` in an artifact.

    Raises:
        SitelensError: if it holds something else.
    """
    tensors, items = kept.tensors, task.split(split)
    labels = conform(kept.meta, _Labels, kept.where)
    if set(tensors) != {*NUMBERS, *vars(labels), "predicted"}:
        raise SitelensError(f"{kept.where} holds the tensors {', '.join(sorted(tensors))}")
    said = tensors["predicted"]
    if said.dtype != torch.uint8 or said.ndim != 1:
        raise SitelensError(f"{kept.where}: predicted must be text as bytes, not {said.dtype} {tuple(said.shape)}")
    what = f"{kept.where}: predicted"
    texts = conform(parsed_json(said.numpy().tobytes(), what), tuple[str | None, ...], what)
    for name, top in (("item", len(items)), ("score", 2), ("condition", len(labels.condition)),
                      ("metric", len(labels.metric))):  # fmt: skip
        one = tensors[name]
        if one.dtype != torch.int64 or tuple(one.shape) != (len(texts),) or not bool(((one >= 0) & (one < top)).all()):
            raise SitelensError(f"{kept.where}: {name} must be {len(texts)} integers from 0 to {top - 1}")
    _check_likelihoods(tensors["logprob"], tensors["rank"], len(texts), kept.where)
    frame = pd.DataFrame({name: tensors[name].numpy() for name in NUMBERS})
    for name, values in vars(labels).items():
        frame[name] = [values[i] for i in tensors[name].tolist()]
    chosen = [items[i] for i in tensors["item"].tolist()]
    frame = frame.assign(
        task=task.name, seed=seed, input=[item.input for item in chosen], answer=[item.output for item in chosen],
        predicted=list(texts),
    )  # fmt: skip
    return frame[list(COLUMNS)]


def _check_likelihoods(logprob: Tensor, rank: Tensor, n: int, where: str) -> None:
    """Raise SitelensError unless these are n log-probabilities and n ranks, missing in the same rows."""
    for name, one in (("logprob", logprob), ("rank", rank)):
        if one.dtype not in (torch.float64, torch.int64) or tuple(one.shape) != (n,):
            raise SitelensError(f"{where}: {name} must be {n} numbers, not {one.dtype} {tuple(one.shape)}")
    missing = torch.isnan(logprob)
    ranks = rank[~torch.isnan(rank)]
    if logprob.dtype != torch.float64 or bool((logprob > 1e-3).any() or torch.isinf(logprob).any()):
        raise SitelensError(f"{where}: logprob must be finite and at most 0")
    if not torch.equal(missing, torch.isnan(rank)) or bool((ranks < 1).any() or (ranks != ranks.round()).any()):
        raise SitelensError(f"{where}: rank must be a whole number from 1 on where there is a logprob")


def _code(conditions: Iterable[Condition], metrics: Iterable[Metric]) -> dict[str, str] | None:
    """A key entry for the code of user-defined conditions and metrics: empty if there are none, None if unknown."""
    own_conditions = [condition for condition in conditions if type(condition).__module__.split(".")[0] != "sitelens"]
    own_metrics = [metric for metric in metrics if METRICS.own.get(metric.name) is not metric]
    if not own_conditions and not own_metrics:
        return {}
    if not all(map(_is_told, own_conditions)):
        return None
    kinds = [type(condition) for condition in own_conditions]
    values = [[getattr(metric, field.name) for field in fields(metric)] for metric in own_metrics]
    code = code_digest([kinds, values])
    return None if code is None else {"code": code}


def _is_told(condition: Condition) -> bool:
    """Whether the saved state of a condition describes it completely."""
    if type(condition).state is Condition.state:
        names = {field.name for field in fields(condition)} if is_dataclass(condition) else set()
        if not vars(condition).keys() <= names:
            return False
    try:
        _digest(condition)
    except Exception:  # a user-defined class may have no state that can be saved
        return False
    return True


def _digest(condition: Condition) -> str:
    """A digest of everything in a condition that affects scores, so without origin and provenance."""
    tensors, meta = condition.state()
    return digest([{name: content_digest(tensor) for name, tensor in tensors.items()}, _plain(meta)])[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if name not in ("origin", "provenance")}
    return value
