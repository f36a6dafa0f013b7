"""The command line: help without slow imports, every command, one-line errors, and runs repeated from run.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import sitelens
from sitelens import tasks
from sitelens.cli import experiments, main
from sitelens.cli.command import command_parser
from sitelens.errors import SitelensError
from sitelens.files import folders
from sitelens.methods.site.train import TrainConfig
from sitelens.models import loading
from sitelens.models.gguf.converted import PACKAGED
from sitelens.reports import run as report
from sitelens.reports.run import RunConfig
from sitelens.store.artifact import Artifact
from sitelens.store.folder import default_store
from sitelens.tasks import builtin, task_names
from tests import micro

COMMANDS = ["run", "transfer", "compare", "suite", "figures", "verify", "tasks", "models", "cache"]
HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy", "plotly")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def words(value: list[str] | str) -> str:
    """A test id from a list of command-line words."""
    return " ".join(value) if isinstance(value, list) else ""


def config_of(*arguments: str) -> RunConfig:
    return experiments.run_config(command_parser().parse_args(["run", *arguments]))


def recorded(path: Path, config: RunConfig) -> Path:
    path.write_text(json.dumps({"config": asdict(config)}))
    return path


# Imports


def test_help_and_lists_import_nothing_heavy():
    code = f"""
import sys, sitelens.cli
def light(*arguments, but=()):
    try:
        sitelens.cli.main(arguments)
    except SystemExit as stop:
        assert not stop.code, stop.code
    found = [name for name in {HEAVY} if name in sys.modules and name not in but]
    assert not found, (arguments, found)
light("--help")
light("--version")
for command in {COMMANDS}:
    light(command, "--help")
light("tasks", "--names", but=("numpy", "pandas"))
light("models", but=("numpy", "pandas"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Help


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    code, out, _ = outcome(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str], command: str):
    code, out, _ = outcome(capsys, command, "--help")
    assert code == 0 and f"usage: sitelens {command}" in out
    assert all(option in out for option in ("--cache", "--data", "--progress"))


def test_help_shows_the_defaults_of_the_library(capsys: pytest.CaptureFixture[str]):
    assert config_of("antonym") == RunConfig(tasks=("antonym",))
    text = " ".join(outcome(capsys, "run", "--help")[1].split())
    train = TrainConfig()
    for default in (train.n_steps, train.lr, train.eval_every, train.n_valid, RunConfig(tasks=()).model):
        assert f"(default: {default})" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    assert outcome(capsys, "--version")[:2] == (0, f"sitelens {sitelens.__version__}\n")


def test_the_command_is_installed():
    [command] = [point for point in entry_points(group="console_scripts") if point.name == "sitelens"]
    assert command.load() is main


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["tasks", "--nonsense"], ["run", "antonym", "--n-steps", "many"], ["cache", "--clear", "x"]],
)
def test_a_wrong_command_line_shows_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("usage: sitelens")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "antonym", "--n-step", "3"], "there is no option '--n-step': did you mean --n-steps"),
        (["run", "antonym", "--metric=first_token"], "there is no option '--metric': did you mean --metrics"),
        (["transfer", "antonym", "synonym", "--nitems", "5"], "did you mean --n-items"),
        (["cache", "--verbos"], "there is no option '--verbos': did you mean --verbose?"),
        (["tasks", "antonym", "--qqqqqq"], "there is no option '--qqqqqq'; `sitelens tasks --help` lists them"),
        (["models", "extra"], "'extra' is one word too many"),
        (["--prog", "models"], "--prog"),
    ],
    ids=words,
)
def test_options_are_written_out_and_a_mistyped_one_names_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("usage: sitelens") and said in err.splitlines()[-1]


# Unexpected errors


@pytest.mark.parametrize("error", [RuntimeError("boom\nmore"), RecursionError(), KeyError("x"), ZeroDivisionError("0")])
def test_an_unexpected_error_is_one_line_and_its_traceback_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
):
    def fail() -> None:
        raise error

    monkeypatch.setattr("sitelens.tasks.list_tasks", fail)
    code, out, err = outcome(capsys, "tasks")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"sitelens: an error in sitelens ({type(error).__name__}") and "SITELENS_TRACEBACK=1" in err
    monkeypatch.setenv("SITELENS_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["tasks"])


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("sitelens.tasks.list_tasks", fail)
    code, _, err = outcome(capsys, "tasks")
    assert code == 1 and err.startswith("sitelens: out of memory") and "--memory-budget" in err


# tasks and models


def test_tasks_lists_every_task(capsys: pytest.CaptureFixture[str]):
    code, out, err = outcome(capsys, "tasks")
    assert code == 0 and err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(task_names()) <= set(lines)
    assert str(len(builtin.pairs("antonym"))) in lines["antonym"] and builtin.describe("antonym") in lines["antonym"]
    assert "?" in lines["fv/squad_val"].split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], task_names()),
        (["antonym"], ["antonym", "fv/antonym"]),
        (["--built-in"], builtin.names()),
        (["antonym", "--built-in"], ["antonym"]),
    ],
)
def test_tasks_prints_names(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]):
    code, out, _ = outcome(capsys, "tasks", "--names", *arguments)
    assert code == 0 and out.splitlines() == expected


