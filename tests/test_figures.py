"""Figures: what they show, and how they are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

import sitelens as sl
from sitelens import figures
from sitelens.figures import style
from sitelens.tasks.function_vectors import FILES

needs_chrome = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))), reason="no Chrome or Chromium is installed"
)


@pytest.mark.parametrize("shape", [(2, 4), (30, 9), (80, 64)])
def test_heatmap_cells_stand_where_they_belong(shape: tuple[int, int]) -> None:
    alpha = np.random.default_rng(0).random(shape)
    figure = figures.alpha_heatmap(alpha, "title")
    (trace,) = figure.data
    assert np.array_equal(trace.z, alpha) and (trace.zmin, trace.zmax) == (0, 1)
    assert (layout_of(figure).xaxis.title.text, layout_of(figure).yaxis.title.text) == ("Head", "Layer")
    assert max(layout_of(figure).width, layout_of(figure).height) < 1200
    for word in ("layer", "head", "alpha"):
        assert word in trace.hovertemplate


def test_html_shares_one_plotly_js_a_directory(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        sl.figures.save(figures.alpha_heatmap(np.zeros((2, 2))), tmp_path / "new" / name)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.html", "b.html", "plotly.min.js"}
    assert (tmp_path / "new" / "a.html").stat().st_size < 50_000


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match=r"end it in .html, .png, .svg, .pdf"):
        figures.save(figures.alpha_heatmap(np.zeros((2, 2))), tmp_path / "a.bmp")


def test_a_missing_chrome_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.alpha_heatmap(np.zeros((2, 2)))

    class ChromeNotFoundError(RuntimeError):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ChromeNotFoundError("not here")

    monkeypatch.setattr(type(figure), "write_image", fail)
    with pytest.raises(sl.SitelensError, match=r"needs Chrome or Chromium.*write .html instead"):
        figures.save(figure, tmp_path / "a.png")


@needs_chrome
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_static_files_are_written(ending: str, start: bytes, tmp_path: Path) -> None:
    path = figures.save(figures.alpha_heatmap(np.eye(3)), tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(start)


def layout_of(figure: go.Figure) -> Any:
    """The layout of a figure, which plotly does not type."""
    return figure.layout


FOUR = ("antonym", "country-capital", "capitalize", "choose_first_of_3")
ALL = tuple(f"fv/{name}" for name in sorted(FILES.registry))
ACCURACY = "First-token accuracy"
LOSS = "Cross-entropy (nats)"
# The eight colors of Okabe and Ito, with yellow, which is hard to see on white, replaced by an olive of Tol's palette.
SAFE = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933"}


def rows(**values: Sequence[Any]) -> pd.DataFrame:
    """All combinations, with distinct plausible values."""
    frame = pd.DataFrame(list(product(*values.values())), columns=list(values))
    mean = np.random.default_rng(0).permutation(np.linspace(0, 1, len(frame)))
    low, high = np.clip(mean - 0.06, 0, 1), np.clip(mean + 0.05, 0, 1)
    return frame.assign(mean=mean, low=low, high=high, n=100, loss=3 * mean[::-1] + 0.2)


def soft_hard(tasks: Sequence[str]) -> pd.DataFrame:
    return rows(task=tasks, threshold=(0.1, 0.5, 0.9)).assign(soft=lambda frame: 1 - frame["mean"], n_heads=3)


def random_heads(tasks: Sequence[str]) -> pd.DataFrame:
    drawn = rows(task=tasks, heads=["random"], k=range(0, 271, 30), draw=range(3))
    return pd.concat([drawn, rows(task=tasks, heads=["high-alpha"], k=range(0, 271, 30), draw=[0])])


def histories(tasks: Sequence[str]) -> pd.DataFrame:
    frame = rows(task=tasks, step=range(1, 9))
    return frame.assign(valid_loss=frame["loss"].where(frame["step"] % 4 == 0))[["task", "step", "valid_loss"]]


def pairs_of(tasks: Sequence[str]) -> pd.DataFrame:
    """A frame of shared_attention: distances by group, each head under two roles."""
    pairs = list(pairwise(tasks))
    frame = rows(pair=pairs, layer=range(4), head=range(5), role=("query", "template"))
    groups = ("both", "only a", "only b", "neither")
    group = ((frame["layer"] + frame["head"]) % 4).map(dict(enumerate(groups)))
    named = frame.assign(task_a=frame["pair"].str[0], task_b=frame["pair"].str[1], group=group)
    return named.assign(distance=named["layer"] / 4 + named["head"] / 20).drop(columns=["pair", "mean", "low", "high"])


Point = tuple[str, str, float, float]  # panel or line, name, x, y


@dataclass(frozen=True)
class Case:
    """A figure, a frame for it, and the points it must show: (panel or line, name, x, y)."""

    draw: Callable[..., go.Figure]
    frame: Callable[[Sequence[str]], pd.DataFrame]
    points: Callable[[pd.DataFrame], list[Point]]
    axes: tuple[str, str | None]
    share: bool = True


def each(x: str, y: str, *name: str, suffix: str = "") -> Callable[[pd.DataFrame], list[Point]]:
    """A function that gives one point per row, named by the values of some columns."""

    def points(frame: pd.DataFrame) -> list[Point]:
        return [
            (row.get("task", ""), ", ".join(f"{row[part]}{suffix}" for part in name), row[x], row[y])
            for row in frame.to_dict("records")
        ]

    return points


def dotted(*name: str, x: str = "mean", prefix: str = "") -> Callable[[pd.DataFrame], list[Point]]:
    def points(frame: pd.DataFrame) -> list[Point]:
        return [
            (row["task"], prefix + ", ".join(str(row[part]) for part in name), row[x], 0.0)
            for row in frame.to_dict("records")
        ]

    return points


def _soft_hard(frame: pd.DataFrame) -> list[Point]:
    return [
        (row["task"], name, row["threshold"], row[column])
        for row in frame.to_dict("records")
        for name, column in (("hard", "mean"), ("soft", "soft"))
    ]


def _random_heads(frame: pd.DataFrame) -> list[Point]:
    names = {"random": "random (mean and range of 3 draws)", "high-alpha": "high-alpha"}
    means = frame.groupby(["task", "heads", "k"], sort=False)["mean"].mean()
    return [(task, names[heads], k, mean) for (task, heads, k), mean in means.items()]  # type: ignore[misc]


def _mixing(frame: pd.DataFrame) -> list[Point]:
    return dotted("kind")(frame.assign(kind=[f"{row.mixing}, {'hard' if row.hard else 'soft'}"
                                             for row in frame.itertuples()]))  # fmt: skip


def _shared_attention(frame: pd.DataFrame) -> list[Point]:
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for row in frame.to_dict("records"):
        group = {"only a": "one", "only b": "one"}.get(row["group"], row["group"])
        heads = found.setdefault((f"{row['task_a']}, {row['task_b']}", f"selected by {group}"), {})
        heads[row["layer"], row["head"]] = row["distance"]
    return [(pair, group, sum(heads.values()) / len(heads), 0.0) for (pair, group), heads in found.items()]


STEPS = (25, 50, 400)
BINS = [0.025 + i / 20 for i in range(20)]
CASES: dict[str, Case] = {
    "soft_hard": Case(figures.soft_hard, soft_hard, _soft_hard, ("Threshold on alpha", ACCURACY)),
    "random_heads": Case(figures.random_heads, random_heads, _random_heads, ("Number of heads patched", ACCURACY)),
    "head_counts": Case(
        figures.head_counts,
        lambda t: rows(task=t, order=("high-alpha", "low-alpha"), change=("added", "removed"), k=range(0, 271, 30)),
        lambda f: each("k", "mean", "first", "change")(f.assign(first=f["order"] + " first")),
        ("Number of heads added or removed", ACCURACY),
    ),
    "task_agnostic": Case(
        figures.task_agnostic,
        lambda t: rows(task=t, condition=("zero-shot", "10-shot", "own alpha", "shared alpha", "mean alpha")),
        dotted("condition"), (ACCURACY, None),
    ),
    "mixing": Case(
        figures.mixing, lambda t: rows(task=t, mixing=("convex", "additive"), hard=(False, True)), _mixing,
        (ACCURACY, None),
    ),
    "prompt_counts": Case(
        figures.prompt_counts, lambda t: rows(task=t, n_prompts=(1, 3, 5, 10, 50), n_shots=(1, 2, 10)),
        lambda f: each("n_prompts", "mean", "name")(
            f.assign(name=f["n_shots"].map({1: "1 shot", 2: "2 shots", 10: "10 shots"}))
        ),
        ("Number of prompts in the embedding (M)", ACCURACY),
    ),
    "seed_variance": Case(
        figures.seed_variance, lambda t: rows(task=t, prompt_seed=range(5), training_seed=range(3)),
        dotted("prompt_seed", prefix="prompt seed "), (f"{ACCURACY} (one dot per training seed)", None),
    ),
    "initializations": Case(
        figures.initializations, lambda t: rows(task=t, init=("0.1", "0.5", "0.9", "random"), seed=(0, 1)),
        dotted("init", prefix="init "), (f"{ACCURACY} (one dot per seed)", None),
    ),
    "initialization_distances": Case(
        figures.initialization_distances,
        lambda t: rows(task=t, pair=("same init", "same seed", "both differ"), i=range(4))
        .rename(columns={"mean": "distance"}).drop(columns=["low", "high"]),
        dotted("pair", x="distance"), ("Mean absolute difference of alpha", None), share=False,
    ),
    "loss_path": Case(
        figures.loss_path,
        lambda t: rows(path=[f"{name}, to another seed" for name in t[:4]], position=(0.0, 0.5, 1.0)),
        each("position", "loss", "path"), ("Interpolation between the two solutions", LOSS), share=False,
    ),
    "checkpoints": Case(
        figures.checkpoints, lambda t: rows(task=t, checkpoint=("best", "last")), dotted("checkpoint"),
        (ACCURACY, None),
    ),
    "alpha_distribution": Case(
        figures.alpha_distribution, lambda t: rows(task=t, alpha=BINS).rename(columns={"mean": "share"}),
        each("alpha", "share"), ("alpha", "Share of heads"), share=False,
    ),
    "alpha_distribution by layer": Case(
        figures.alpha_distribution, lambda t: rows(task=t, layer=range(30))[["task", "layer", "mean"]].assign(
            on=lambda f: f["mean"], binary=0.9),
        each("layer", "on"), ("Layer", "Share of heads with alpha > 0.5"),
    ),
    "alpha_distribution by step": Case(
        figures.alpha_distribution,
        lambda t: rows(step=STEPS, task=t, alpha=BINS)[["step", "task", "alpha", "mean"]].rename(
            columns={"mean": "share"}),
        lambda f: each("alpha", "share", "name")(f.assign(name="step " + f["step"].astype(str))),
        ("alpha", "Share of heads"), share=False,
    ),
    "training_curves": Case(
        figures.training_curves, histories,
        lambda f: each("step", "valid_loss", *["task"] * (f["task"].nunique() < 9))(f.dropna()),
        ("Step", "Validation cross-entropy (nats)"), share=False,
    ),
    "costs": Case(
        figures.costs,
        lambda t: rows(method=("zero-shot", "10-shot", "SITE, prepared", "SITE"), prompts=(1, 10, 300)).rename(
            columns={"loss": "seconds"})[["method", "prompts", "seconds"]],
        each("prompts", "seconds", "method"), ("Prompts answered", "Seconds"), share=False,
    ),
    "head_overlap": Case(
        figures.head_overlap,
        lambda t: rows(task=t, kind=("induction", "previous token", "function vector")).rename(
            columns={"mean": "auc"}).drop(columns=["low", "high"]),
        dotted("kind", x="auc"), ("AUC for alpha > 0.5", None),
    ),
    "shared_attention": Case(
        figures.shared_attention, pairs_of, _shared_attention,
        ("Total variation between attention on the two tasks' prompts: mean over heads, "
         "with 1.96 standard errors", None),
        share=False,
    ),
}  # fmt: skip


def shown(figure: go.Figure) -> Iterator[tuple[str, Any]]:
    """Every trace except bands and trees, with the title of its panel."""
    titles = [a.text for a in layout_of(figure).annotations or () if a.text]
    for trace in figure.data:
        if trace.hoverinfo != "skip":
            panel = int((trace.xaxis or "x")[1:] or 1) - 1
            yield (titles[panel] if len(titles) > 2 else ""), trace


def points_shown(figure: go.Figure) -> list[Point]:
    """The points that a figure shows, in the format of a Case."""
    names = layout_of(figure).yaxis.ticktext
    found = []
    for panel, trace in shown(figure):
        for x, y in zip(trace.x, trace.y, strict=True):
            if names:  # dots: one row per task, with a small shift per condition
                assert abs(y - round(y)) < 0.5
                found.append((names[round(y)], trace.name, x, 0.0))
            else:
                found.append((panel, trace.name or "", x, y))
    return found


def assert_same(found: list[Point], expected: list[Point], panels: bool) -> None:
    found, expected = (
        sorted((place if panels else "", name, round(float(x), 9), round(float(y), 9)) for place, name, x, y in points)
        for points in (found, expected)
    )
    assert found == expected


def axis_titles(figure: go.Figure) -> tuple[str | None, str | None]:
    """The axis titles of a single plot, or the common ones of all panels."""
    own = layout_of(figure).xaxis.title.text, layout_of(figure).yaxis.title.text
    texts = [a.text for a in layout_of(figure).annotations or ()][-2:]
    x, y = texts if len(texts) == 2 else own
    return x.replace("<br>", " "), y


@pytest.mark.parametrize("tasks", [FOUR, FOUR[:1], (*FOUR, "synonym"), ALL], ids=["four", "one", "five", "all"])
@pytest.mark.parametrize("name", CASES)
def test_a_figure_shows_the_numbers_of_its_study(name: str, tasks: tuple[str, ...]) -> None:
    if name == "shared_attention" and len(tasks) == 1:
        tasks = FOUR[:2]
    case = CASES[name]
    frame = case.frame(tasks)
    before = frame.copy()
    figure = case.draw(frame, "A title")
    pd.testing.assert_frame_equal(frame, before)
    panels = not (name in ("loss_path", "costs") or (name == "training_curves" and len(tasks) < 9))
    assert_same(points_shown(figure), case.points(frame), panels)
    assert axis_titles(figure) == case.axes
    layout = layout_of(figure)
    assert layout.template.layout.font.family.startswith("Arial") and layout.title.text == "A title"
    assert figures.SINGLE <= layout.width <= figures.DOUBLE + 60
    assert layout.height <= 1250 and (len(tasks) > 5 or layout.height <= 560)
    sizes = [value for path, value in leaves(figure.to_plotly_json()["layout"]) if path[-2:] == ("font", "size")]
    sizes += [value for path, value in leaves(figure.to_plotly_json()["layout"]) if path[-2:] == ("tickfont", "size")]
    assert sizes and min(sizes) >= 7
    values = [axis.range for axis in (layout.xaxis if layout.yaxis.ticktext else layout.yaxis,)]
    assert (values == [(-0.03, 1.03)]) == case.share
    for _, trace in shown(figure):
        inks = [trace.marker.color, trace.line.color if trace.type == "scatter" and "lines" in trace.mode else None]
        assert {ink for ink in inks if ink} <= SAFE and any(inks)
        assert "%{x" in trace.hovertemplate and ":.3f}" in trace.hovertemplate


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number and text in a figure, including its template, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, path)
    else:
        yield path, value


@pytest.mark.parametrize("name", CASES)
def test_what_differs_looks_different_and_is_named_once(name: str) -> None:
    figure = CASES[name].draw(CASES[name].frame(FOUR))
    named = [trace for _, trace in shown(figure) if trace.name]
    legend = [trace.name for trace in named if trace.showlegend is not False]
    assert len(set(legend)) == len(legend) and set(legend) == {trace.name for trace in named}
    looks = {
        trace.name: (trace.marker.symbol, trace.marker.color or trace.line.color, trace.line.dash) for trace in named
    }
    assert len(set(looks.values())) == len(looks)
    assert bool(layout_of(figure).showlegend) == (len(legend) > 1)


class TestLines:
    frame = rows(kind=[f"kind {i}" for i in range(12)], x=(1, 2, 3))

    def test_the_band_is_the_interval_and_stands_in_the_hover(self) -> None:
        frame = CASES["prompt_counts"].frame(FOUR)
        bands = [t for t in figures.prompt_counts(frame).data if t.hoverinfo == "skip"]
        part = frame[(frame["task"] == "antonym") & (frame["n_shots"] == 1)]
        assert bands[0].x == (1, 3, 5, 10, 50, 50, 10, 5, 3, 1) and len(bands) == 12
        assert list(bands[0].y) == [*part["high"], *part["low"][::-1]]
        line = next(t for t in figures.prompt_counts(frame).data if t.hoverinfo != "skip")
        assert np.array_equal(line.customdata, part[["low", "high"]]) and "95% interval" in line.hovertemplate

    def test_of_random_draws_it_is_the_range_and_called_so(self) -> None:
        frame = random_heads(FOUR)
        figure = figures.random_heads(frame)
        band, line = figure.data[:2]
        draws = frame[(frame["task"] == "antonym") & (frame["heads"] == "random")].groupby("k")["mean"]
        assert list(band.y) == [*draws.max(), *draws.min()[::-1]]
        assert "range %{customdata[0]" in line.hovertemplate and "95%" not in line.hovertemplate

    def test_without_intervals_the_hover_promises_none(self) -> None:
        soft = next(t for t in figures.soft_hard(soft_hard(FOUR)).data if t.name == "soft")
        assert "interval" not in soft.hovertemplate and soft.customdata is None

    def test_more_kinds_than_colors_still_look_different(self) -> None:
        for draw in (lambda: figures.lines(self.frame, "x", color="kind"),
                     lambda: figures.dots(self.frame.assign(task="a"), color="kind")):  # fmt: skip
            figure = draw()
            looks = {(t.marker.symbol, t.marker.color or t.line.color) for _, t in shown(figure)}
            assert len(looks) == 12

    def test_what_the_first_panel_lacks_is_in_the_legend(self) -> None:
        frame = rows(task=("a", "b"), kind=("x", "y"), x=(1, 2))
        figure = figures.lines(frame[(frame["task"] == "b") | (frame["kind"] == "x")], "x", color="kind", facet="task")
        assert [t.name for t in figure.data if t.showlegend] == ["x", "y"] and layout_of(figure).showlegend

    def test_the_lowest_panel_of_every_column_has_its_numbers(self) -> None:
        figure = figures.lines(rows(task=list("abcdef"), x=(1, 2)), "x", facet="task")
        below = [layout_of(figure)[f"xaxis{i or ''}"].showticklabels for i in ("", 2, 3, 4, 5, 6)]
        assert below == [False, False, True, True, True, True]

    def test_points_are_joined_from_left_to_right(self) -> None:
        frame = pd.DataFrame({"x": [3, 1, 2], "mean": [0.3, 0.1, 0.2]})
        (line,) = figures.lines(frame, "x").data
        assert list(line.x) == [1, 2, 3] and list(line.y) == [0.1, 0.2, 0.3]

    def test_logarithmic_axes_name_what_was_measured(self) -> None:
        figure = figures.costs(CASES["costs"].frame(FOUR))
        assert (layout_of(figure).xaxis.type, layout_of(figure).yaxis.type) == ("log", "log")
        assert layout_of(figure).xaxis.tickvals == (1, 10, 300) and layout_of(figure).xaxis.ticktext == (
            "1",
            "10",
            "300",
        )
        tokens = figures.costs(CASES["costs"].frame(FOUR).rename(columns={"seconds": "tokens"}), quantity="tokens")
        assert axis_titles(tokens)[1] == "Tokens through the model"

    def test_many_ticks_are_thinned(self) -> None:
        figure = figures.lines(rows(x=range(40)), "x", log_x=True)
        assert 5 <= len(layout_of(figure).xaxis.tickvals) <= 8 and 0 not in layout_of(figure).xaxis.tickvals


class TestDots:
    def test_error_bars_reach_from_low_to_high(self) -> None:
        frame = CASES["checkpoints"].frame(FOUR)
        best, _ = figures.checkpoints(frame).data
        part = frame[frame["checkpoint"] == "best"]
        np.testing.assert_allclose(np.array(best.x) + best.error_x.array, part["high"])
        np.testing.assert_allclose(np.array(best.x) - best.error_x.arrayminus, part["low"])
        assert best.customdata.tolist() == part[["task", "low", "high"]].to_numpy().tolist()
        assert "95% interval %{customdata[1]:.3f} to %{customdata[2]:.3f}" in best.hovertemplate

    def test_tasks_go_down_in_their_order(self) -> None:
        axis = layout_of(figures.checkpoints(CASES["checkpoints"].frame(FOUR))).yaxis
        assert axis.ticktext == FOUR and axis.tickvals == (0, 1, 2, 3) and axis.range == (3.5, -0.5)

    def test_dots_of_one_task_stay_nearer_to_it_than_to_the_next(self) -> None:
        for tasks in (FOUR, ALL):
            places = [y for t in figures.task_agnostic(CASES["task_agnostic"].frame(tasks)).data for y in t.y[:1]]
            assert places == sorted(places) and len(set(places)) == 5
            assert places[-1] - places[0] < 1 - (places[1] - places[0])

    @pytest.mark.parametrize("name", ["task_agnostic", "shared_attention"])
    def test_there_is_room_for_the_longest_label_and_the_axis_title(self, name: str) -> None:
        for tasks in (FOUR, ALL):
            figure = CASES[name].draw(CASES[name].frame(tasks))
            layout = layout_of(figure)
            longest = max(map(len, layout.yaxis.ticktext))
            assert layout.margin.l >= 5.5 * longest + 8  # a letter in Arial at 11 pixels is about 5.5 pixels wide
            plot = layout.width - layout.margin.l - layout.margin.r
            assert plot >= 200
            assert all(5.5 * len(line) <= plot for line in layout.xaxis.title.text.split("<br>"))

    def test_chance_is_marked(self) -> None:
        (line,) = layout_of(figures.head_overlap(CASES["head_overlap"].frame(FOUR))).shapes
        assert (line.x0, line.x1, line.line.dash) == (0.5, 0.5, "dash")

    def test_intervals_of_shared_attention_are_those_of_a_mean(self) -> None:
        frame = pairs_of(FOUR[:2])
        both = next(t for t in figures.shared_attention(frame).data if t.name == "selected by both")
        values = frame[(frame["group"] == "both") & (frame["role"] == "query")]["distance"]
        half = 1.96 * values.std() / len(values) ** 0.5
        assert both.error_x.array[0] == pytest.approx(half) and both.error_x.arrayminus[0] == pytest.approx(half)


class TestTransferHeatmap:
    names = ("a", "b", "c", "d")
    values = pd.DataFrame(np.arange(16).reshape(4, 4) / 16, list(names), list(names))
    distance = np.array([[0, 9, 1, 5], [9, 0, 8, 3], [1, 8, 0, 6], [5, 3, 6, 0]], float)

    def test_every_cell_stands_at_its_source_and_target(self) -> None:
        values = self.values.iloc[[2, 0, 3]]
        figure = figures.transfer_heatmap(values, hover={"double": 2 * values})
        (heatmap,) = figure.data
        sources, targets = layout_of(figure).yaxis4.ticktext, layout_of(figure).xaxis4.ticktext
        assert sources == ("c", "a", "d") and targets == self.names and (heatmap.zmin, heatmap.zmax) == (0, 1)
        assert layout_of(figure).yaxis4.visible and layout_of(figure).yaxis4.showticklabels
        assert layout_of(figure).yaxis4.range == (2.5, -0.5)  # the first source at the top
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                expected = self.values.loc[source, target]
                assert heatmap.z[heatmap.y[i]][heatmap.x[j]] == expected
                assert heatmap.customdata[i][j][0] == 2 * expected
                assert heatmap.text[i][j] == f"{source}<br>on {target}"
        assert "accuracy %{z:.3f}" in heatmap.hovertemplate and "double %{customdata[0]:.3f}" in heatmap.hovertemplate

    def test_the_tree_joins_the_columns_that_are_near(self) -> None:
        tree = linkage(squareform(self.distance), "average")
        order = [self.names[i] for i in leaves_list(tree)]
        figure = figures.transfer_heatmap(self.values.loc[order, order], tree=tree)
        joins = {}
        for line in figure.data:
            if line.type == "scatter":
                joins[round(max(line.y), 9)] = tuple(x for x, y in zip(line.x, line.y, strict=True) if y == 0)
        place = {name: float(i) for i, name in enumerate(order)}
        # a and c at 1, b and d at 3, both pairs at the mean of 9, 5, 8 and 6.
        assert set(joins) == {1.0, 3.0, 7.0} and joins[7.0] == ()
        assert sorted(joins[1.0]) == sorted((place["a"], place["c"]))
        assert sorted(joins[3.0]) == sorted((place["b"], place["d"]))
        assert layout_of(figure).yaxis2.range[0] == 0 and layout_of(figure).yaxis2.range[1] > 7
        assert layout_of(figure).xaxis4.range == (-0.5, 3.5) and layout_of(figure).xaxis2.matches == "x4"

    def test_kinds_stand_beside_their_rows(self) -> None:
        groups = {"a": "x", "b": "y", "d": "x"}
        figure = figures.transfer_heatmap(self.values, groups=groups)
        bars = {bar.name: (list(bar.y), list(bar.customdata)) for bar in figure.data if bar.type == "bar"}
        assert bars == {"x": ([0, 3], ["a", "d"]), "y": ([1], ["b"]), "other": ([2], ["c"])}
        assert len({bar.marker.color for bar in figure.data if bar.type == "bar"}) == 3
        assert layout_of(figure).yaxis3.ticktext == self.names and layout_of(figure).yaxis3.visible
        assert not layout_of(figure).yaxis4.visible and layout_of(figure).yaxis3.range == layout_of(figure).yaxis4.range

    def test_negative_limits_diverge(self) -> None:
        (heatmap,) = figures.transfer_heatmap(self.values - 0.5, limits=(-1, 1), axes=("down", "across")).data
        assert (heatmap.zmin, heatmap.zmax) == (-1, 1)
        (other,) = figures.transfer_heatmap(self.values).data
        assert heatmap.colorscale != other.colorscale

    def test_all_tasks_fit_a_page(self) -> None:
        values = pd.DataFrame(np.random.default_rng(0).random((57, 57)), list(ALL), list(ALL))
        tree = linkage(values.to_numpy(), "average")
        groups = {name: str(i % 5) for i, name in enumerate(ALL)}
        layout = layout_of(figures.transfer_heatmap(values, "Transfer", groups=groups, tree=tree))
        assert layout.width <= figures.DOUBLE + 60 and layout.height <= 1000
        font = layout.xaxis4.tickfont.size
        assert font >= 7 and layout.yaxis3.tickfont.size == font
        longest = max(map(len, ALL))
        assert layout.margin.l >= 0.5 * font * longest + 20 and layout.margin.b >= 0.5 * font * longest + 20
        plot = layout.width - layout.margin.l - layout.margin.r
        assert plot / 57 >= font  # a row is as high as its name


class TestHeadHeatmap:
    def test_numbers_of_both_signs_have_colors_symmetric_about_zero(self) -> None:
        values = np.array([[0.5, -2.0], [1.0, 0.0]])
        (heatmap,) = figures.head_heatmap(values, "effects", "logit").data
        assert (heatmap.zmin, heatmap.zmax) == (-2, 2) and np.array_equal(heatmap.z, values)
        assert heatmap.colorbar.title.text == "logit" and "logit %{z:.3f}" in heatmap.hovertemplate
        (positive,) = figures.head_heatmap(np.abs(values)).data
        assert positive.colorscale != heatmap.colorscale and positive.zmin is None

    def test_a_long_title_is_broken_and_has_room(self) -> None:
        title = "Direct effect of heads: fv/conll2003_organization"
        short, long = (layout_of(figures.head_heatmap(np.zeros((30, 9)), text)) for text in ("short", title))
        assert long.title.text.replace("<br>", " ") == title and "<br>" in long.title.text
        assert all(6.1 * len(line) <= long.width for line in long.title.text.split("<br>"))
        assert long.margin.t == short.margin.t + 17 * long.title.text.count("<br>")
        assert long.height - long.margin.t == short.height - short.margin.t


class TestAttention:
    roles = pd.DataFrame(
        [(layer, head, role) for layer in range(2) for head in range(2) for role in ("query", "template")],
        columns=["layer", "head", "role"],
    ).assign(share=np.arange(8) / 8)

    def test_roles_are_stacked_shares(self) -> None:
        figure = figures.attention_roles(self.roles, "title")
        assert [bar.name for bar in figure.data] == ["query", "template"] and layout_of(figure).barmode == "stack"
        for bar in figure.data:
            part = self.roles[self.roles["role"] == bar.name]
            assert list(bar.x) == part["share"].tolist() and list(bar.y) == ["0.0", "0.1", "1.0", "1.1"]
            assert bar.marker.color in SAFE and "%{x:.3f}" in bar.hovertemplate
        assert layout_of(figure).xaxis.range == (0, 1) and layout_of(figure).legend.traceorder == "normal"
        assert axis_titles(figure) == ("Share of the last token's attention", "Head (layer.head)")

    def test_many_heads_stay_readable_on_a_page_or_two(self) -> None:
        frame = pd.concat([self.roles.assign(layer=self.roles["layer"] + 2 * i) for i in range(60)])
        layout = layout_of(figures.attention_roles(frame))
        assert layout.height < 2400 and layout.yaxis.tickfont.size >= 7 and len(layout.yaxis.tickvals) == 240

    @staticmethod
    def prompt(length: int) -> pd.DataFrame:
        tokens = [(" hot", "\n", ":")[i % 3] for i in range(length)]
        frame = pd.DataFrame({"position": range(length), "token": tokens, "role": "query"})
        return frame.assign(**{"0.1": np.arange(length) / length, "3.2": 0.5})

    @pytest.mark.parametrize("length", [12, 50, 200])
    def test_a_prompt_goes_across_or_where_too_long_down(self, length: int) -> None:
        frame = self.prompt(length)
        figure = figures.attention_example(frame)
        (heatmap,), layout, down = figure.data, layout_of(figure), length == 200
        tokens, heads = (layout.yaxis, layout.xaxis) if down else (layout.xaxis, layout.yaxis)
        assert (
            tokens.ticktext == tuple(repr(token)[1:-1] for token in frame["token"]) and len(tokens.tickvals) == length
        )
        assert heads.ticktext == ("0.1", "3.2") and (heatmap.zmin, heatmap.zmax) == (0, 1)
        shown = np.array(heatmap.z) if down else np.array(heatmap.z).T
        assert np.array_equal(shown, frame[["0.1", "3.2"]])
        told = np.array(heatmap.text) if down else np.array(heatmap.text).T
        assert told[1].tolist() == ["head 0.1<br>\\n (query)", "head 3.2<br>\\n (query)"]
        assert figures.SINGLE <= layout.width <= figures.DOUBLE and tokens.tickfont.size >= 7
        assert set(axis_titles(figure)) == {"Token", "Head (layer.head)"}


def test_similarity_against_transfer_shows_every_pair_off_the_diagonal() -> None:
    names = ["a", "b", "c"]
    x = pd.DataFrame(np.arange(9).reshape(3, 3) / 9, names, names)
    figure = figures.similarity_against_transfer(x, 1 - x.T, "r = 1")
    (dots,) = figure.data
    found = {text: (a, b) for text, a, b in zip(dots.text, dots.x, dots.y, strict=True)}
    assert len(found) == 6
    for a, b in ((a, b) for a in names for b in names if a != b):
        assert found[f"{a}<br>on {b}"] == (x[b][a], 1 - x[a][b])
    assert axis_titles(figure) == ("Similarity of alpha (Pearson r)", "Transfer (share of target's own gain)")


@pytest.mark.parametrize("name", ["task_agnostic", "soft_hard", "alpha_distribution"])
def test_html_is_the_same_byte_for_byte(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    paths = [figures.save(case.draw(case.frame(FOUR)), tmp_path / str(i) / "a.html") for i in range(2)]
    first, second = (path.read_bytes() for path in paths)
    assert first == second and b"choose_first_of_3" in first


def test_wrapped_text_loses_no_word_and_no_break() -> None:
    text = "Total variation between attention on the two tasks' prompts\nand more"
    broken = style.wrapped(text, 150)
    assert broken.replace("<br>", " ") == text.replace("\n", " ")
    assert broken.endswith("<br>and more") and broken.count("<br>") == 3
    assert style.wrapped(text, 1000) == text.replace("\n", "<br>") and style.wrapped("", 100) == ""


@needs_chrome
def test_a_figure_of_all_tasks_is_drawn(tmp_path: Path) -> None:
    path = figures.save(figures.checkpoints(CASES["checkpoints"].frame(ALL)), tmp_path / "a.svg")
    text = path.read_text("utf-8")
    assert all(f">{name}</text>" in text for name in ALL)
