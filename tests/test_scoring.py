"""Cached scores: identical to the rows of evaluate, without running a model twice or mixing up entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import sitelens as sl
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.engine.forward import Hook
from sitelens.evaluation.cached import KEPT, score_conditions
from sitelens.models.model import Bridge, Model, ModelLike
from sitelens.settings import settings
from sitelens.tasks import Example, Task
from tests import micro

TASK = micro.task("shift")


@pytest.fixture
def model() -> Iterator[Bridge]:
    yield from micro.lent("Llama")


def patch(seed: int = 0, **options: Any) -> sl.PatchHeads:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, 4, 8, generator=generator)
    selection = sl.HeadSelection(torch.rand(2, 4, generator=generator))
    return sl.PatchHeads(selection, TaskEmbedding(vectors, "shift", None, 1, 0, 0), **options)


def conditions() -> dict[str, Condition]:
    return {"patched": patch(), "zero-shot": sl.ZeroShot(), "2-shot": sl.FewShot(2)}


def files() -> list[Path]:
    return sorted((settings.cache() / "artifacts" / "scores").glob("*"))


@pytest.mark.parametrize("metrics", [("first_token",), ("prefix_match", "first_token", "exact_match")])
def test_the_rows_are_those_of_evaluate_at_first_and_from_the_cache(
    metrics: tuple[str, ...], model: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_items": 7, "metrics": metrics, "seed": 3, "split": "test"}
    expected = sl.evaluate(TASK, conditions(), model, **options)[KEPT]
    assert set(expected["metric"]) == set(metrics) and len(expected) >= 3 * 7 * len(metrics)
    found = score_conditions(TASK, conditions(), Model.of(model), **options)
    micro.silence(monkeypatch)
    for frame in (found, score_conditions(TASK, conditions(), Model.of(model), **options)):
        pd.testing.assert_frame_equal(frame, expected, check_exact=True)
    with pytest.raises(AssertionError, match="the model was run"):
        score_conditions(TASK, conditions(), Model.of(model), **{**options, "seed": 4})


def other_item(task: Task) -> Task:
    first, *rest = task.test
    return replace(task, test=(Example(first.input, first.output, ("zz",)), *rest))


def edited(**changes: Any) -> Callable[[], Condition]:
    """The patched condition with a change in its selection or embedding."""

    def make() -> Condition:
        condition = patch()
        for name, value in changes.items():
            part = condition.selection if name == "alpha" else condition.embedding
            tensor = getattr(part, name).clone()
            tensor[1, 3] = value
            field = "selection" if name == "alpha" else "embedding"
            condition = replace(condition, **{field: replace(part, **{name: tensor})})
        return condition

    return make


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "an item": lambda: {"task": other_item(TASK)},
    "a training item": lambda: {"task": replace(TASK, train=TASK.train[1:])},
    "the task's name": lambda: {"task": replace(TASK, name="other")},
    "the template": lambda: {"task": replace(TASK, template="{input} is {output}\n")},
    "seed": lambda: {"seed": 1},
    "n_items": lambda: {"n_items": 6},
    "split": lambda: {"split": "valid"},
    "metrics": lambda: {"metrics": ("exact_match",)},
    "the metrics' order": lambda: {"metrics": ("exact_match", "first_token")},
    "alpha": lambda: {"conditions": {"a": edited(alpha=0.123)()}},
    "vectors": lambda: {"conditions": {"a": edited(mean_z=0.123)()}},
    "mixing": lambda: {"conditions": {"a": patch(mixing="additive")}},
    "shots": lambda: {"conditions": {"a": patch(n_shots=1)}},
    "the kind of condition": lambda: {"conditions": {"a": sl.ZeroShot()}},
    "a condition's name": lambda: {"conditions": {"b": patch()}},
    "one condition more": lambda: {"conditions": {"a": patch(), "b": patch()}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_scored_anew(change: str, model: Bridge) -> None:
    usual: dict[str, Any] = {
        "task": TASK, "conditions": {"a": patch()}, "n_items": 5, "metrics": ("first_token", "exact_match"),
    }  # fmt: skip
    if change == "metrics":
        usual["metrics"] = ("first_token",)

    def score(**options: Any) -> pd.DataFrame:
        task, given = options.pop("task"), options.pop("conditions")
        found = score_conditions(task, given, Model.of(model), **options)
        pd.testing.assert_frame_equal(found, sl.evaluate(task, given, model, **options)[KEPT], check_exact=True)
        return found

    score(**usual)
    score(**usual)
    assert len(files()) == 1
    score(**usual | CHANGES[change]())
    assert len(files()) == 2


def test_other_weights_are_scored_anew() -> None:
    model = micro.bridge("Llama")
    before = score_conditions(TASK, conditions(), Model.of(model))
    with torch.no_grad():
        next(weight for weight in model.original_model.parameters() if weight.ndim > 1).mul_(-1)
    after = score_conditions(TASK, conditions(), Model.of(model))
    assert len(files()) == 2 and not after["logprob"].equals(before["logprob"])
    pd.testing.assert_frame_equal(after, sl.evaluate(TASK, conditions(), model)[KEPT], check_exact=True)


@dataclass(frozen=True, eq=False)
class Shouting(sl.ZeroShot):
    """A custom condition that depends on more than its fields."""

    def fwd_hooks(self, model: ModelLike) -> list[Hook]:
        return [("ln_final.hook_out", lambda tensor, hook=None: tensor * LOUDNESS)]

    def patch(self, model: ModelLike) -> Any:
        return None


LOUDNESS = 2.0


def test_a_condition_of_ones_own_is_kept_by_what_it_computes(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    both: dict[str, Condition] = {"shouting": Shouting(), "zero-shot": sl.ZeroShot()}
    expected = sl.evaluate(TASK, both, model, n_items=4)[KEPT]
    loud = score_conditions(TASK, both, Model.of(model), n_items=4)
    pd.testing.assert_frame_equal(loud, expected, check_exact=True)
    assert len(files()) == 1
    monkeypatch.setattr(f"{__name__}.LOUDNESS", 0.5)
    quiet = score_conditions(TASK, both, Model.of(model), n_items=4)
    assert len(files()) == 2
    assert not quiet["logprob"].equals(loud["logprob"])
    pd.testing.assert_frame_equal(quiet, sl.evaluate(TASK, both, model, n_items=4)[KEPT], check_exact=True)
    monkeypatch.setattr(f"{__name__}.LOUDNESS", torch.nn.Parameter(torch.tensor(0.5)).requires_grad_(False))
    again = score_conditions(TASK, both, Model.of(model), n_items=4)
    assert len(files()) == 3
    pd.testing.assert_frame_equal(again, quiet)
    monkeypatch.setattr(f"{__name__}.LOUDNESS", Half())
    score_conditions(TASK, both, Model.of(model), n_items=4)
    assert len(files()) == 3  # an object without a digest: nothing is cached


class Half:
    """An object that tensors can be multiplied by."""

    def __rmul__(self, tensor: Any) -> Any:
        return tensor * 0.5


def test_a_damaged_entry_is_named_and_made_anew(model: Bridge) -> None:
    expected = score_conditions(TASK, conditions(), Model.of(model), n_items=4)
    (path,) = files()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.warns(sl.SitelensWarning, match=r"damaged.*computed again"):
        again = score_conditions(TASK, conditions(), Model.of(model), n_items=4)
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_conditions(TASK, conditions(), Model.of(model), n_items=4)


def test_what_evaluate_refuses_leaves_nothing(model: Bridge) -> None:
    for options, message in (
        ({"metrics": ("guess",)}, "unknown metric 'guess'"),
        ({"split": "exam"}, "unknown split 'exam'"),
        ({"n_items": 0}, "n_items must be at least 1"),
    ):
        with pytest.raises(sl.SitelensError, match=message):
            score_conditions(TASK, conditions(), Model.of(model), **options)  # type: ignore[arg-type]
    other = replace(patch(), selection=replace(patch().selection, model="another"))
    with pytest.raises(sl.SitelensError, match="another model"):
        score_conditions(TASK, {"a": other}, Model.of(model))
    assert files() == []