@pytest.mark.parametrize("arguments", [["zzz"], ["squad_val", "--built-in"], ["squad_val", "--built-in", "--names"]])
def test_tasks_without_a_match_is_an_error(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    assert outcome(capsys, "tasks", *arguments) == (1, "", f"sitelens: no task has {arguments[0]!r} in its name\n")


def test_models_lists_the_packaged_models(capsys: pytest.CaptureFixture[str]):
    code, out, err = outcome(capsys, "models")
    assert code == 0 and err == "" and "hub id" in out
    for name, spec in PACKAGED.items():
        [line] = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert {str(spec.layers), str(spec.heads), "False"} <= set(line.split())


# cache


@pytest.fixture
def full_cache(own_cache: Path) -> Path:
    """A cache with two artifacts, a damaged artifact and a converted model."""
    store = default_store()
    store.put(Artifact("embedding", {"task": "antonym", "model": "0123456789abcdef"}, {"z": torch.zeros(9)}))
    store.put(Artifact("selection", {"task": "synonym", "model": "0123456789abcdef"}, {"a": torch.zeros(9)}))
    broken = store.put(Artifact("selection", {"task": "broken"}, {}))
    assert broken is not None
    broken.write_bytes(b"rubbish")
    folder = own_cache / "models" / "gguf-0123"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    (own_cache / "models" / "gguf-0123.lock").touch()
    return own_cache


def test_cache_shows_what_is_there(capsys: pytest.CaptureFixture[str], full_cache: Path):
    code, out, _ = outcome(capsys, "cache")
    assert code == 0 and str(full_cache / "artifacts") in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}
    assert {kind: row[0] for kind, row in rows.items()} == {
        "embedding": "1", "selection": "1", "damaged": "1", "model": "gguf-0123",
    }  # fmt: skip
    assert rows["model"] == ["gguf-0123", "2.0", "MB"]


def test_cache_verbose_has_a_line_for_each_artifact(capsys: pytest.CaptureFixture[str], full_cache: Path):
    lines = [line.split() for line in outcome(capsys, "cache", "--verbose")[1].splitlines()]
    assert ["embedding", "antonym", "0123456789ab"] in [line[:3] for line in lines]
    assert ["damaged", "-", "-"] in [line[:3] for line in lines]


def test_cache_verbose_bears_artifacts_without_a_model(capsys: pytest.CaptureFixture[str]):
    default_store().put(Artifact("embedding", {}, {}))
    code, out, _ = outcome(capsys, "cache", "--verbose")
    assert code == 0 and ["embedding", "-", "-"] in [line.split()[:3] for line in out.splitlines()]


@pytest.mark.parametrize("arguments", [[], ["--verbose"]])
def test_an_empty_cache_says_so(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    code, out, _ = outcome(capsys, "cache", *arguments)
    assert code == 0 and out.endswith("nothing yet\n")


@pytest.mark.parametrize(
    ("arguments", "message", "kinds", "model"),
    [
        (["--clear"], "removed 3 artifacts", [], True),
        (["--clear", "all"], "the converted models stay: 1 (2.0 MB); `sitelens cache --clear --models`", [], True),
        (["--clear", "--models"], "removed the converted models: 1 (2.0 MB)", [], False),
        (["--clear", "embedding"], "removed 1 artifacts", ["damaged", "selection"], True),
        (["--clear", "selection"], "removed 2 artifacts", ["embedding"], True),
        (["--clear", "damaged"], "removed 1 artifacts", ["embedding", "selection"], True),
        (["--clear", "models"], "removed the converted models", ["damaged", "embedding", "selection"], False),
    ],
)
def test_cache_clears_what_is_named(
    capsys: pytest.CaptureFixture[str],
    full_cache: Path,
    arguments: list[str],
    message: str,
    kinds: list[str],
    model: bool,
):
    code, out, _ = outcome(capsys, "cache", *arguments)
    assert code == 0 and message in out
    assert sorted(default_store().entries()["kind"]) == kinds
    assert (full_cache / "models").exists() is model


def test_clearing_says_how_much(capsys: pytest.CaptureFixture[str]):
    default_store().put(Artifact("embedding", {}, {"z": torch.zeros(500_000)}))
    assert "removed 1 artifacts (2.0 MB)" in outcome(capsys, "cache", "--clear")[1]


def test_what_killed_runs_left_is_shown_apart_and_removed(capsys: pytest.CaptureFixture[str], full_cache: Path):
    left = [full_cache / "models" / "gguf-0123456789abcdef.x1y2.tmp", full_cache / "models" / "tmpabcd1234",
            full_cache / "models" / f"{folders.WORK}a", full_cache / f"{folders.WORK}b"]  # fmt: skip
    for folder in left:
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "model.gguf").write_bytes(bytes(1_000_000))
    (full_cache / "models" / "tmp_notes12").mkdir()  # the user's own folder
    out = outcome(capsys, "cache")[1]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("model ")] == ["gguf-0123"]
    assert "4 folders of runs that were killed  4.0 MB" in out
    with folders.locked(left[3] / ".lock", "at work") as held:
        assert held
        assert "removed what runs that were killed had left (3.0 MB)" in outcome(capsys, "cache", "--clear")[1]
    assert [folder.exists() for folder in left] == [False, False, False, True]
    assert (full_cache / "models" / "tmp_notes12").exists()


