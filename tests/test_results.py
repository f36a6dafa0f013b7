"""Every result has the same interface: frame, summary, tables, figure, save and load, for any names in it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import sitelens as sl
from sitelens.checks.frames import Column, packed_frame, unpacked_frame
from sitelens.errors import SitelensError
from sitelens.evaluation.result import Result
from sitelens.evaluation.tables import Table, format_interval
from sitelens.files.writing import file_name
from sitelens.models.provenance import Origin
from sitelens.store.artifact import Artifact
from tests.test_hostile_names import NAMES, RUN

RECORD: dict[str, Any] = {"made_by": "sl.function", "tasks": list(NAMES), "seed": 0, "model": {"name": NAMES[1]}}


def answers(conditions: tuple[str, ...]) -> pd.DataFrame:
    """Four answers per task and condition."""
    rows = [
        {"item": item, "score": (item + place) % 2, "task": task, "condition": condition, "metric": "first_token",
         "seed": 0, "training_seed": 0, "model": NAMES[1]}
        for place, task in enumerate(NAMES) for condition in conditions for item in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def comparison() -> sl.Comparison:
    scores = answers(NAMES[:2])
    means = sl.summarize(scores).rename(columns={"condition": "method", "mean": "accuracy"})
    costs = {"trained": 3, "forward_tokens": 40, "backward_tokens": 0, "fit_seconds": 1.5, "seconds_per_prompt": 0.25}
    frame = means.drop(columns=["metric", "interval"]).assign(**costs, model=NAMES[1])
    return sl.Comparison(frame, scores, RECORD)


def suite() -> sl.SuiteResult:
    groups = dict(zip(NAMES, (NAMES[0], NAMES[0], NAMES[1], NAMES[1]), strict=True))
    scores = answers((*NAMES[:2], "SITE"))
    scores.insert(1, "group", scores["task"].map(groups))
    rows = [
        {"task": task, "group": groups[task], "train": 5, "valid": 2, "test": 4, "dropped": 0, "shared": 0.25,
         "note": NAMES[2], "digest": "ab"}
        for task in NAMES
    ]  # fmt: skip
    return sl.SuiteResult("bbh", scores, pd.DataFrame(rows), {NAMES[3]: NAMES[0]}, record=RECORD)


def transfer() -> sl.TransferMatrix:
    matrix = pd.DataFrame([[0.5 + 0.1 * (i == j) - 0.04 * i for j in range(4)] for i in range(4)], NAMES, NAMES)
    zero_shot, n = pd.Series([0.1, 0.2, 0.58, 0.0], NAMES), pd.Series([4, 4, 4, 3], NAMES)
    return sl.TransferMatrix(matrix, zero_shot, n, "both", "first_token", NAMES[1], {NAMES[0]: NAMES[1]}, None, RECORD)


def similarity() -> sl.HeadSimilarity:
    pairs = [(a, b, i, 1) for place, a in enumerate(NAMES) for b in NAMES[place:] for i in range(1 + (a != b))]
    rows = [{"measure": measure, "a": a, "b": b, "seed_a": i, "seed_b": j, "similarity": 0.5 + 0.1 * i}
            for measure in ("pearson", "spearman", "jaccard") for a, b, i, j in pairs]  # fmt: skip
    floor = [{"measure": row["measure"], "permuted": permuted, "similarity": 0.1}
             for row in rows[::5] for permuted in ("heads", "within layers")]  # fmt: skip
    k: dict[str, int] = dict.fromkeys(NAMES, 3)
    return sl.HeadSimilarity(pd.DataFrame(rows), pd.DataFrame(floor), NAMES, k, NAMES[1], {NAMES[0]: NAMES[1]}, RECORD)


def verification() -> sl.Verification:
    results, errors = ("ok", "ok", "fails", "not supported"), (1e-5, 0.0, 0.1, float("nan"))
    rows = [(*row, 1e-4, NAMES[0]) for row in zip(NAMES, results, errors, strict=True)]
    frame = pd.DataFrame(rows, columns=["check", "result", "error", "limit", "detail"])
    return sl.Verification(NAMES[1], frame, RECORD)


@functools.cache
def report() -> sl.RunReport:
    """Two small tasks, one of which has the same name as the table."""
    config = sl.RunConfig(tasks=("one", "two"), n_prompts=2, n_shots=1, n_items=3, draws=2, k=1, model=NAMES[1])
    frames = [answers(("SITE", "hard", "random")).assign(metric=metric) for metric in ("first_token", "exact_match")]
    scores = pd.concat(frames, ignore_index=True).assign(draw=pd.array([None] * (2 * len(frames[0])), "Int64"))
    scores["task"] = scores["task"].replace(dict(zip(NAMES, ("table", *NAMES[1:]), strict=True)))
    names = list(scores["task"].unique())
    frame = sl.summarize(scores).assign(spread=float("nan"))
    origin, alpha = Origin(model=NAMES[1]), torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "valid_loss": [float("nan"), 1.5],
                            "mean_alpha": 0.5, "fraction_saturated": 0.25})  # fmt: skip
    results = {name: sl.TrainResult(sl.HeadSelection(alpha, name, "ab", "given", origin), history, sl.TrainConfig())
               for name in names}  # fmt: skip
    embeddings = {name: sl.TaskEmbedding(torch.ones(2, 2, 3), name, "ab", 2, 1, 0, origin) for name in names}
    return sl.RunReport(config, embeddings, results, scores, frame, {"training": 1.5}, RECORD)


RESULTS: dict[str, Callable[[], Result]] = {
    "Comparison": comparison, "SuiteResult": suite, "TransferMatrix": transfer,
    "HeadSimilarity": similarity, "Verification": verification, "RunReport": report,
}  # fmt: skip


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest) -> Result:
    return RESULTS[request.param]()


class Page(HTMLParser):
    """The tags and texts in a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[Any] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_result_is_tried() -> None:
    classes = {
        name for name in sl.__all__ if isinstance(getattr(sl, name), type) and issubclass(getattr(sl, name), Result)
    }
    assert set(RESULTS) == classes


