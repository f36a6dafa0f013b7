"""compare: its table compared with separate fits and evaluations; costs, cache and figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from scipy.stats import binomtest

import sitelens as sl
from sitelens import figures
from sitelens.errors import SitelensError
from sitelens.methods.registry import ALL, method_named, methods_by_label
from sitelens.models.model import Bridge, Model
from sitelens.reports.comparison import compare
from sitelens.reports.comparison_result import COSTS, Comparison
from tests import micro
from tests.test_methods import TASK, small

FEW = ("zero-shot", "FV", "MTV", "I2CL", "LoRA", "SITE")
CELLS = (("a", "x", 0.1, 40), ("a", "y", 1.0, 40), ("b", "x", 0.5, 10), ("b", "y", 0.9, 10))
SMALL_FEW = [small(name) for name in FEW]


@pytest.fixture
def model() -> Iterator[Bridge]:
    yield from micro.lent("Llama")


def test_each_row_is_the_methods_own_fit_and_evaluation(model: Bridge) -> None:
    frame = compare([TASK], SMALL_FEW, model, n_items=8).frame
    assert list(frame["method"]) == list(FEW)
    for row in frame.to_dict("records"):
        name = row["method"]
        condition = sl.ZeroShot() if name == "zero-shot" else small(name).fit(TASK, model)
        found = sl.summarize(sl.evaluate(TASK, {"it": condition}, model, n_items=8)).iloc[0]
        assert (row["accuracy"], row["low"], row["high"], row["n"]) == (found["mean"], found["low"], found["high"], 8)


def test_what_is_trained_and_spent_is_that_of_the_method(model: Bridge) -> None:
    frame = compare([TASK], SMALL_FEW, model, n_items=4).frame.set_index("method")
    layers, heads, _ = Model.of(model).shape
    expected = {"zero-shot": 0, "FV": 0, "MTV": layers * heads, "SITE": layers * heads, "I2CL": 4 * layers}
    assert {name: frame.loc[name, "trained"] for name in expected} == expected
    assert frame.loc["LoRA", "trained"] == layers * 8 * (32 + 32 + 32 + 16)  # 2 of 4 key and value heads
    backward = ("FV", "I2CL", "LoRA", "SITE")  # FV: what its heads write is a gradient of the stream
    assert (frame["backward_tokens"] > 0).to_dict() == {name: name in backward for name in FEW}
    assert (frame["forward_tokens"] > 0).sum() == len(FEW) - 1 and (frame["seconds_per_prompt"] > 0).all()


def test_a_second_call_runs_nothing_and_gives_the_same(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare([TASK], SMALL_FEW, model, n_items=4).frame
    micro.silence(monkeypatch)
    pd.testing.assert_frame_equal(compare([TASK], SMALL_FEW, model, n_items=4).frame, first)
    with pytest.raises(AssertionError, match="the model was run"):
        compare([TASK], [small("MTV", n_steps=5)], model, n_items=4)


def test_the_answers_behind_the_table_give_paired_differences(model: Bridge) -> None:
    names = ("zero-shot", "TV", "SITE")
    comparison = compare([TASK], [small(name) for name in names], model, n_items=8)
    frame, scores = comparison.frame, comparison.scores
    found = sl.summarize(scores, by=("task", "condition"), against="SITE").set_index("condition")
    assert found["mean"].tolist() == frame["accuracy"].tolist()
    assert found["difference"]["TV"] == pytest.approx(found["mean"]["TV"] - found["mean"]["SITE"])
    paired = comparison.differences("SITE").set_index("method")
    assert paired.index.tolist() == ["zero-shot", "TV"] and paired["difference"].equals(
        found["difference"].drop("SITE").rename_axis("method")
    )
    with pytest.raises(SitelensError, match="no method 'SIDE'; there are: zero-shot, TV, SITE"):
        comparison.differences("SIDE")
    by_item = scores.pivot(index="item", columns="condition", values="score")
    assert by_item["SITE"].mean() == frame["accuracy"].iloc[-1] and len(by_item) == 8


def test_what_was_finished_before_an_interruption_is_kept(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    compare([TASK], [small("I2CL")], model, n_items=4)
    with monkeypatch.context() as patch:
        micro.silence(patch)
        with pytest.raises(AssertionError, match="the model was run"):
            compare([TASK], [small("I2CL"), small("TV")], model, n_items=4)
    frame = compare([TASK], [small("I2CL"), small("TV")], model, n_items=4).frame
    assert list(frame["method"]) == ["I2CL", "TV"]


def test_a_fits_cost_does_not_depend_on_what_lies_in_the_cache(model: Bridge) -> None:
    alone = small("SITE").measured_fit(TASK, Model.of(model))
    sl.settings.cache_dir = sl.settings.cache() / "other"
    sl.embed_task(TASK, model, n_prompts=3, n_shots=2)
    again = small("SITE").measured_fit(TASK, Model.of(model))
    assert (alone.forward_tokens, alone.backward_tokens) == (again.forward_tokens, again.backward_tokens)


def test_means_over_tasks() -> None:
    rows = [
        {"task": task, "method": method, "accuracy": value, "low": value - 0.1, "high": value + 0.1, "n": n,
         **dict.fromkeys(COSTS, 1234.0)}
        for task, method, value, n in CELLS
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    scores = pd.DataFrame([
        {"task": task, "item": i, "condition": method, "score": float(i < round(value * n))}
        for task, method, value, n in CELLS for i in range(n)
    ])  # fmt: skip
    comparison = Comparison(frame, scores)
    summary = comparison.summary()
    assert summary["method"].tolist() == ["x", "y"]
    assert summary["accuracy"].tolist() == pytest.approx([0.3, 0.95]) and summary["tasks"].tolist() == [2, 2]
    whole = sl.summarize(scores, by=("condition",))
    pd.testing.assert_frame_equal(summary[["low", "high"]], whole[["low", "high"]])
    alone = Comparison(frame[frame["task"] == "a"], scores[scores["task"] == "a"]).summary().iloc[0]
    wilson = binomtest(4, 40).proportion_ci(method="wilson")
    assert (alone["low"], alone["high"]) == pytest.approx((wilson.low, wilson.high))
    lines = comparison.markdown().splitlines()
    assert lines[0] == "| task | n | x | y |" and lines[2] == "| a | 40 | 10 [0, 20] | 100 [90, 110] |"
    assert (
        lines[4].startswith(f"| mean of 2 | {40 + frame['n'].iloc[-1]} | 30 [")
        and lines[-1].startswith("| y | 95 [")
        and lines[-1].endswith("| 1,234 | 1234.000 |")
    )


def test_nothing_to_compare_is_an_error(model: Bridge) -> None:
    with pytest.raises(SitelensError, match="give at least one method"):
        sl.compare([micro.task()], [], model)
    with pytest.raises(SitelensError, match="give at least one task"):
        sl.compare([], ["zero-shot"], model)


def test_unknown_methods_are_named_with_the_nearest(model: Bridge) -> None:
    with pytest.raises(SitelensError, match=r"did you mean .*LoRA"):
        compare([TASK], ["lora"], model)
    assert methods_by_label("FV") == {"FV": sl.methods.FV()}
    assert list(methods_by_label("all")) == list(ALL)


def test_a_methods_fields_are_checked_when_it_is_made() -> None:
    with pytest.raises(SitelensError, match=r"LTV takes no argument 'n_step': did you mean n_steps"):
        sl.methods.LTV(n_step=100)  # type: ignore[call-arg]
    with pytest.raises(SitelensError, match=r"LTV\.n_steps must be at least 1, got 0"):
        sl.methods.LTV(n_steps=0)
    with pytest.raises(SitelensError, match=r"SITE\.init must be 'random' or lie between 0 and 1"):
        sl.methods.SITE(init=3)
    with pytest.raises(SitelensError, match=r"FV has no option 'widths'"):
        method_named("FV", {"widths": 3})


def test_two_of_one_method_are_told_apart_by_what_differs() -> None:
    methods = [sl.methods.LTV(n_steps=5), "LTV", "5-shot", sl.methods.LTV(n_steps=5), "FV"]
    assert list(methods_by_label(methods)) == ["LTV(n_steps=5)", "LTV", "5-shot", "FV"]
    assert methods_by_label(["5-shot"])["5-shot"] == sl.methods.FewShot(n_shots=5)


def test_the_figure_has_every_method_in_both_panels() -> None:
    rows = [
        {"task": task, "method": name, "accuracy": 0.1 * i, "trained": 10 * i, "forward_tokens": 1000 * i,
         "backward_tokens": 0}
        for task in ("a", "b") for i, name in enumerate(ALL[:5])
    ]  # fmt: skip
    figure: Any = figures.comparison(pd.DataFrame(rows))
    assert [trace.name for trace in figure.data if trace.showlegend] == list(ALL[:5])
    assert len(figure.data) == 10
    assert sorted({round(trace.y[0], 9) for trace in figure.data}) == [0.0, 0.1, 0.2, 0.3, 0.4]
