"""Suites on micro models: a suite gives the same results as its tasks one by one, with or without an interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sitelens as sl
from sitelens import progress
from sitelens.engine.lengths import item_sizes, within_context
from sitelens.engine.prompts import few_shot_prompts
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation.labels import shared_first_tokens
from sitelens.methods.site import method as site
from sitelens.methods.site import state as training_state
from sitelens.models.model import Bridge
from sitelens.reports.suite import run_suite
from sitelens.tasks import SUITES, Task
from tests import micro

ROOT = Path(__file__).parents[1]
TASKS = {name: micro.task(name, step=step) for name, step in (("one", 1), ("two", 2), ("three", 3))}
GROUPS = {"one": "left", "two": "right", "three": "left"}
CONFIG = sl.TrainConfig(n_steps=6, eval_every=3, n_valid=3, lr=1.0)
SITE = sl.methods.SITE(n_prompts=3, n_shots=2, n_steps=6, eval_every=3, n_valid=3, lr=1.0)
SMALL: dict[str, Any] = {
    "methods": [SITE], "n_shots": 2, "n_items": 6,
}  # fmt: skip


def load(name: str) -> Task:
    if name not in TASKS:
        raise SitelensError(f"{name} is nowhere to be had")
    return TASKS[name]


class Micro(sl.Suite):
    """A suite of micro tasks that replaces the real suite of the same name."""

    name = "bbh"

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    def names(self) -> list[str]:
        return self._names

    def load(self, name: str) -> Task:
        return load(name)

    def group(self, name: str) -> str:
        return GROUPS[name]


@pytest.fixture
def model() -> Iterator[Bridge]:
    yield from micro.lent("Llama")


@pytest.fixture(autouse=True)
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite "bbh" consists of three micro tasks in two groups, and one task whose data are unavailable."""
    monkeypatch.setitem(SUITES.own, "bbh", Micro([*TASKS, "four"]))


def test_each_tasks_rows_are_what_it_gives_by_itself(model: Bridge) -> None:
    found = run_suite("bbh", model, **SMALL)
    for name, task in TASKS.items():
        embedding = sl.embed_task(task, model, n_prompts=3, n_shots=2)
        alpha = sl.train_selection(task, model, embedding=embedding, config=CONFIG).selection
        conditions = {"zero-shot": sl.ZeroShot(), "2-shot": sl.FewShot(2), "SITE": sl.PatchHeads(alpha, embedding)}
        expected = sl.evaluate(task, conditions, model, n_items=6)
        rows = found.scores[found.scores["task"] == name].reset_index(drop=True)
        for column in ("condition", "item", "score", "rank"):
            assert rows[column].tolist() == expected[column].tolist()
        np.testing.assert_allclose(rows["logprob"], expected["logprob"], atol=1e-4)


def test_the_table_has_means_over_the_tasks_of_each_group_and_of_all(model: Bridge) -> None:
    found = run_suite("bbh", model, **SMALL)
    by_task = found.scores.groupby(["condition", "group", "task"])["score"].mean()
    table = found.summary().set_index(["condition", "group"])
    for condition in ("zero-shot", "2-shot", "SITE"):
        for group, tasks in (("left", 2), ("right", 1)):
            row: Any = table.loc[(condition, group)]
            assert row["mean"] == pytest.approx(by_task[condition, group].mean())
            assert (row["tasks"], row["n"]) == (tasks, 6 * tasks) and row["low"] <= row["mean"] <= row["high"]
        assert table.loc[(condition, "all"), "mean"] == pytest.approx(by_task[condition].mean())
    summary = found.frame
    assert len(summary) == 9 and summary["n"].eq(6).all()
    lines = found.markdown().splitlines()
    assert (
        lines[0] == "| condition | left (2 tasks, n=12) | right (1 task, n=6) | all (3 tasks, n=18) |"
        and len(lines) == 7
    )
    assert lines[-1].startswith("95% intervals: over items of these tasks")
    assert [cell.count("[") for cell in lines[2].split(" | ")] == [0, 2, 1, 2]
    assert {"tasks_low", "tasks_high"} <= set(found.summary().columns)


