"""Transfer matrices on micro models: each cell is one evaluation; quantities derived from the cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.cluster.hierarchy import cophenet
from scipy.spatial.distance import squareform

import sitelens as sl
from sitelens.evaluation import cached as scoring
from sitelens.models.fingerprints import fingerprint
from sitelens.models.model import Bridge
from sitelens.studies import transfer
from sitelens.studies.transfer import Swap
from sitelens.tasks import list_tasks
from tests import micro

TASKS = [micro.task(name, step=step) for name, step in (("one", 1), ("two", 2), ("three", 3))]
SMALL = sl.TrainConfig(n_steps=8, eval_every=4, n_valid=4, lr=1.0)


@pytest.fixture(scope="module")
def model() -> Bridge:
    return micro.bridge("Llama")


def matrix(values: list[list[float]], zero_shot: list[float], **options: Any) -> sl.TransferMatrix:
    names = list("abcdefgh"[: len(values)])
    n = pd.Series(range(10, 10 + len(names)), names)
    facts: dict[str, Any] = {"swap": "heads", "metric": "first_token", "model": "m"}
    return sl.TransferMatrix(pd.DataFrame(values, names, names), pd.Series(zero_shot, names), n, **facts | options)


@pytest.mark.parametrize("swap", ["heads", "embedding", "both"])
def test_every_cell_is_the_evaluation_of_its_pair(swap: Swap, model: Bridge) -> None:
    grid = sl.transfer_matrix(TASKS, model, swap=swap, config=SMALL, n_prompts=3, n_shots=2)
    vectors = {t.name: sl.embed_task(t, model, n_prompts=3, n_shots=2) for t in TASKS}
    runs = sl.train_selections(TASKS, model, embeddings=vectors, config=SMALL)
    for target in TASKS:
        for source in TASKS:
            alpha = runs[source.name if swap != "embedding" else target.name, 0].selection
            mean_z = vectors[source.name if swap != "heads" else target.name]
            scores = sl.evaluate(target, {"cell": sl.PatchHeads(alpha, mean_z)}, model, n_items=100)
            assert grid.matrix.loc[source.name, target.name] == scores["score"].mean()
        assert grid.zero_shot[target.name] == sl.evaluate(target, {"z": sl.ZeroShot()}, model)["score"].mean()
        assert grid.n[target.name] == len(target.test)


def test_normalized_is_the_share_of_the_own_gain_and_missing_where_there_is_none() -> None:
    grid = matrix([[0.5, 0.3, 0.2], [0.3, 0.9, 0.2], [0.1, 0.1, 0.24]], [0.1, 0.1, 0.2])
    expected = [[1.0, 0.25, np.nan], [0.5, 1.0, np.nan], [0.0, 0.0, np.nan]]
    np.testing.assert_allclose(grid.normalized().to_numpy(), expected, atol=1e-12)
    assert grid.own.tolist() == [0.5, 0.9, 0.24]


def test_clustering_puts_similar_tasks_together_and_changes_no_cell() -> None:
    grid = matrix([[0.9, 0.0, 0.8], [0.0, 0.9, 0.1], [0.8, 0.0, 0.9]], [0.0, 0.0, 0.0])
    clustered = grid.clustered()
    order = list(clustered.matrix.columns)
    assert order == list(clustered.matrix.index) and abs(order.index("a") - order.index("c")) == 1
    pd.testing.assert_frame_equal(clustered.matrix.loc[list("abc"), list("abc")], grid.matrix)


def test_the_tree_is_of_mean_normalized_transfer_and_what_is_not_known_counts_as_none() -> None:
    # Own gains .8, .4, .04 (too small) and .5. Shares: a on b 1/4, b on a 1/2, d on a more than all, a on d below 0.
    values = [[0.9, 0.2, 0.2, 0.0], [0.5, 0.5, 0.2, 0.35], [0.1, 0.1, 0.24, 0.1], [0.95, 0.1, 0.2, 0.6]]
    grid = matrix(values, [0.1, 0.1, 0.2, 0.1])
    ab, ad, bd = 1 - (0.25 + 0.5) / 2, 1 - (0 + 1) / 2, 1 - (0.5 + 0) / 2
    tree = grid.tree()
    assert tree.shape == (3, 4)
    heights = squareform(cophenet(tree))
    assert heights[0, 3] == pytest.approx(ad)
    assert heights[0, 1] == heights[1, 3] == pytest.approx((ab + bd) / 2)
    assert heights[2, :2] == pytest.approx(1)
    order = list(grid.clustered().matrix.columns)
    assert order[0] == "c" or order[-1] == "c"
    assert abs(order.index("a") - order.index("d")) == 1
    # a and d keep 1/2 of the gain between them, b with those 5/16, c nothing
    found = {share: [set(cluster) for cluster in grid.clusters(share)] for share in (0.51, 0.49, 0.32, 0.31, 0.0)}
    assert sorted(map(len, found[0.51])) == [1, 1, 1, 1]
    assert found[0.49][0] == found[0.32][0] == {"a", "d"} and [len(c) for c in found[0.49]] == [2, 1, 1]
    assert found[0.31] == [{"a", "b", "d"}, {"c"}] and found[0.0] == [{"a", "b", "c", "d"}]
    assert [name for name in order if name in "ad"] == grid.clusters()[0]
    with pytest.raises(sl.SitelensError, match="share must lie in"):
        grid.clusters(1.5)


def test_clustering_moves_every_fact_with_its_task() -> None:
    grid = matrix([[0.9, 0.0, 0.8], [0.0, 0.7, 0.1], [0.8, 0.0, 0.9]], [0.0, 0.1, 0.05], groups={"a": "x"})
    clustered = grid.clustered()
    assert list(clustered.matrix.columns) != ["a", "b", "c"]
    for name in "abc":
        assert (clustered.zero_shot[name], clustered.n[name]) == (grid.zero_shot[name], grid.n[name])
    assert list(clustered.zero_shot.index) == list(clustered.n.index) == list(clustered.matrix.index)
    assert (clustered.groups, clustered.swap) == (grid.groups, grid.swap)


def test_long_form_and_file_hold_every_cell(tmp_path: Path) -> None:
    groups = {"a": "words", "b": "größe"}
    grid = matrix([[0.5, 0.3, 0.2], [0.3, 0.9, 0.2], [0.1, 0.1, 0.24]], [0.1, 0.1, 0.2], groups=groups)
    rows = grid.frame.set_index(["source", "target"])
    assert len(rows) == 9 and rows.loc[("b", "a"), "accuracy"] == 0.3 and rows.loc[("b", "a"), "own"] == 0.5
    assert (rows["zero_shot"]["a", "c"], rows["n"]["a", "c"]) == (0.2, 12)
    again = sl.TransferMatrix.load(grid.artifact().save(tmp_path / "grid.safetensors"))
    pd.testing.assert_frame_equal(again.matrix, grid.matrix)
    pd.testing.assert_series_equal(again.zero_shot, grid.zero_shot)
    pd.testing.assert_series_equal(again.n, grid.n)
    assert (again.swap, again.metric, again.model, again.groups) == ("heads", "first_token", "m", groups)


# The figure


VALUES = [[0.9, 0.0, 0.8], [0.0, 0.7, 0.1], [0.8, 0.0, 0.9]]


def traces(figure: Any, kind: str) -> list[Any]:
    return [trace for trace in figure.data if trace.type == kind]


def drawn_names(figure: Any) -> list[str]:
    """The names on the vertical axis of the heatmap; asserts that those on the horizontal axis are the same."""
    (heatmap,) = traces(figure, "heatmap")
    names = [str(row[0]).split("<br>")[0] for row in heatmap.text]
    axes = [figure.layout[name] for name in figure.layout if str(name).startswith(("xaxis", "yaxis"))]
    labelled = [list(axis.ticktext) for axis in axes if axis.ticktext]
    assert labelled == [names, names]
    return names


@pytest.mark.parametrize("order", ["clustered", "given"])
def test_heatmap_has_fixed_colors_every_name_and_the_numbers_in_its_hover(
    order: Literal["clustered", "given"],
) -> None:
    grid = matrix(VALUES, [0.0, 0.1, 0.05])
    figure = grid.heatmap(order=order)
    (trace,) = traces(figure, "heatmap")
    names = drawn_names(figure)
    assert names == (list(grid.clustered().matrix.columns) if order == "clustered" else ["a", "b", "c"])
    assert (trace.zmin, trace.zmax) == (0, 1)
    np.testing.assert_array_equal(trace.z, grid.matrix.loc[names, names])
    share, zero_shot, own = np.moveaxis(np.array(trace.customdata), -1, 0)
    np.testing.assert_allclose(share, grid.normalized().loc[names, names])
    for row in range(3):
        assert zero_shot[row].tolist() == grid.zero_shot[names].tolist()
        assert own[row].tolist() == grid.own[names].tolist()
    words = ("accuracy %{z", "share of own gain %{customdata[0]", "zero-shot %{customdata[1]", "own heads %{custom")
    assert all(word in trace.hovertemplate for word in words)


def test_a_heatmap_of_shares_shows_them_and_keeps_accuracy_in_its_hover() -> None:
    grid = matrix([[0.3, 0.0, 0.8], [0.1, 0.04, 0.1], [0.2, 0.0, 0.9]], [0.0, 0.0, 0.4])
    figure = grid.heatmap(values="share")
    (trace,) = traces(figure, "heatmap")
    names = drawn_names(figure)
    assert names == list(grid.clustered().matrix.columns)
    shares = np.array(trace.z, float)
    np.testing.assert_allclose(shares, grid.normalized().loc[names, names])
    assert np.isnan(shares[:, names.index("b")]).all()  # a gain of 4 points
    assert shares[names.index("c"), names.index("a")] == pytest.approx(2 / 3)
    np.testing.assert_allclose(np.array(trace.customdata)[..., 0], grid.matrix.loc[names, names])
    assert "share of the target's own gain %{z" in trace.hovertemplate and "accuracy %{cust" in trace.hovertemplate


def test_the_dendrogram_stands_above_its_columns() -> None:
    grid = matrix(VALUES, [0.0, 0.1, 0.05])
    figure = grid.heatmap()
    names, lines = drawn_names(figure), traces(figure, "scatter")
    feet = {x for line in lines for x, y in zip(line.x, line.y, strict=True) if y == 0}
    assert len(lines) == 2 and feet == {0, 1, 2}
    lowest = min(lines, key=lambda line: max(line.y))
    assert {names[int(x)] for x, y in zip(lowest.x, lowest.y, strict=True) if y == 0} == {"a", "c"}
    assert max(lowest.y) == pytest.approx(grid.tree()[0, 2])
    assert traces(grid.heatmap(order="given"), "scatter") == []


def test_kinds_of_tasks_stand_beside_their_rows() -> None:
    figure = matrix(VALUES, [0.0, 0.1, 0.05], groups={"a": "words", "c": "words"}).heatmap()
    names = drawn_names(figure)
    kinds = {names[int(place)]: bar.name for bar in traces(figure, "bar") for place in bar.y}
    assert kinds == {"a": "words", "b": "other", "c": "words"}
    for groups in ({}, {"elsewhere": "words"}):
        assert traces(matrix(VALUES, [0.0, 0.1, 0.05], groups=groups).heatmap(), "bar") == []


@pytest.mark.parametrize(
    ("swap", "side"),
    [("heads", "Source of the heads"), ("embedding", "Source of the embedding"), ("both", "Source of heads and emb")],
)
def test_a_heatmap_says_what_was_swapped(swap: Swap, side: str) -> None:
    figure = matrix(VALUES, [0.0, 0.1, 0.05], swap=swap, model="m", metric="exact_match").heatmap()
    written = str(figure.to_json())
    assert side in written and f"Transfer of {swap}: m" in written and "Exact-match accuracy" in written


# Given, cached and rejected parts


def fast(model: Bridge, tasks: Sequence[Any] = TASKS, **options: Any) -> sl.TransferMatrix:
    return sl.transfer_matrix(tasks, model, **{"config": SMALL, "n_prompts": 3, "n_shots": 2, "n_items": 6} | options)


def given(model: Bridge, made_for: str | None = None) -> dict[str, Any]:
    """Random embeddings and selections, by name of the task."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"embeddings": {}, "selections": {}}
    for task in TASKS:
        vectors = 2 * torch.randn(2, 4, model.cfg.d_head, generator=generator)
        found["embeddings"][task.name] = sl.TaskEmbedding(vectors, task.name, made_for, 1, 0, 0)
        found["selections"][task.name] = sl.HeadSelection(torch.rand(2, 4, generator=generator), task.name, made_for)
    return found


