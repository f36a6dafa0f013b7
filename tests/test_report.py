"""The main job on a micro model: every condition, the files it writes, and making it again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import sitelens as sl
from sitelens.provenance import provenance
from sitelens.report import RunConfig, RunReport, run, warn_of_another_model
from tests import micro

SMALL = sl.TrainConfig(steps=6, eval_every=3, n_valid=4)


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    path = tmp_path / "shift.json"
    path.write_text(json.dumps([{"input": e.input, "output": e.output} for e in micro.task().train]))
    return str(path)


def config(task_file: str) -> RunConfig:
    return RunConfig(
        tasks=(task_file,),
        n_prompts=3,
        n_shots=2,
        train=SMALL,
        draws=2,
        n_items=5,
        metrics=("first_token", "exact_match"),
    )


@pytest.fixture
def report(task_file: str) -> RunReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SitelensWarning)  # a random model may have any gap
        return run(config(task_file), micro.bridge("Llama"))


CONDITIONS = ["zero-shot", "2-shot", "SITE", "hard", "high-alpha", "low-alpha", "random", "echo"]


def test_every_condition_stands_in_the_summary_and_the_table(report: RunReport) -> None:
    for metric in report.config.metrics:
        rows = report.summary[report.summary["metric"] == metric]
        assert list(rows["condition"]) == CONDITIONS
        lines = report.table(metric).splitlines()
        assert [line.split()[0] for line in lines[1:]] == CONDITIONS
    drawn = report.summary[report.summary["condition"] == "random"]
    assert drawn["spread"].notna().all() and (drawn["n"] == 10).all() and (drawn["interval"] == "items and draws").all()


def test_high_low_and_random_have_a_quarter_of_the_heads_unless_told(report: RunReport, task_file: str) -> None:
    result, mean_z = report.results["shift"], report.embeddings["shift"]
    for k, expected in ((None, 2), (5, 5)):
        options = {**vars(config(task_file)), "k": k}
        conditions = sl.report.run_conditions(result, mean_z, RunConfig(**options))
        for name in ("high-alpha", "low-alpha", "random 0", "random 1"):
            condition = conditions[name]
            assert isinstance(condition, sl.PatchHeads) and condition.selection.alpha.sum() == expected


def test_a_run_writes_its_files_and_run_json_makes_it_again(report: RunReport, tmp_path: Path) -> None:
    paths = report.save(tmp_path / "out")
    assert all(path.exists() for path in paths)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    assert recorded["model"]["fingerprint"] == sl.fingerprint(report.model)
    assert {"torch", "transformers", "transformer-lens", "sitelens"} <= recorded["versions"].keys()
    again = RunConfig.load(tmp_path / "out" / "run.json")
    assert again == report.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SitelensWarning)
        second = run(again, micro.bridge("Llama"))
    pd.testing.assert_frame_equal(second.scores, report.scores)
    assert sl.HeadSelection.load(tmp_path / "out" / "shift.selection.safetensors").task == "shift"
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {condition} |" in markdown or f" {condition} " in markdown for condition in CONDITIONS)


def test_a_gap_between_soft_and_hard_is_named() -> None:
    means = {"zero-shot": 0.0, "SITE": 0.5, "hard": 0.4}
    rows = [{"task": "t", "metric": "first_token", "condition": name, "mean": mean} for name, mean in means.items()]
    with pytest.warns(sl.SitelensWarning, match="soft selection is 10 points above hard"):
        sl.report._warn_about_gaps(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "no run.json"), ("[", "no run.json"), (None, "there is no file")]
)
def test_a_bad_run_json_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(sl.SitelensError, match=message):
        RunConfig.load(path)


def test_other_weights_than_a_run_json_records_are_warned_of(tmp_path: Path) -> None:
    narrow, wide = micro.bridge("Llama", torch.bfloat16), micro.bridge("Llama")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(provenance("sitelens run one", narrow, "tiny")))
    warn_of_another_model(path, narrow)
    with pytest.warns(sl.SitelensWarning, match=r"other weights \(tiny, bfloat16\)"):
        warn_of_another_model(path, wide)
