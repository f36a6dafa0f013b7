"""run on a micro model: every condition, the files it writes, and repeating it."""

from __future__ import annotations

import json
import platform
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import sitelens as sl
from sitelens.cli.command import command_parser
from sitelens.cli.experiments import run_config
from sitelens.models.model import Model
from sitelens.models.provenance import provenance
from sitelens.reports.records import changes, run_command, warn_of_changes
from sitelens.reports.run import RunConfig, RunReport, _warn_about_gaps, run, run_conditions
from tests import micro

SMALL = sl.TrainConfig(n_steps=6, eval_every=3, n_valid=4)


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
        warnings.simplefilter("ignore", sl.SitelensWarning)  # a random model may have a large gap
        return run(config(task_file), micro.bridge("Llama"))


CONDITIONS = ["zero-shot", "2-shot", "SITE", "hard", "high-alpha", "low-alpha", "random", "echo"]


def test_every_condition_stands_in_the_summary_and_the_table(report: RunReport) -> None:
    for metric in report.config.metrics:
        rows = report.frame[report.frame["metric"] == metric]
        assert list(rows["condition"]) == CONDITIONS
        lines = report.text(metric).splitlines()
        assert [line.split()[0] for line in lines[1:]] == CONDITIONS
    drawn = report.frame[report.frame["condition"] == "random"]
    assert drawn["spread"].notna().all() and (drawn["n"] == 10).all() and (drawn["interval"] == "items and draws").all()


def test_high_low_and_random_have_a_quarter_of_the_heads_unless_told(report: RunReport, task_file: str) -> None:
    result, mean_z = report.results["shift"], report.embeddings["shift"]
    for k, expected in ((None, 2), (5, 5)):
        options = {**vars(config(task_file)), "k": k}
        conditions = run_conditions(result, mean_z, RunConfig(**options))
        for name in ("high-alpha", "low-alpha", "random 0", "random 1"):
            condition = conditions[name]
            assert isinstance(condition, sl.PatchHeads) and condition.selection.alpha.sum() == expected


def test_a_run_writes_its_files_and_run_json_makes_it_again(report: RunReport, tmp_path: Path) -> None:
    paths = report.save(tmp_path / "out")
    assert report.model is not None
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
        _warn_about_gaps(pd.DataFrame(rows))


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
    path.write_text(json.dumps({**provenance("sitelens run one", narrow), "config": {}}))
    warn_of_changes(path, Model.of(narrow))
    with pytest.warns(sl.SitelensWarning) as heard:
        warn_of_changes(path, Model.of(wide))
    weights, dtype = (str(one.message) for one in heard)
    assert "run.json was made with other weights (Llama, bfloat16)" in weights
    assert "run.json was made with a model of dtype bfloat16, now it is float32" in dtype


def parsed(command: str) -> RunConfig:
    """The configuration that a shell and the command line parse from a command."""
    program, *words = shlex.split(command)
    assert program == "sitelens"
    return run_config(command_parser().parse_args(words))


TRAINS = st.fixed_dictionaries({
    "n_steps": st.sampled_from([400, 3]), "lr": st.sampled_from([0.2, 1e-5, 0.1 + 0.2]),
    "init": st.sampled_from([0.5, "random", 0.25]), "checkpoint": st.sampled_from(["best", "last"]),
    "mixing": st.sampled_from(["convex", "additive"]), "seed": st.sampled_from([0, 4]),
    "batch_size": st.sampled_from([1, 2]), "eval_every": st.sampled_from([50, 2]), "n_valid": st.sampled_from([100, 2]),
})  # fmt: skip
CONFIGS = st.fixed_dictionaries({
    "tasks": st.lists(st.sampled_from(["antonym", "a b.json", "it's.csv", "-dash.json", "é"]), min_size=1).map(tuple),
    "model": st.sampled_from(["smollm2-135m", "owner/name", "my model.gguf"]),
    "template": st.sampled_from([None, "- {input}: {output}\n", "chat", "{input}\t{output} 'x' $HOME\n\n"]),
    "instruction": st.sampled_from([None, "", "--not an option", 'Say "it".\nNow.']),
    "template_arguments": st.sampled_from([None, {"enable_thinking": False, "day": "true", "n": 1.5, "x": None}]),
    "n_prompts": st.sampled_from([50, 3]), "n_shots": st.sampled_from([10, 0]), "k": st.sampled_from([None, 3]),
    "draws": st.sampled_from([5, 0]), "n_items": st.sampled_from([100, None, 7]), "seed": st.sampled_from([0, 12]),
    "metrics": st.sampled_from([("first_token",), ("exact_match", "first_token")]),
})  # fmt: skip