def cells(parts: Mapping[str, Any], model: Bridge, swap: Swap) -> pd.DataFrame:
    columns = {}
    for target in TASKS:
        conditions: dict[str, sl.Condition] = {}
        for source in TASKS:
            alpha = parts["selections"][target.name if swap == "embedding" else source.name]
            mean_z = parts["embeddings"][target.name if swap == "heads" else source.name]
            conditions[source.name] = sl.PatchHeads(alpha, mean_z)
        scores = sl.evaluate(target, conditions, model, n_items=6)
        columns[target.name] = scores.groupby("condition")["score"].mean()
    names = [task.name for task in TASKS]
    return pd.DataFrame(columns).loc[names, names]


def scored(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, sl.Condition]]:
    """The conditions of every target that is scored from now on."""
    seen: list[Mapping[str, sl.Condition]] = []

    def keep(target: Any, conditions: Mapping[str, sl.Condition], *rest: Any, **options: Any) -> pd.DataFrame:
        seen.append(conditions)
        return scoring.score_conditions(target, conditions, *rest, **options)

    monkeypatch.setattr(transfer, "score_conditions", keep)
    return seen


@pytest.mark.parametrize("swap", ["heads", "embedding", "both"])
def test_given_embeddings_and_selections_stand_in_and_nothing_is_trained(
    swap: Swap, model: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = given(model, fingerprint(model))
    monkeypatch.setattr(transfer, "train_selections", None)
    seen = scored(monkeypatch)
    grid = fast(model, swap=swap, **parts)
    np.testing.assert_array_equal(grid.matrix, cells(parts, model, swap))
    for target, conditions in zip(TASKS, seen, strict=True):
        for source in TASKS:
            patch = conditions[f"from {source.name}"]
            assert isinstance(patch, sl.PatchHeads)
            assert patch.selection is parts["selections"][target.name if swap == "embedding" else source.name]
            assert patch.embedding is parts["embeddings"][target.name if swap == "heads" else source.name]


def test_what_is_not_given_is_trained_with_what_is(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, seen = given(model), scored(monkeypatch)
    del parts["selections"]["two"]
    fast(model, **parts)
    trained = sl.train_selections(TASKS[1:2], model, embeddings=parts["embeddings"], config=SMALL)
    parts["selections"]["two"] = trained["two", 0].selection
    for conditions in seen:
        for source in TASKS:
            patch = conditions[f"from {source.name}"]
            assert isinstance(patch, sl.PatchHeads)
            assert torch.equal(patch.selection.alpha, parts["selections"][source.name].alpha)


@pytest.mark.parametrize("what", ["selections", "embeddings"])
def test_what_was_made_for_another_model_is_refused(what: str, model: Bridge) -> None:
    parts = given(model)
    parts[what]["two"] = replace(parts[what]["two"], model="another")
    with pytest.raises(sl.SitelensError, match=rf"the {what[:-1]} of 'two' was made with another model"):
        fast(model, **parts)
    name = {"selections": "alpha", "embeddings": "mean_z"}[what]
    small = getattr(parts[what]["two"], name)[:1]
    parts[what]["two"] = replace(parts[what]["two"], model=None, **{name: small})
    with pytest.raises(sl.SitelensError, match=rf"the {what[:-1]} of 'two' has shape"):
        fast(model, **parts)


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that are evaluated from now on."""
    names: list[str] = []
    real = scoring.evaluate

    def counted(task: Any, *rest: Any, **options: Any) -> pd.DataFrame:
        names.append(task.name)
        return real(task, *rest, **options)

    monkeypatch.setattr(scoring, "evaluate", counted)
    return names


def test_an_interrupted_grid_goes_on_where_it_stopped(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, names, real = given(model), evaluated(monkeypatch), scoring.evaluate
    with monkeypatch.context() as patch:

        def interrupted(task: Any, *rest: Any, **options: Any) -> pd.DataFrame:
            if task.name == "three":
                raise KeyboardInterrupt
            return real(task, *rest, **options)

        patch.setattr(scoring, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(model, **parts)
    assert names == ["one", "two"]
    grid = fast(model, **parts)
    assert names == ["one", "two", "three"]
    np.testing.assert_array_equal(grid.matrix, cells(parts, model, "heads"))


def test_a_second_call_evaluates_and_trains_nothing(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    names = evaluated(monkeypatch)
    first = fast(model)
    assert names == ["one", "two", "three"]
    with monkeypatch.context() as patch:
        micro.silence(patch)
        second = fast(model)
    assert names == ["one", "two", "three"]
    pd.testing.assert_frame_equal(second.matrix, first.matrix)
    fast(model, seed=1, **given(model))
    assert len(names) == 6


def test_groups_are_the_kinds_of_known_tasks(model: Bridge) -> None:
    known = list_tasks().set_index("name")["kind"]
    tasks = [replace(TASKS[0], name=known.index[0]), TASKS[1]]
    parts = given(model)
    for kind in parts.values():
        kind[known.index[0]] = kind["one"]
    assert fast(model, tasks, **parts).groups == {known.index[0]: known.iloc[0]}


def test_one_task_or_an_unknown_swap_is_refused(model: Bridge, unchecked: None) -> None:
    with pytest.raises(sl.SitelensError, match="at least two tasks, got 1"):
        sl.transfer_matrix(TASKS[:1], model)
    with pytest.raises(sl.SitelensError, match="swap must be 'heads', 'embedding' or 'both', not 'tails'"):
        sl.transfer_matrix(TASKS, model, swap="tails")  # type: ignore[arg-type]
