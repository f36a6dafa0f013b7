"""Commands check outputs and tools before computing, and lose no results to a file that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sitelens as sl
from sitelens.cli import main
from sitelens.evaluation.tables import Table
from sitelens.files import writing
from sitelens.files.escaping import text_of_csv
from sitelens.files.writing import MissingOutputWarning, file_name
from sitelens.models import loading
from sitelens.reports import gallery
from sitelens.reports.run import RunConfig, RunReport, run
from tests import micro

SMALL = ["--n-prompts", "2", "--n-shots", "1", "--n-steps", "2", "--n-items", "2", "--draws", "1", "--k", "1"]
ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any model is replaced by a micro model. Lists the requested models."""
    names: list[Any] = []

    def load_model(name: Any = None, **_: Any) -> Any:
        names.append(name)
        return micro.bridge("Llama")

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr(gallery, "load_model", load_model)
    return names


def task_file(folder: Path, name: str, stem: str = "task") -> str:
    items = [{"input": item.input, "output": item.output} for item in micro.task().train]
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({"name": name, "examples": items}))
    return str(path)


def no_chrome(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(folder / "none"))


# Before the work


@pytest.mark.parametrize("command", ["run", "transfer", "compare", "suite", "figures"])
@pytest.mark.parametrize("out", ["file", "file/sub", "x" * 300])
def test_an_output_folder_that_cannot_be_is_refused_before_a_model_is_loaded(
    command: str, out: str, tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    tasks = {"suite": ["fv57"], "figures": ["mixing"]}.get(command, ["antonym", "synonym"])
    assert main([command, *tasks, "--out", str(tmp_path / out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sitelens: cannot write to the folder") and error.count("\n") == 1 and asked == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x" * 300, "con"])
@pytest.mark.parametrize("command", [["transfer", "antonym", "synonym"], ["suite", "fv57"]], ids=lambda words: words[0])
def test_a_name_that_is_no_file_name_is_refused_before_a_model_is_loaded(
    command: list[str], name: str, tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, f"--name={name}", "--out", str(tmp_path / "out")]) == 1
    assert "--name must be a plain file name" in capsys.readouterr().err
    assert asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--quantize", "nf5"], ["--device", "cuda:77"]], ids=lambda words: words[0])
def test_a_device_or_packing_that_is_not_there_is_refused_before_a_model_is_loaded(
    options: list[str], asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "antonym", *options]) == 1
    assert options[1] in capsys.readouterr().err and asked == []


# After the work


def test_what_needs_no_missing_tool_is_made_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_chrome(tmp_path, monkeypatch)
    out = tmp_path / "out"
    code = main(["run", task_file(tmp_path, "t"), *SMALL, "--out", str(out), "--formats", "pdf", "html"])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "Chrome" in line]
    assert code == 1 and "zero-shot" in printed.out
    assert lines[0].startswith("sitelens: note: pdf needs Chrome or Chromium") and lines[0].endswith(
        "all else is written"
    )
    assert (
        lines[1].startswith(f"sitelens: note: not everything was written to {out}: t.pdf, table.pdf needs Chrome")
        and len(lines) == 2
    )
    names = {"t.html", "t.selection.safetensors", "t.embedding.safetensors", "scores.csv", "summary.csv"}
    names |= {"run.safetensors", "table.html"}
    assert {path.name for path in out.iterdir()} == {*names, "table.md", "table.tex", "run.json", "plotly.min.js"}
    assert set(json.loads((out / "run.json").read_text())["files"]) == names