def test_a_task_that_cannot_be_had_or_is_not_asked_for_is_named(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_suite("bbh", model, tasks=["three", "four"], **SMALL)
    assert found.left_out == {
        "one": "not requested", "two": "not requested", "four": "four is nowhere to be had",
    }  # fmt: skip
    assert set(found.scores["task"]) == {"three"} and found.tasks["task"].tolist() == ["three"]
    few = Task("one", "here", TASKS["one"].train[:2], TASKS["one"].valid, TASKS["one"].test)
    monkeypatch.setitem(TASKS, "one", few)
    assert run_suite("bbh", model, **SMALL).left_out["one"].startswith("too few items are left (2 train, ")
    with pytest.raises(SitelensError, match=r"no task of the suite 'bbh' can be run: one: .*too few items"):
        run_suite("bbh", model, tasks=["one"], **SMALL)


def test_a_name_that_is_not_in_the_suite_is_refused(model: Bridge) -> None:
    with pytest.raises(SitelensError, match="the suite 'bbh' has no task 'five'"):
        run_suite("bbh", model, tasks=["five"])
    with pytest.raises(SitelensError, match="unknown method 'SIDE'"):
        run_suite("bbh", model, methods=["SIDE"])
    with pytest.raises(SitelensError, match="unknown metric 'f1'"):
        run_suite("bbh", model, metric="f1")
    with pytest.raises(SitelensError, match=r"no task 'fo'.* did you mean four"):
        run_suite("bbh", model, tasks=["one", "fo"])
    for wrong in ("n_items", "n_shots"):
        options: dict[str, Any] = {wrong: 0}
        with pytest.raises(SitelensError, match=rf"{wrong}.* must be at least 1, got .*0"):
            run_suite("bbh", model, **options)


def test_what_fails_is_left_out_and_the_rest_goes_on(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = site.train_selections

    def train(tasks: Any, *args: Any, **options: Any) -> Any:
        if any(task.name == "two" for task in tasks):
            raise SitelensError("the loss of 'two' is not a number")
        return trained(tasks, *args, **options)

    monkeypatch.setattr(site, "train_selections", train)
    found = run_suite("bbh", model, **{**SMALL, "methods": [SITE, sl.methods.TV(n_sets=2, n_shots=500)]})
    assert found.left_out["two, SITE"] == "the loss of 'two' is not a number"
    assert all("too few training items for 500 shots" in found.left_out[f"{name}, TV"] for name in TASKS)
    assert set(map(tuple, found.scores[["task", "condition"]].to_numpy())) == {
        *((name, condition) for name in TASKS for condition in ("zero-shot", "2-shot")),
        ("one", "SITE"),
        ("three", "SITE"),
    }  # fmt: skip
    assert sorted(found.conditions["SITE"]) == ["one", "three"] and found.conditions["TV"] == {}


def test_the_echo_baseline_stands_once_beside_prefix_match(model: Bridge) -> None:
    found = run_suite("bbh", model, metric="prefix_match", **{**SMALL, "methods": [SITE, sl.methods.TV(n_sets=2)]})
    counts = found.scores.groupby(["task", "condition"]).size()
    assert counts.eq(6).all() and len(counts) == 3 * 5
    figure: Any = found.figure()
    assert figure.layout.xaxis.title.text == "Prefix-match accuracy"


def test_other_methods_stand_beside_site(model: Bridge) -> None:
    vector = sl.methods.TV(n_sets=2, n_shots=2)
    found = run_suite("bbh", model, tasks=["one"], **{**SMALL, "methods": [vector, SITE, "zero-shot"]})
    assert found.scores["condition"].unique().tolist() == ["zero-shot", "2-shot", "TV", "SITE"]
    condition = vector.fit(TASKS["one"], model)
    expected = sl.evaluate(TASKS["one"], {"TV": condition}, model, n_items=6)
    rows = found.scores[found.scores["condition"] == "TV"]
    np.testing.assert_allclose(rows["logprob"], expected["logprob"], atol=1e-4)


def test_a_second_call_runs_nothing(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_suite("bbh", model, **SMALL)
    micro.silence(monkeypatch)
    second = run_suite("bbh", model, **SMALL)
    pd.testing.assert_frame_equal(first.scores, second.scores)
    assert first.tasks.equals(second.tasks) and first.left_out == second.left_out


def test_a_suite_names_its_stages(model: Bridge, capsys: pytest.CaptureFixture[str]) -> None:
    with sl.settings.using(progress=None):
        run_suite("bbh", model, **{**SMALL, "methods": [SITE, sl.methods.TV(n_sets=2)]})
    lines = capsys.readouterr().err.splitlines()
    stages = [re.sub(r", about .* left$", "", line.removeprefix("sitelens: suite bbh: ")) for line in lines]
    assert stages[:3] == ["1/3 fit SITE", "2/3 fit TV", "3/3 score"] and stages[-1].startswith("done in ")


def test_a_suites_bar_moves_within_a_batch_of_trainings(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[progress.Job] = []
    enter, step = progress.Job.__enter__, training_state.Record.step
    shares: list[float] = []
    monkeypatch.setattr(progress.Job, "__enter__", lambda self: (jobs.append(self), enter(self))[1])
    monkeypatch.setattr(
        training_state.Record, "step", lambda self, *values: (shares.append(jobs[0]._share), step(self, *values))[1]
    )
    run_suite("bbh", model, **{**SMALL, "methods": [replace(SITE, n_steps=100)]})
    assert len(shares) == 100 and shares == sorted(shares) and len(set(shares)) == 100
    assert jobs[0]._share == pytest.approx(1)


# Interruptions

SCRIPT = """
import sys
from pathlib import Path
from sitelens.methods.site import method, state
from sitelens.reports import suite as suites
from sitelens.settings import settings
from tests import micro, test_suites
settings.cache_dir = Path(sys.argv[1])
method.TASKS_PER_BATCH = int(sys.argv[3])
state.KEEP_SECONDS = 0
found = suites.run_suite(test_suites.Micro(test_suites.TASKS), micro.bridge("Llama"), **test_suites.SMALL)
found.scores.to_csv(sys.argv[2], index=False)
"""


def start(cache: Path, out: Path, together: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(cache), str(out), str(together)], cwd=ROOT)


def artifacts(cache: Path) -> dict[str, int]:
    """The finished files in the cache, with their modification times."""
    return {str(p.relative_to(cache)): p.stat().st_mtime_ns for p in sorted(cache.rglob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "together"), [("scores", 1), ("training", 16)])
def test_what_was_finished_before_a_kill_is_not_done_again(kind: str, together: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, tmp_path / "whole.csv", together).wait() == 0
    process = start(broken, tmp_path / "broken.csv", together)
    while process.poll() is None and not any(f"/{kind}/" in name for name in artifacts(broken)):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {name: written for name, written in artifacts(broken).items() if "/training/" not in name}
    assert 0 < len(before) < len(artifacts(whole))
    assert start(broken, tmp_path / "broken.csv", together).wait() == 0
    after = artifacts(broken)
    assert sorted(after) == sorted(artifacts(whole))
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "broken.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


# Items


def test_items_too_long_for_their_share_of_the_context_are_dropped_everywhere(model: Bridge) -> None:
    long = [(" ".join(micro.WORDS[i : i + 20]), micro.WORDS[0]) for i in range(6)]
    task = Task.from_pairs("lengths", [*((word, micro.WORDS[1]) for word in micro.WORDS[:30]), *long])
    tokenizer = micro.tokenizer()
    kept = within_context(task, tokenizer, 60, 4)
    sizes = {split: item_sizes(task.split(split), task.template, tokenizer) for split in ("train", "valid", "test")}
    for split, found in sizes.items():
        assert len(kept.split(split)) == sum(size <= 12 for size in found)
    assert len(kept.train) + len(kept.valid) + len(kept.test) == 30
    assert kept.note == "6 of 36 items are dropped: longer than 12 tokens" and kept.digest != task.digest
    prompts = few_shot_prompts(kept, kept.test, 4, tokenizer)
    assert max(len(tokenizer(prompt.text)["input_ids"]) for prompt in prompts) <= 60
    assert within_context(task, tokenizer, 1000, 4) is task
    assert within_context(task, tokenizer, 5, 4).train == ()


def test_dropped_items_are_counted_and_no_prompt_is_longer_than_the_context(
    model: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [(" ".join(micro.WORDS[i : i + 60]), micro.WORDS[i]) for i in range(8)]
    pairs = [*((item.input, item.output) for item in TASKS["one"].train), *long]
    monkeypatch.setitem(TASKS, "one", Task.from_pairs("one", pairs))
    found = run_suite("bbh", model, tasks=["one", "two"], **{**SMALL, "n_shots": 4})
    assert found.tasks.set_index("task")["dropped"].to_dict() == {"one": 8, "two": 0}
    assert "8 of" in found.tasks.set_index("task")["note"]["one"]


def test_answers_that_begin_alike_are_counted(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    words = micro.WORDS
    pairs = [(words[i], f"{words[50]} {words[i]}" if i < 10 else words[i]) for i in range(40)]
    task = Task.from_pairs("one", pairs)
    assert shared_first_tokens(task, micro.tokenizer()) == {output for _, output in pairs[:10]}
    monkeypatch.setitem(TASKS, "one", task)
    with pytest.warns(SitelensWarning, match="task 'one': 10 of 40 answers .* share their first token"):
        found = run_suite("bbh", model, tasks=["one"], **SMALL).tasks.iloc[0]
    assert found["shared"] == sum(" " in item.output for item in task.test) / len(task.test) > 0


# Written files


def test_everything_is_written_with_its_origin(model: Bridge, tmp_path: Path) -> None:
    found = run_suite("bbh", model, **SMALL)
    folder = tmp_path / "figures"
    paths = found.save(folder, command="sitelens suite bbh")
    assert {path.name for path in paths} | {"plotly.min.js"} == {path.name for path in folder.iterdir()}
    record = json.loads((folder / "suite-bbh.json").read_text())
    assert record["made_by"] == "sitelens suite bbh" and record["left_out"] == found.left_out
    assert record["tasks"] == list(TASKS) and record["methods"]["SITE"]["n_steps"] == 6
    assert [row["mean"] for row in record["table"]] == pytest.approx(found.summary()["mean"].tolist(), abs=1e-4)
    summary = pd.read_csv(folder / "suite-bbh.csv")
    assert summary["mean"].tolist() == pytest.approx(found.frame["mean"].tolist())
    assert (folder / "suite-bbh.md").read_text().strip() == found.markdown()
    tasks = pd.read_csv(folder / "suite-bbh-tasks.csv")
    assert tasks["digest"].tolist() == [TASKS[name].digest for name in TASKS]


def test_the_figure_has_a_line_a_task_by_group_and_accuracy(model: Bridge) -> None:
    found = run_suite("bbh", model, **SMALL)
    figure: Any = found.figure()
    site = found.frame.query("condition == 'SITE'").sort_values(["group", "mean"], ascending=[True, False])
    assert list(figure.layout.yaxis.ticktext) == site["task"].tolist()
    assert [trace.name for trace in figure.data] == ["zero-shot", "2-shot", "SITE"]
    assert list(figure.data[-1].x) == site["mean"].tolist()
    assert [note.text for note in figure.layout.annotations][-2:] == ["left", "right"]