def test_a_frame_is_tidy(result: Result) -> None:
    for frame in (result.frame, result.summary()):
        assert isinstance(frame, pd.DataFrame) and len(frame) and list(frame.index) == list(range(len(frame)))
        assert all(isinstance(name, str) for name in frame.columns) and frame.columns.is_unique
        assert not any(isinstance(cell, list | dict) for cell in frame.to_numpy().ravel())
    assert len(result.summary()) <= len(result.frame)


def test_a_notebook_shows_the_tables_and_no_markup_of_names(result: Result) -> None:
    page = Page(result._repr_html_())  # type: ignore[operator]
    assert set(page.tags) <= {"div", "p", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes == [] and page.tags.count("table") == len(result.tables()) > 0
    assert all(table.caption in page.text for table in result.tables())


def test_a_repr_is_one_short_line(result: Result) -> None:
    text = repr(result)
    assert text.startswith(f"{type(result).__name__}(") and text.isprintable() and "tensor(" not in text


def test_latex_and_markdown_hold_the_cells(result: Result) -> None:
    markdown, latex = result.markdown(), result.latex()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == len(result.tables())
    assert ("<img" not in markdown and RUN not in latex.replace(r"'", "")) or "<" not in latex
    for table in result.tables():
        for text in (latex, markdown):
            assert sum(line.count(" & ") + line.count(" | ") > 0 for line in text.splitlines()) >= len(table.cells)
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert all(line.lstrip()[0] not in "[*" for line in lines)


def test_a_figure_is_ours(result: Result) -> None:
    figure: Any = result.figure("Title")
    assert isinstance(result.figure(), go.Figure)
    assert figure.layout.title.text == "Title" and len(figure.data)


def test_everything_is_saved_under_one_name(result: Result, tmp_path: Path) -> None:
    paths = result.save(tmp_path / "out", command="sitelens it", facts={"left_out": {}})
    assert {path.name for path in paths} | {"plotly.min.js"} == {path.name for path in (tmp_path / "out").iterdir()}
    endings = {"".join(path.suffixes) for path in paths}
    assert {".csv", ".md", ".tex", ".json", ".html"} <= endings
    [record] = [json.loads(path.read_text()) for path in paths if path.suffix == ".json"]
    assert record["made_by"] == "sitelens it" and record["left_out"] == {}
    with pytest.raises(SitelensError, match="unknown format 'bmp'"):
        result.save(tmp_path / "other", ["bmp"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    result = RESULTS[name]()
    result.save(tmp_path, formats=[])
    again = type(result).load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, result.frame, check_exact=True)
    pd.testing.assert_frame_equal(again.summary(), result.summary(), check_exact=True)
    assert again.record == result.record and again.markdown() == result.markdown() and repr(again) == repr(result)
    assert repr(type(result).load(tmp_path / f"{result.default_name}.safetensors")) == repr(result)
    with pytest.raises(SitelensError, match="there is no nothing in the folder"):
        type(result).load(tmp_path, "nothing")
    result.artifact().save(tmp_path / f"{result.default_name}-2.safetensors")
    with pytest.raises(SitelensError, match=f"holds several, say which as name: .*{result.default_name}-2"):
        type(result).load(tmp_path)
    assert repr(type(result).load(tmp_path, result.default_name)) == repr(result)


def test_a_saved_result_without_a_column_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    sound = comparison()
    broken = sl.Comparison(sound.frame.drop(columns="trained"), sound.scores)
    path = broken.artifact().save(tmp_path / "comparison.safetensors")
    with pytest.raises(SitelensError, match="the frame has no column trained"):
        sl.Comparison.load(path)
    Artifact("suite", {}, {}).save(path)
    with pytest.raises(SitelensError, match="holds a suite, not a comparison"):
        sl.Comparison.load(tmp_path)


def test_a_loaded_run_has_its_selections_and_histories(tmp_path: Path) -> None:
    result = report()
    paths = result.save(tmp_path)
    assert len({path.name.casefold() for path in paths}) == len(paths) and (tmp_path / "table.html").exists()
    again = sl.RunReport.load(tmp_path)
    assert (again.config, again.seconds, again.n_items) == (result.config, result.seconds, result.n_items)
    pd.testing.assert_frame_equal(again.scores, result.scores)
    assert list(again.results) == list(result.results)
    for name, trained in result.results.items():
        assert torch.equal(again.results[name].selection.alpha, trained.selection.alpha)
        assert torch.equal(again.embeddings[name].mean_z, result.embeddings[name].mean_z)
        pd.testing.assert_frame_equal(again.results[name].history, trained.history)
    (tmp_path / f"{file_name(NAMES[1])}.selection.safetensors").unlink()
    with pytest.raises(SitelensError, match="there is no file"):
        sl.RunReport.load(tmp_path)


# Frames


def test_a_frame_comes_back_to_the_bit() -> None:
    frame = pd.DataFrame({
        "task": ["=1", None, "NA"], "x": [0.1, float("nan"), 1e-300], "n": [1, 2, -3], "ok": [True, False, True],
        "draw": pd.array([1, None, 2], "Int64"), "none": [None, None, None], "1": ["1", "2", "\ud800"[:0]],
    })  # fmt: skip
    tensors, columns = packed_frame(frame)
    again = unpacked_frame([Column(**column) for column in json.loads(json.dumps(columns))], tensors, "it")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"type": "int64"}, "must be a tensor of int64"), ({"values": [1.0]}, "must be a tensor of float64"),
     ({"type": "text"}, "must be a list of text"), ({"type": "bool", "values": [1]}, "must be a list of bool"),
     ({"name": "n"}, "stands twice")],
)  # fmt: skip
def test_a_frame_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    tensors, columns = packed_frame(pd.DataFrame({"x": [0.5], "n": [2]}))
    with pytest.raises(SitelensError, match=f"it: the column .*{message}"):
        unpacked_frame([Column(**{**columns[0], **change}), Column(**columns[1])], tensors, "it")
    with pytest.raises(SitelensError, match="one length, and no tensor stands alone"):
        unpacked_frame([Column(**columns[0])], tensors, "it")


