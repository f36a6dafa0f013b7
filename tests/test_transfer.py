"""Transfer matrices on micro models: each cell is one evaluation, and what is derived from the cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sitelens as sl
from sitelens.models import Model
from sitelens.transfer import Swap
from tests import micro

TASKS = [micro.task(name, step=step) for name, step in (("one", 1), ("two", 2), ("three", 3))]
SMALL = sl.TrainConfig(steps=8, eval_every=4, n_valid=4, lr=1.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return micro.bridge("Llama")


def matrix(values: list[list[float]], zero_shot: list[float]) -> sl.TransferMatrix:
    names = ["a", "b", "c"]
    n = pd.Series([10] * 3, names)
    return sl.TransferMatrix(
        pd.DataFrame(values, names, names), pd.Series(zero_shot, names), n, "heads", "first_token", "m"
    )


@pytest.mark.parametrize("swap", ["heads", "embedding", "both"])
def test_every_cell_is_the_evaluation_of_its_pair(swap: Swap, model: Model) -> None:
    grid = sl.transfer_matrix(TASKS, model, swap=swap, config=SMALL, n_prompts=3, n_shots=2)
    vectors = {t.name: sl.embed_task(t, model, n_prompts=3, n_shots=2) for t in TASKS}
    runs = sl.train_selections(TASKS, model, embeddings=vectors, config=SMALL)
    for target in TASKS:
        for source in TASKS:
            alpha = runs[source.name if swap != "embedding" else target.name, 0].selection
            mean_z = vectors[source.name if swap != "heads" else target.name]
            scores = sl.evaluate(target, {"cell": sl.PatchHeads(alpha, mean_z)}, model, n_items=100)
            assert grid.frame.loc[source.name, target.name] == scores["score"].mean()
        assert grid.zero_shot[target.name] == sl.evaluate(target, {"z": sl.ZeroShot()}, model)["score"].mean()
        assert grid.n[target.name] == len(target.test)


def test_normalised_is_the_share_of_the_own_gain_and_missing_where_there_is_none() -> None:
    grid = matrix([[0.5, 0.3, 0.2], [0.3, 0.9, 0.2], [0.1, 0.1, 0.24]], [0.1, 0.1, 0.2])
    expected = [[1.0, 0.25, np.nan], [0.5, 1.0, np.nan], [0.0, 0.0, np.nan]]
    np.testing.assert_allclose(grid.normalized().to_numpy(), expected, atol=1e-12)
    assert grid.own.tolist() == [0.5, 0.9, 0.24]


def test_clustering_puts_similar_tasks_together_and_changes_no_cell() -> None:
    grid = matrix([[0.9, 0.0, 0.8], [0.0, 0.9, 0.1], [0.8, 0.0, 0.9]], [0.0, 0.0, 0.0])
    clustered = grid.clustered()
    order = list(clustered.frame.columns)
    assert order == list(clustered.frame.index) and abs(order.index("a") - order.index("c")) == 1
    pd.testing.assert_frame_equal(clustered.frame.loc[list("abc"), list("abc")], grid.frame)


def test_long_form_and_file_hold_every_cell(tmp_path: Path) -> None:
    grid = matrix([[0.5, 0.3, 0.2], [0.3, 0.9, 0.2], [0.1, 0.1, 0.24]], [0.1, 0.1, 0.2])
    rows = grid.long().set_index(["source", "target"])
    assert len(rows) == 9 and rows.loc[("b", "a"), "accuracy"] == 0.3 and rows.loc[("b", "a"), "own"] == 0.5
    again = sl.TransferMatrix.load(grid.save(tmp_path / "grid.safetensors"))
    pd.testing.assert_frame_equal(again.frame, grid.frame)
    assert (again.swap, again.metric, again.model) == ("heads", "first_token", "m")


def test_heatmap_has_fixed_colours_and_every_name() -> None:
    (trace,) = matrix([[0.5, 0.3, 0.2], [0.3, 0.9, 0.2], [0.1, 0.1, 0.24]], [0.1, 0.1, 0.2]).heatmap().data
    assert (trace.zmin, trace.zmax) == (0, 1) and list(trace.x) == list(trace.y) == ["a", "b", "c"]


def test_one_task_or_an_unknown_swap_is_refused(model: Model, unchecked: None) -> None:
    with pytest.raises(sl.SitelensError, match="at least two tasks, got 1"):
        sl.transfer_matrix(TASKS[:1], model)
    with pytest.raises(sl.SitelensError, match="unknown swap 'tails'"):
        sl.transfer_matrix(TASKS, model, swap="tails")  # type: ignore[arg-type]