def test_a_model_that_another_process_converts_is_not_removed(capsys: pytest.CaptureFixture[str], full_cache: Path):
    with folders.locked(full_cache / "models" / "gguf-0123.lock", "converting it"):
        assert "gguf-0123 stays" in outcome(capsys, "cache", "--clear", "models")[1]
    assert (full_cache / "models" / "gguf-0123").exists()


def test_models_without_clear_is_a_question(capsys: pytest.CaptureFixture[str]):
    code, _, err = outcome(capsys, "cache", "--models")
    assert code == 1 and "--models goes with --clear" in err


def test_the_cache_folder_may_be_chosen(capsys: pytest.CaptureFixture[str], full_cache: Path, tmp_path: Path):
    out = outcome(capsys, "cache", "--cache", str(tmp_path / "other"))[1]
    assert str(tmp_path / "other" / "artifacts") in out and "nothing yet" in out


# run: accepted arguments


def test_run_options_become_a_configuration():
    line = (
        "antonym mine.csv --model m --n-prompts 3 --n-shots 2 --n-steps 7 --lr 0.1 --batch-size 4 --eval-every 5 "
        "--n-valid 6 --checkpoint last --init random --mixing additive --train-seed 8 --n-items 0 --k 9 --draws 1 "
        "--seed 10 --template chat --metrics exact_match first_token exact_match --instruction Hm "
        "--template-arg enable_thinking=false day=1=1 n=3"
    )
    train = TrainConfig(
        n_steps=7, lr=0.1, batch_size=4, eval_every=5, n_valid=6, checkpoint="last", init="random", mixing="additive",
        seed=8,
    )  # fmt: skip
    assert config_of(*line.split()) == RunConfig(
        tasks=("antonym", "mine.csv"), model="m", n_prompts=3, n_shots=2, train=train, k=9, draws=1, n_items=None,
        metrics=("exact_match", "first_token"), seed=10, template="chat", instruction="Hm",
        template_arguments={"enable_thinking": False, "day": "1=1", "n": 3},
    )  # fmt: skip


def test_init_may_be_a_number():
    assert config_of("antonym", "--init", "0.25").train.init == 0.25


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(tasks=("antonym",)),
        RunConfig(tasks=("antonym", "é.json"), k=5, n_items=None, metrics=("exact_match", "prefix_match"), seed=3),
        RunConfig(tasks=("a",), template="{input}\n{output}\n", draws=1),
        RunConfig(tasks=("a",), template="chat", instruction="é", template_arguments={"a": None, "b": False}),
        RunConfig(tasks=("a",), train=TrainConfig(init="random", mixing="additive", checkpoint="last", lr=1e-3)),
    ],
    ids=["defaults", "evaluation", "template", "chat", "training"],
)
def test_again_reads_the_configuration_that_run_json_records(tmp_path: Path, config: RunConfig):
    path = recorded(tmp_path / "run.json", config)
    assert RunConfig.load(path) == RunConfig.load(str(path)) == config
    assert config_of("--again", str(path)) == config


# run: rejected arguments

BROKEN_RUNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no config": lambda record: record.pop("config"),
    "no tasks": lambda record: record["config"].pop("tasks"),
    "no train": lambda record: record["config"].pop("train"),
    "unknown field": lambda record: record["config"].update(color="red"),
    "unknown training field": lambda record: record["config"]["train"].update(color="red"),
    "n_steps 0": lambda record: record["config"]["train"].update(n_steps=0),
}