@given(fields=CONFIGS, train=TRAINS)
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_recorded_command_is_the_whole_configuration(fields: dict[str, Any], train: dict[str, Any]) -> None:
    config = RunConfig(**fields, train=sl.TrainConfig(**train))
    assert parsed(run_command(config)) == config


def test_a_record_says_on_what_and_with_what_it_was_made(report: RunReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert parsed(record["made_by"]) == report.config
    assert {"name": "Llama", "dtype": "float32", "quantize": None, "revision": None}.items() <= record["model"].items()
    task = report.tasks[0]
    about = {"digest": task.digest, "template": task.template, "test": len(task.test), "n_items": 5}
    assert about.items() <= record["tasks"]["shift"].items() and record["tasks"]["shift"]["source"] == "shift.json"
    assert record["machine"]["cpu"] and record["machine"]["threads"] == torch.get_num_threads()
    assert platform.node() not in json.dumps(record["machine"])
    assert record["created"].endswith("+00:00")
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert set(scores["model"]) == {"Llama"} and set(scores["training_seed"]) == {0}
    assert {"input", "answer", "predicted", "seed"} <= set(scores)
    assert "shift (n=5)" in report.text() and "| shift | 5 |" in report.markdown()


def test_a_second_run_computes_nothing(report: RunReport, monkeypatch: pytest.MonkeyPatch) -> None:
    micro.silence(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SitelensWarning)
        again = run(report.config, report.model)
    pd.testing.assert_frame_equal(again.scores, report.scores, check_exact=True)


def test_scores_of_two_models_are_not_averaged_by_mistake(report: RunReport) -> None:
    both = pd.concat([report.scores, report.scores.assign(model="other", score=1)])
    with pytest.raises(sl.SitelensError, match=r"rows of several models \(Llama, other\).*add 'model' to by"):
        sl.summarize(both)
    found = sl.summarize(both, by=("model", "task", "condition", "metric")).set_index("model")
    assert (found["mean"]["other"] == 1).all()


def test_whatever_has_changed_since_a_run_is_said_in_a_line_each(report: RunReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    path = tmp_path / "run.json"

    def lines(**edits: Any) -> list[str]:
        record = json.loads(path.read_text())
        for name, value in edits.items():
            record[name] = {**record[name], **value} if isinstance(value, dict) else value
        assert report.model is not None
        return changes(record, Model.of(report.model), edited)

    edited = report.tasks
    assert lines() == []
    ours, torchs = lines(versions={"torch": "0.1", "sitelens": "0"})
    assert ours == f"was made with sitelens 0, now it is {sl.__version__}"
    assert torchs.startswith("was made with torch 0.1, now it is ")
    [renamed] = lines(model={"name": "other"})
    assert renamed == "was made with a model of name other, now it is Llama"
    weights, dtype = lines(model={"dtype": "bfloat16", "fingerprint": "ab"})
    assert weights.startswith("was made with other weights (Llama, bfloat16)") and "dtype bfloat16" in dtype
    assert len(lines(model={"revision": "ab12"})) == len(lines(tokenizer="ab")) == 1
    edited = [replace(report.tasks[0], test=report.tasks[0].test[::-1])]
    assert lines() == ["was made with other items of the task 'shift': its digest has changed"]
    edited = [replace(report.tasks[0], template="{input} -> {output}\n", test=report.tasks[0].test[1:])]
    template, test = lines()
    assert "another template of the task 'shift': 'Q: {input}" in template and "number of test items" in test
