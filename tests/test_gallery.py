"""The figures of figures/ and the commands that make them: each on a tiny model, with its data and provenance."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sitelens as sl
from sitelens.cli import main
from sitelens.methods.site.config import TrainConfig
from sitelens.models import loading
from sitelens.models.model import Bridge
from sitelens.reports import gallery
from sitelens.reports.gallery import make_figures
from sitelens.studies import STUDIES
from sitelens.tasks import builtin
from tests import micro

ROOT = Path(__file__).parents[1]
SMALL = TrainConfig(n_steps=4, eval_every=2, n_valid=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Bridge:
    """Any model is replaced by a micro model."""
    model = micro.bridge("Llama")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(gallery, "load_model", lambda *_, **__: model)
    return model


@pytest.fixture
def task_files(tmp_path: Path) -> list[str]:
    paths = []
    for i, name in enumerate(("one", "two", "three")):
        words = micro.WORDS[20 * i : 20 * i + 60]
        pairs = [{"input": a, "output": b} for a, b in pairwise(words)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(pairs))
        paths.append(str(path))
    return paths


def test_the_figures_name_tasks_that_exist() -> None:
    assert {task for study in STUDIES.values() for task in study.tasks} <= set(builtin.names())


QUICK = ("transfer", "soft-hard", "alpha-histogram", "training-curves")  # the others train for seconds


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]
)
@pytest.mark.filterwarnings("ignore:the shared alpha")
def test_a_figure_is_made_with_its_data_and_its_origin(
    name: str, tiny: Bridge, task_files: list[str], tmp_path: Path
) -> None:
    written = make_figures([name], tmp_path / "out", tasks=task_files, n_items=6, formats=["html"], config=SMALL)
    assert [path.name for path in written] == [f"{name}.{ending}" for ending in ("csv", "json", "html")]
    frame = pd.read_csv(written[0])
    assert len(frame) and frame.notna().any().any()
    record = json.loads(written[1].read_text())
    assert record["made_by"].startswith(f"sitelens figures {name} --n-items 6 --seed 0 --model smollm2-135m --tasks ")
    assert record["model"]["fingerprint"] == sl.fingerprint(tiny)
    assert record["tasks"] == ["one", "two", "three"] and record["n_items"] == 6 and "torch" in record["versions"]


def test_a_wrong_figure_or_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (
            ["figures", "transfers"],
            f"unknown figure 'transfers' (did you mean transfer?); there are: {', '.join(STUDIES)}",
        ),
        (["figures", "transfer", "--tasks", "antonim", "synonym"], "unknown task 'antonim': did you mean antonym"),
        (["transfer", "antonim", "synonym"], "unknown task 'antonim': did you mean antonym"),
        (["transfer", "antonym"], "a transfer matrix needs at least two tasks, got 1"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out"), "--no-progress"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("sitelens: ") and named in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_figures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and study.caption in out for name, study in STUDIES.items())


def test_the_transfer_command_prints_and_writes_the_matrix(
    task_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--n-prompts", "2", "--n-shots", "2", "--n-steps", "3", "--n-items", "5", "--swap", "both"]
    assert main(["transfer", *task_files, *options, "--out", str(out), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    grid = sl.TransferMatrix.load(out / "transfer.safetensors")
    assert list(grid.matrix.columns) == ["one", "two", "three"] and grid.swap == "both" and set(grid.n) == {5}
    for name, row in (100 * grid.matrix).round().astype(int).iterrows():
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert [int(value) for value in line.split()[1:]] == row.tolist()
    assert "zero-shot" in printed
    assert {path.name for path in out.iterdir()} == {
        "transfer.csv", "transfer-summary.csv", "transfer.md", "transfer.tex", "transfer.json", "transfer.html",
        "transfer.safetensors", "plotly.min.js",
    }  # fmt: skip
    record: dict[str, Any] = json.loads((out / "transfer.json").read_text())
    assert record["train"]["n_steps"] == 3 and "--swap both" in record["made_by"]


def test_the_committed_figures_have_their_data_and_their_origin() -> None:
    for name in STUDIES:
        for ending in ("png", "svg", "csv", "json"):
            assert (ROOT / "figures" / f"{name}.{ending}").exists(), name
        record = json.loads((ROOT / "figures" / f"{name}.json").read_text())
        assert record["made_by"].startswith(f"sitelens figures {name} ")
        assert record["model"]["fingerprint"] == "9757a0c2bc68fad61e30b018e376786e"