@pytest.mark.parametrize("damage", BROKEN_RUNS.values(), ids=BROKEN_RUNS)
def test_a_run_json_that_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
):
    record = {"config": asdict(RunConfig(tasks=("antonym",)))}
    damage(record)
    (tmp_path / "run.json").write_text(json.dumps(record))
    code, out, err = outcome(capsys, "run", "--again", str(tmp_path / "run.json"))
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"sitelens: {tmp_path / 'run.json'} is no run.json of sitelens: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b"\xff", b'{"config": 5}'])
def test_a_file_that_is_no_run_json_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes):
    (tmp_path / "run.json").write_bytes(content)
    code, out, err = outcome(capsys, "run", "--again", str(tmp_path / "run.json"))
    assert (code, out) == (1, "") and err.count("\n") == 1 and "run.json is no run.json of sitelens" in err


def test_a_run_json_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for path in (tmp_path / "run.json", tmp_path):
        code, out, err = outcome(capsys, "run", "--again", str(path))
        assert (code, out) == (1, "") and err.startswith("sitelens: ") and str(path) in err and err.count("\n") == 1


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any model is replaced by a micro model, and training fails the test. Lists the requested models."""
    asked: list[str] = []

    def load_model(name: Any = None, **options: Any) -> Any:
        asked.append(name)
        return micro.bridge("Llama")

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("training was reached")

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr(report, "train_selections", fail)
    return asked


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    task = micro.task()
    items = [{"input": item.input, "output": item.output} for item in (*task.train, *task.valid, *task.test)]
    (tmp_path / "shift.json").write_text(json.dumps(items))
    return str(tmp_path / "shift.json")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--n-steps", "0"], "n_steps must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--eval-every", "-1"], "eval_every must be at least 1, got -1"),
        (["--n-valid", "0"], "n_valid must be at least 1, got 0"),
        (["--lr", "-1"], "lr must be positive, got -1"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--lr", "inf"], "lr"),
        (["--init", "2"], "init must be 'random' or lie between 0 and 1, got 2"),
        (["--init", "half"], "--init must be a number or 'random', not 'half'"),
        (["--n-prompts", "0"], "n_prompts"),
        (["--n-shots", "-1"], "n_shots"),
        (["--n-shots", "1000"], "1000"),
        (["--k", "0"], "k"),
        (["--k", "9"], "8"),  # the model has 8 heads
        (["--draws", "-1"], "draws"),
        (["--n-items", "-3"], "n_items"),
        (["--memory-budget", "lots"], "cannot read 'lots' as a size"),
        (["--memory-budget", "0"], "memory_budget must be a positive number"),
    ],
    ids=words,
)
def test_a_bad_value_is_refused_in_one_line_before_training(
    capsys: pytest.CaptureFixture[str],
    stopped: list[str],
    task_file: str,
    tmp_path: Path,
    options: list[str],
    named: str,
):
    code, out, err = outcome(capsys, "run", task_file, "--n-prompts", "2", "--out", str(tmp_path / "out"), *options)
    assert (code, out) == (1, "")
    assert err.startswith("sitelens: ") and named in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "name at least one task; `sitelens tasks` lists them"),
        (["antonim"], "unknown task 'antonim': did you mean antonym"),
        (["antonym", "antonym"], "the task 'antonym' is given 2 times"),
        (["nowhere.json"], "there is no task file nowhere.json"),
        (["fv/antonym", "--data", "nowhere"], "the data folder nowhere does not exist"),
        (["antonym", "--again", "run.json"], "give tasks and options or --again run.json, not both: tasks"),
        (["--n-steps", "3", "--seed", "1", "--again", "run.json"], "not both: n_steps, seed"),
        (["--again", "nowhere.json"], "there is no file nowhere.json"),
        (["--instruction", "Hm", "--again", "run.json"], "not both: instruction"),
        (["antonym", "--template-arg", "a=1"], "template arguments are for the template 'chat'"),
        (["antonym", "--template-arg", "a"], "--template-arg takes NAME=VALUE, got 'a'"),
        (["antonym", "--template", "{input}"], "the template '{input}' must contain"),
    ],
    ids=words,
)
def test_a_wrong_task_is_refused_in_one_line_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    stopped: list[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
):
    monkeypatch.setattr(sitelens.settings, "data_dir", sitelens.settings.data_dir)  # restored afterwards
    code, out, err = outcome(capsys, "run", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("sitelens: ") and named in err and err.count("\n") == 1
    assert stopped == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "smollm2"], "unknown model 'smollm2': did you mean smollm2-135m?"),
        (["--model", "owner/none"], "the model 'owner/none' could not be loaded"),
        (["--model", "nowhere.gguf"], "there is no file nowhere.gguf"),
        (["--dtype", "float33"], "unknown dtype 'float33'"),
        (["--device", "gpu"], "unknown device 'gpu': there is cpu"),
    ],
    ids=words,
)
def test_a_wrong_model_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], options: list[str], named: str):
    code, out, err = outcome(capsys, "run", "antonym", *options)
    assert (code, out) == (1, "")
    assert err.startswith("sitelens: ") and named in err and err.count("\n") == 1


# Around a command


def test_warnings_are_notes_of_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, stopped: list[str]):
    (tmp_path / "twice.csv").write_text("input,output\n" + "aa,bb\n" * 2 + "ac,bc\nad,bd\n")
    code, _, err = outcome(capsys, "run", str(tmp_path / "twice.csv"), "--n-shots", "1000")
    assert code == 1
    assert [line[:16] for line in err.splitlines()[:-1]] == ["sitelens: note: "]
    assert "'twice': 1 items occur more than once" in err


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sitelens.tasks.list_tasks", interrupted)
    code, out, err = outcome(capsys, "tasks")
    assert (code, out) == (130, "") and err.startswith("sitelens: interrupted; ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["tasks", "models"])
def test_a_reader_that_leaves_early_is_no_error(monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # otherwise nothing is left to write at exit
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "sitelens.cli", command], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, "")


# Compare


def test_compare_prints_a_table_and_writes_figure_numbers_and_origin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    folder, out = tmp_path / "model", tmp_path / "out"
    micro.raw("Llama").save_pretrained(folder)
    micro.tokenizer().save_pretrained(folder)
    task = tmp_path / "shift.json"
    pairs = zip(micro.WORDS[:30], micro.WORDS[1:31], strict=True)
    task.write_text(json.dumps([{"input": a, "output": b} for a, b in pairs]))
    options = ["--methods", "zero-shot", "SITE", "--set", "SITE.n_steps=2", "SITE.n_prompts=2", "SITE.n_shots=2"]
    arguments = ["compare", str(task), *options, "--model", str(folder), "--n-items", "4", "--out", str(out)]
    code, printed, _ = outcome(capsys, *arguments)
    assert code == 0 and "zero-shot" in printed and "SITE" in printed and "seconds to fit" in printed
    assert (out / "comparison.md").read_text() in printed
    rows = (out / "comparison.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[2].startswith("shift,SITE,")
    origin = json.loads((out / "comparison.json").read_text())
    assert origin["made_by"].startswith("sitelens compare") and origin["methods"]["SITE"]["n_steps"] == 2
    assert (out / "comparison.html").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--methods", "LORA"], "LoRA"), (["--set", "LoRA.rank"], "METHOD.FIELD=VALUE"),
     (["--set", "LTV.n_steps=many"], "LTV.n_steps must be a whole number, not 'many'"),
     (["--set", "LTV.step=100"], "LTV has no option 'step': did you mean n_steps"),
     (["--set", "FV.scope=100"], "FV.scope must be 'prompt' or 'generation', not 100"),
     (["--set", "LTV.n_steps=0"], "LTV.n_steps must be at least 1, got 0"),
     (["--set", "SITE.lr=NaN"], "SITE.lr must be positive, got nan"),
     (["--set", "SITE.seed=1"], "SITE has no option 'seed'"),
     (["--set", "LTV=3"], "METHOD.FIELD=VALUE"), (["--set", "ltv.n_steps=3"], "not fitted here")],
)  # fmt: skip
def test_a_wrong_comparison_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], options: list[str], named: str):
    code, _, errors = outcome(capsys, "compare", "antonym", *options)
    assert code == 1 and named in errors and errors.count("\n") == 1


def test_a_suite_stands_for_its_tasks_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def load_task(name: Any) -> Any:
        if name in ("anli/r1", "anli/r3"):
            raise SitelensError(f"{name} could not be loaded")
        return micro.task("anli/r2") if name == "anli/r2" else original(name)

    original = tasks.load_task
    monkeypatch.setattr(tasks, "load_task", load_task)
    chosen, left_out = experiments.tasks_of(["anli", "antonym"])
    assert [task.name for task in chosen] == ["anli/r2", "antonym"]
    assert list(left_out) == ["anli/r1", "anli/r3"] and "could not be loaded" in left_out["anli/r1"]
    assert capsys.readouterr().err.count("left out: anli/r") == 2