@pytest.mark.parametrize("command", ["run", "transfer", "compare"])
def test_a_full_disk_after_the_work_costs_no_result(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write, checked = writing.write_bytes, []

    def fail(path: Path, data: bytes) -> Path:
        if checked and str(path).startswith(str(out)):
            raise ENOSPC
        checked.append(path)
        return write(path, data)

    for place in ("sitelens.files.writing", "sitelens.store.artifact", "sitelens.figures.saving"):
        monkeypatch.setattr(f"{place}.write_bytes", fail)
    files = [task_file(tmp_path, name, name) for name in ("one", "two")]
    options = {"compare": ["--methods", "zero-shot", "--n-items", "2"], "transfer": SMALL[:-4]}.get(command, SMALL)
    assert main([command, *files, *options, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "zero-shot" in printed.out and str(out) not in printed.out
    error = printed.err.splitlines()[-1]
    assert error.startswith(f"sitelens: nothing was written to {out}: ") and "cannot be written: No space left" in error
    assert f"what was computed is in the cache ({sl.settings.cache()})" in error and "Traceback" not in printed.err
    assert not out.exists() or list(out.iterdir()) == []


def test_figures_go_on_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise sl.SitelensError("not today")

    def data(*_: Any, **__: Any) -> Any:
        return pd.DataFrame({"a": [1]})

    def plot(_: Any) -> Any:
        return sl.figures.alpha_heatmap(pd.DataFrame([[0.5]]).to_numpy())

    studies = {"first": sl.Study("first", "", fail, plot), "second": sl.Study("second", "", data, plot)}
    monkeypatch.setattr(gallery, "STUDIES", studies)
    no_chrome(tmp_path, monkeypatch)
    out = tmp_path / "out"
    assert main(["figures", "--out", str(out), "--formats", "svg", "html"]) == 1
    printed = capsys.readouterr()
    names = ["second.csv", "second.html", "second.json"]
    assert sorted(Path(line).name for line in printed.out.splitlines()) == names
    last = printed.err.splitlines()[-1]
    assert "first could not be made: not today; second.svg needs Chrome" in last
    assert {path.name for path in out.iterdir()} == {*names, "plotly.min.js"}
    assert main(["figures", "first", "--out", str(out)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sitelens: not today"


def test_formats_and_folders_are_checked_by_the_library(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match="unknown format 'bmp'"):
        gallery.make_figures(["mixing"], tmp_path / "out", "no/model", formats=["bmp"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(sl.SitelensError, match="cannot write to the folder"):
        gallery.make_figures(["mixing"], f"{__file__}/x", "no/model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_cannot_be_printed_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sitelens.cli", "tasks", "--built-in", "--names"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "sitelens: No space left on device\n")


# Names of tasks

NAMES = [
    "../../etc/x",
    "x" * 300,
    'x"><img src=q onerror=alert(1)>',
    "Task",
    "task",
    "=1+1",
    "a|b",
    "run",
    "\x1b[2Ja\nb",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    folder = tmp_path_factory.mktemp("tasks")
    files = tuple(task_file(folder, name, f"t{i}") for i, name in enumerate(NAMES))
    train = sl.TrainConfig(n_steps=2, eval_every=2, n_valid=2)
    config = RunConfig(tasks=files, n_prompts=2, n_shots=1, n_items=2, draws=1, k=1, train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SitelensWarning)
        return run(config, micro.bridge("Llama"))


def test_every_task_has_its_files_in_the_folder(report: RunReport, tmp_path: Path) -> None:
    paths = report.save(tmp_path / "in" / "out")
    assert all(path.parent == tmp_path / "in" / "out" and path.exists() for path in paths)
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["in", "out"]
    selections = [path for path in paths if path.name.endswith("selection.safetensors")]
    assert [sl.HeadSelection.load(path).task for path in selections] == NAMES
    assert len({path.name.casefold() for path in paths}) == len(paths)
    assert (tmp_path / "in" / "out" / "run.html").exists() and (tmp_path / "in" / "out" / "run.json").exists()
    page = (tmp_path / "in" / "out" / f"{file_name(NAMES[2])}.html").read_text()
    assert "<img" not in page and "&lt;img src=q onerror=alert(1)&gt;" in page
    names = pd.read_csv(tmp_path / "in" / "out" / "summary.csv")["task"]
    assert list(dict.fromkeys(map(text_of_csv, names))) == NAMES and "'=1+1" in set(names)


def test_tables_show_names_as_they_are(report: RunReport) -> None:
    table, markdown = report.text(), report.markdown()
    assert table.replace("\n", "").isprintable() and r"\x1b[2Ja\nb" in table
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == len(NAMES) + 2 and len({line.replace(r"\|", "").count("|") for line in rows}) == 1
    assert "<img" not in markdown and r"| a\|b |" in markdown


def test_a_markdown_table_keeps_its_shape() -> None:
    cells = pd.DataFrame({"a|b": ["1 [0, 2]", None]}, ["<b>", "c\nd"]).rename_axis("task")
    assert Table(cells).markdown() == ("| task | a\\|b |\n| --- | --- |\n| &lt;b> | 1 [0, 2] |\n| c\\\\nd |  |")


def test_a_picture_that_fails_is_a_warning_and_all_else_is_written(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_chrome(tmp_path, monkeypatch)
    with pytest.warns(MissingOutputWarning, match=r"not everything .*\.png.* needs Chrome"):
        paths = report.save(tmp_path / "out", ("png",))
    assert {path.name for path in paths} >= {"scores.csv", "summary.csv", "table.md", "run.json"}
    with pytest.raises(sl.SitelensError, match="unknown format 'bmp'"):
        report.save(tmp_path / "other", ("bmp",))
    assert not (tmp_path / "other").exists()