# Tables


def test_an_interval_is_written_one_way() -> None:
    row = {"mean": 0.934, "low": 0.86, "high": 0.97}
    assert format_interval(row) == "93 [86, 97]" and format_interval(row, 1) == "93.4 [86.0, 97.0]"
    assert format_interval({**row, "tasks_low": 0.5, "tasks_high": 1.0}) == "93 [86, 97] [50, 100]"
    assert format_interval({**row, "tasks_low": float("nan"), "spread": 0.03}) == "93 [86, 97] ±3"


def test_a_latex_table_is_ready_for_a_paper() -> None:
    cells = pd.DataFrame({"zero-shot": ["1 [0, 2]", None]}, ["[a]_b", "c&d"]).rename_axis("task")
    assert Table(cells, "5% of R&D.", "A note.").latex("tab:x y") == "\n".join([
        r"\begin{table}", r"  \centering", r"  \caption{5\% of R\&D.}", r"  \label{tab:xy}",
        r"  \begin{tabular}{lr}", r"  \toprule", r"  task & zero-shot \\", r"  \midrule",
        r"  {}[a]\_b & 1 [0, 2] \\", r"  c\&d &  \\", r"  \bottomrule", r"  \end{tabular}",
        r"  \par\smallskip{\footnotesize A note.\par}", r"\end{table}",
    ])  # fmt: skip
    wide = pd.DataFrame({str(i): ["x"] for i in range(7)}, ["a"])
    assert Table(wide).latex().startswith(r"\begin{table*}")
