"""Choice of layers, coefficients and learning rates on validation items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sitelens.conditions.base import Condition
from sitelens.evaluation.evaluate import evaluate
from sitelens.models.model import Model
from sitelens.progress import no_progress
from sitelens.tasks import Task

Key = TypeVar("Key")


MAX_VALID = 50  # validation items used for any such choice


def accuracy_on_valid(task: Task, conditions: Mapping[Any, Condition], model: Model) -> dict[Any, float]:
    """First-token accuracy of each condition on at most 50 validation items, by the condition's key."""
    named = {str(i): condition for i, condition in enumerate(conditions.values())}
    with no_progress():
        scores = evaluate(task, named, model, split="valid", n_items=MAX_VALID)
    means = scores.groupby("condition")["score"].mean()
    return {key: float(means[str(i)]) for i, key in enumerate(conditions)}


def best_on_valid(task: Task, conditions: Mapping[Key, Condition], model: Model) -> Key:
    """Key of the condition with the highest first-token accuracy on valid; ties go to the first."""
    found = accuracy_on_valid(task, conditions, model)
    return max(found, key=found.__getitem__)
