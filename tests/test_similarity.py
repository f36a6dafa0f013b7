"""Similarity of alphas: measures computed by hand, ceiling and floor, and the permutation test against all orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sitelens as sl
from sitelens.models.model import Bridge
from sitelens.studies import similarity
from sitelens.studies.similarity import (
    MEASURES,
    HeadSimilarity,
    alpha_similarity,
    head_similarity,
    qap,
    similarity_predicts_transfer,
)
from sitelens.tasks import list_tasks
from tests import micro

NAMES = ("one", "two", "three")
TASKS = [micro.task(name, step=step) for step, name in enumerate(NAMES, start=1)]
LAYERS, HEADS = 2, 4
Alphas = Mapping[tuple[str, int], sl.HeadSelection]


@pytest.fixture(scope="module")
def model() -> Bridge:
    return micro.bridge("Llama")


def alpha(*values: float, layers: int = 2) -> sl.HeadSelection:
    return sl.HeadSelection(torch.tensor(values).reshape(layers, -1))


def random_alphas(seeds: Sequence[int] = (0, 1)) -> Alphas:
    generator = torch.Generator().manual_seed(0)
    keys = [(name, seed) for name in NAMES for seed in seeds]
    return {key: sl.HeadSelection(torch.rand(LAYERS, HEADS, generator=generator)) for key in keys}


def of(alphas: Alphas, monkeypatch: pytest.MonkeyPatch, model: Bridge, **options: Any) -> HeadSimilarity:
    """The similarity of given alphas instead of trained ones."""
    with monkeypatch.context() as patch:
        runs = {key: sl.TrainResult(value, pd.DataFrame(), sl.TrainConfig()) for key, value in alphas.items()}
        patch.setattr(similarity, "train_selections", lambda *_, **__: runs)
        names = dict.fromkeys(name for name, _ in alphas)
        seeds = tuple(dict.fromkeys(seed for _, seed in alphas))
        options = {"n_permutations": 20} | options
        return head_similarity([micro.task(name) for name in names], model, seeds=seeds, **options)


# Measures


A, B = alpha(0.1, 0.2, 0.3, 0.6), alpha(0.2, 0.1, 0.4, 0.5)


@pytest.mark.parametrize(
    ("measure", "k", "expected"),
    [
        ("pearson", None, 10 / math.sqrt(14 * 10)),
        ("spearman", None, 0.8),
        ("jaccard", 2, 1),
        ("jaccard", 3, 2 / 4),
        ("jaccard", 1, 1),
        ("jaccard", None, 0),  # one head above 0.5, and none
    ],
)
def test_measures_worked_by_hand(measure: str, k: int | None, expected: float) -> None:
    assert alpha_similarity(A, B, measure, k) == pytest.approx(expected, abs=1e-6)
    assert alpha_similarity(B, A, measure, k) == pytest.approx(expected, abs=1e-6)


def test_ties_share_their_rank() -> None:
    # Ranks 1.5 1.5 3 4 and 1 2.5 2.5 4: deviations -1 -1 .5 1.5 and -1.5 0 0 1.5
    found = alpha_similarity(alpha(0.1, 0.1, 0.3, 0.9), alpha(0, 0.5, 0.5, 0.6), "spearman")
    assert found == pytest.approx(3.75 / math.sqrt(4.5 * 4.5))


def test_pearson_is_centered_and_sees_opposites() -> None:
    high, low = alpha(0.9, 0.99, 0.9, 0.99), alpha(0.99, 0.9, 0.99, 0.9)
    assert alpha_similarity(high, low) == pytest.approx(-1)


@pytest.mark.parametrize("measure", ["pearson", "spearman"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_a_constant_alpha_is_like_nothing(measure: str, value: float) -> None:
    constant, varied = alpha(*[value] * 6), alpha(*np.linspace(0, 1, 6).tolist())
    assert math.isnan(alpha_similarity(constant, varied, measure))
    assert math.isnan(alpha_similarity(varied, constant, measure))


def test_no_head_on_either_side_has_no_jaccard_index() -> None:
    assert math.isnan(alpha_similarity(alpha(0.1, 0.2), alpha(0.2, 0.1), "jaccard"))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(sl.SitelensError, match=r"shapes \(2, 2\) and \(1, 4\) cannot be compared"):
        alpha_similarity(A, alpha(0.1, 0.2, 0.3, 0.4, layers=1))
    with pytest.raises(sl.SitelensError, match="unknown measure 'cosine'; one of pearson, spearman, jaccard"):
        alpha_similarity(A, B, "cosine")
    with pytest.raises(sl.SitelensError, match="k must lie in 0 to 4"):
        alpha_similarity(A, B, "jaccard", 5)


# Between tasks


def test_pairs_are_of_the_trained_alphas(model: Bridge) -> None:
    config = sl.TrainConfig(n_steps=6, eval_every=3, n_valid=4, lr=1.0)
    vectors = {task.name: sl.embed_task(task, model, n_prompts=3, n_shots=2) for task in TASKS}
    options: dict[str, Any] = {"seeds": (1, 0), "embeddings": vectors, "config": config}
    found = head_similarity(TASKS, model, n_permutations=5, **options)
    runs = sl.train_selections(TASKS, model, **options)
    pairs: Any = found.frame.itertuples()
    for row in pairs:
        a, b = runs[row.a, row.seed_a].selection, runs[row.b, row.seed_b].selection
        assert row.similarity == alpha_similarity(a, b, str(row.measure))
    assert found.tasks == NAMES and found.model == "Llama" and found.groups == {}
    assert found.k == {name: runs[name, 1].selection.n_selected for name in NAMES}
    pd.testing.assert_frame_equal(found.floor, head_similarity(TASKS, model, n_permutations=5, **options).floor)


def test_every_pair_of_tasks_and_seeds_stands_there_once(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    pairs = of(random_alphas((2, 0, 1)), monkeypatch, model).frame
    for measure in MEASURES:
        rows = pairs[pairs["measure"] == measure]
        keys = [frozenset([(r.a, r.seed_a), (r.b, r.seed_b)]) for r in rows.itertuples()]
        everything = [(name, seed) for name in NAMES for seed in (0, 1, 2)]
        assert len(keys) == len(set(keys))
        assert set(keys) == {frozenset(pair) for pair in itertools.combinations(everything, 2)}
    same = pairs[pairs["a"] == pairs["b"]]
    assert (same["seed_a"] != same["seed_b"]).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_the_frame_is_symmetric_with_the_ceiling_on_its_diagonal(
    measure: str, monkeypatch: pytest.MonkeyPatch, model: Bridge
) -> None:
    alphas = random_alphas()
    found = of(alphas, monkeypatch, model, k=3)
    frame = found.matrix(measure)
    assert list(frame.index) == list(frame.columns) == list(NAMES) and set(found.k.values()) == {3}

    def like(a: tuple[str, int], b: tuple[str, int]) -> float:
        return alpha_similarity(alphas[a], alphas[b], measure, 3)

    between, ceiling = [], []
    for a in NAMES:
        ceiling.append(like((a, 0), (a, 1)))
        assert frame.loc[a, a] == pytest.approx(ceiling[-1])
        for b in set(NAMES) - {a}:
            between.append(np.mean([like((a, i), (b, j)) for i in (0, 1) for j in (0, 1)]))
            assert frame[a][b] == frame[b][a] == pytest.approx(between[-1])
    row = found.summary().set_index("measure").loc[measure].to_dict()
    assert row["between tasks"] == pytest.approx(np.mean(between)) and row["ceiling"] == pytest.approx(np.mean(ceiling))


def test_one_seed_has_no_ceiling(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    found = of(random_alphas((0,)), monkeypatch, model)
    assert np.isnan(np.diag(found.matrix())).all() and found.summary()["ceiling"].isna().all()
    off = found.matrix().to_numpy()[~np.eye(3, dtype=bool)]
    assert not np.isnan(off).any()
    found.heatmap()


def test_the_floor_permutes_all_heads_or_those_of_a_layer(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    """Alphas are constant within layers, so that permutations within layers change nothing; all others are counted."""
    layered = {(name, 0): alpha(*[high] * 4, *[low] * 4) for name, high, low in (("a", 0.9, 0.1), ("b", 0.7, 0.2))}
    found = of(layered, monkeypatch, model, n_permutations=3000, k=4)
    floor = found.floor.set_index(["measure", "permuted"])["similarity"]
    assert found.floor.groupby(["measure", "permuted"]).size().tolist() == [3000] * 6
    for measure in MEASURES:
        np.testing.assert_allclose(floor[measure, "within layers"], 1)
        row = found.summary().set_index("measure").loc[measure].to_dict()
        assert row["floor_layers"] == pytest.approx(1) and row["floor_layers_97.5%"] == pytest.approx(1)
    # Of 70 ways to choose 4 heads of 8, 1, 16, 36, 16 and 1 share 0 to 4 with a given four.
    shares = {overlap: math.comb(4, overlap) ** 2 / 70 for overlap in range(5)}
    by_overlap = {"pearson": lambda o: (o - 2) / 2, "spearman": lambda o: (o - 2) / 2, "jaccard": lambda o: o / (8 - o)}
    for measure, value in by_overlap.items():
        here = floor[measure, "heads"]
        for overlap, share in shares.items():
            assert np.isclose(here, value(overlap)).mean() == pytest.approx(share, abs=0.03)
        row = found.summary().set_index("measure").loc[measure].to_dict()
        assert row["floor_heads"] == pytest.approx(sum(value(o) * s for o, s in shares.items()), abs=0.03)
        assert row["floor_heads_97.5%"] == pytest.approx(value(3))


def test_the_floor_compares_two_alphas_never_one_with_itself(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    """Only one of two alphas varies within a layer, so that r between them does not depend on the permutation."""
    flat, varied = alpha(*[0.9] * 4, *[0.1] * 4), alpha(*[0.9] * 4, 0.0, 0.1, 0.2, 0.3)
    floor = of({("a", 0): flat, ("b", 0): varied}, monkeypatch, model, n_permutations=200).floor
    here = floor[(floor["measure"] == "pearson") & (floor["permuted"] == "within layers")]["similarity"]
    np.testing.assert_allclose(here, alpha_similarity(flat, varied))


def drawn_names(figure: Any) -> list[str]:
    (trace,) = (trace for trace in figure.data if trace.type == "heatmap")
    return [str(row[0]).split("<br>")[0] for row in trace.text]


def test_a_heatmap_shows_the_frame_with_fixed_colors(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    found = of(random_alphas(), monkeypatch, model)
    for measure in MEASURES:
        figure, frame = found.heatmap(measure), found.matrix(measure)
        (trace,) = (trace for trace in figure.data if trace.type == "heatmap")
        assert sum(trace.type == "scatter" for trace in figure.data) == len(NAMES) - 1
        names = drawn_names(figure)
        assert sorted(names) == sorted(NAMES)
        np.testing.assert_array_equal(trace.z, frame.loc[names, names].to_numpy())
        assert (trace.zmin, trace.zmax) == ((0, 1) if measure == "jaccard" else (-1, 1))
    with pytest.raises(sl.SitelensError, match="unknown measure"):
        found.heatmap("cosine")


def test_like_tasks_stand_together_in_a_heatmap(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    a, b = (0.9, 0.8, 0.1, 0.2, 0.1, 0.0, 0.1, 0.2), (0.1, 0.2, 0.8, 0.1, 0.0, 0.9, 0.7, 0.1)
    alphas = {("a", 0): alpha(*a), ("b", 0): alpha(*b), ("c", 0): alpha(*a[:7], 0.3)}
    names = drawn_names(of(alphas, monkeypatch, model).heatmap())
    assert abs(names.index("a") - names.index("c")) == 1


def test_a_heatmap_of_a_constant_alpha_is_drawn(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    alphas = dict(random_alphas())
    for seed in (0, 1):
        alphas["two", seed] = alpha(*[0.3] * 8)
    found = of(alphas, monkeypatch, model)
    assert math.isnan(found.matrix()["two"]["one"])
    found.heatmap()


def test_groups_are_the_kinds_of_known_tasks(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    kinds = list_tasks().set_index("name")["kind"]
    known = kinds.index[0]
    alphas = {(known, 0): A, ("my own", 0): B}
    found = of(alphas, monkeypatch, model)
    assert found.groups == {known: kinds.iloc[0]}


def test_bad_input_is_refused_before_anything_is_trained(model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "train_selections", None)
    with pytest.raises(sl.SitelensError, match="at least two tasks, got 1"):
        head_similarity(TASKS[:1], model)
    for k in (0, 9):
        with pytest.raises(sl.SitelensError, match=f"k must lie in 1 to 8, the number of heads; got {k}"):
            head_similarity(TASKS, model, k=k)


# The permutation test


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, n))


def off(x: np.ndarray) -> np.ndarray:
    return x[~np.eye(len(x), dtype=bool)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weight", [0.3, -1])
def test_p_is_the_share_of_all_orders_that_correlate_as_much(seed: int, weight: float) -> None:
    x = noise(4, seed)
    y = weight * x + noise(4, seed + 10)
    r, p, cells = qap(x, y, n_permutations=4000, seed=seed)
    assert r == pytest.approx(np.corrcoef(off(x), off(y))[0, 1]) and cells == 12
    orders = [list(order) for order in itertools.permutations(range(4))]
    all_r = [abs(np.corrcoef(off(x[order][:, order]), off(y))[0, 1]) for order in orders]
    assert p == pytest.approx(np.mean(np.array(all_r) >= abs(r) - 1e-9), abs=0.025)


@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_tiny_where_one_is_the_other(sign: int) -> None:
    x = noise(8, 0)
    r, p, _ = qap(x, sign * x, n_permutations=999)
    assert r == pytest.approx(sign) and p == 1 / 1000


def test_p_is_uniform_where_there_is_nothing() -> None:
    found = np.array([qap(noise(6, i), noise(6, 1000 + i), n_permutations=39, seed=i)[1] for i in range(300)])
    assert found.min() >= 1 / 40 and found.max() <= 1
    for level in (0.1, 0.25, 0.5, 0.75):
        assert (found <= level + 1e-9).mean() == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 300))


def test_p_is_honest_where_tasks_differ_as_a_whole() -> None:
    """Rows with different means correlate across cells by chance far more often than independent cells would."""

    def levelled(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(8, 1)) + 0.1 * noise(8, seed + 5000)

    found = np.array([qap(levelled(i), levelled(1000 + i), n_permutations=39, seed=i)[1] for i in range(200)])
    assert (found <= 0.1 + 1e-9).mean() == pytest.approx(0.1, abs=0.065)


def test_the_seed_decides_p() -> None:
    x, y = noise(5, 0), noise(5, 1)
    assert qap(x, y, 50, seed=3) == qap(x, y, 50, seed=3)
    assert len({qap(x, y, 50, seed=seed)[1] for seed in range(8)}) > 1


@pytest.mark.parametrize("side", ["x", "y"])
def test_cells_that_are_not_known_are_left_out(side: str) -> None:
    x, y = noise(5, 0), noise(5, 1)
    unknown = np.zeros((5, 5), dtype=bool)
    unknown[[0, 1, 2], [3, 2, 4]] = True
    known = ~unknown & ~np.eye(5, dtype=bool)
    holes = {"x": x.copy(), "y": y.copy()}
    holes[side][unknown] = np.nan
    np.fill_diagonal(holes["x"], np.nan)
    r, p, cells = qap(holes["x"], holes["y"], n_permutations=200)
    assert r == pytest.approx(np.corrcoef(x[known], y[known])[0, 1]) and cells == 17
    assert 1 / 201 <= p <= 1


def test_cells_of_x_are_left_out_wherever_they_are_permuted_to() -> None:
    x = noise(4, 0)
    y = x + noise(4, 5)
    x[0, 1] = y[2, 3] = np.nan
    _, p, cells = qap(x, y, n_permutations=4000)

    def r(order: list[int]) -> float:
        moved = x[order][:, order]
        known = ~np.eye(4, dtype=bool) & ~np.isnan(moved + y)
        return abs(np.corrcoef(moved[known], y[known])[0, 1])

    orders = [list(order) for order in itertools.permutations(range(4))]
    assert cells == 10
    assert p == pytest.approx(np.mean([r(order) >= r(orders[0]) - 1e-9 for order in orders]), abs=0.025)


@pytest.mark.parametrize("y", [np.full((4, 4), np.nan), np.full((4, 4), 0.3), np.eye(4)])
def test_without_anything_that_varies_there_is_neither_r_nor_p(y: np.ndarray) -> None:
    for pair in ((noise(4, 0), y), (y, noise(4, 0))):
        r, p, cells = qap(*pair, n_permutations=10)
        assert math.isnan(r) and math.isnan(p) and cells == (0 if np.isnan(y).any() else 12)


# Similarity and transfer


def grid_of(shares: np.ndarray, names: Sequence[str], own: Sequence[float] | None = None) -> sl.TransferMatrix:
    """A transfer matrix with zero-shot accuracy 0.1 and these shares of the own gain (0.8 by default)."""
    gain = np.array(own or [0.8] * len(names))
    frame = 0.1 + shares * gain
    np.fill_diagonal(frame, 0.1 + gain)
    n = pd.Series([10] * len(names), list(names))
    accuracy = pd.DataFrame(frame, list(names), list(names))
    return sl.TransferMatrix(accuracy, pd.Series([0.1] * len(names), list(names)), n, "heads", "first_token", "m")


def of_four(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> HeadSimilarity:
    generator = torch.Generator().manual_seed(4)
    alphas = {(name, 0): sl.HeadSelection(torch.rand(2, 4, generator=generator)) for name in "abcd"}
    return of(alphas, monkeypatch, model, k=4)


def test_similarity_that_predicts_transfer_is_seen_in_any_order(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    similar = of_four(monkeypatch, model)
    names = list("cadb")
    shares = 0.2 + 0.5 * similar.matrix("spearman").loc[names, names].to_numpy()
    found = similarity_predicts_transfer(similar, grid_of(shares, names), n_permutations=300, seed=2)
    assert found["measure"].tolist() == list(MEASURES)
    assert (found["cells"] == 12).all() and (found["permutations"] == 300).all()
    rows = found.set_index("measure")
    assert rows["r"]["spearman"] == pytest.approx(1) and rows["p"]["spearman"] < 0.1
    pearson = similar.matrix("pearson").loc[names, names].to_numpy()
    r, p, _ = qap(pearson, shares, 300, seed=2)
    assert rows.loc["pearson", "r"] == pytest.approx(r) and rows.loc["pearson", "p"] == pytest.approx(p)
    assert abs(r) < 0.999


def test_targets_without_a_gain_of_their_own_are_left_out(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    similar, names = of_four(monkeypatch, model), list("abcd")
    shares = noise(4, 0)
    found = similarity_predicts_transfer(similar, grid_of(shares, names, [0.8, 0.8, 0.01, 0.8]), n_permutations=50)
    assert (found["cells"] == 9).all()
    known = ~np.eye(4, dtype=bool)
    known[:, 2] = False
    expected = np.corrcoef(similar.matrix().to_numpy()[known], shares[known])[0, 1]
    assert found["r"].iloc[0] == pytest.approx(expected)
    nothing = similarity_predicts_transfer(similar, grid_of(shares, names, [0.01] * 4), n_permutations=50)
    assert nothing["r"].isna().all() and nothing["p"].isna().all() and (nothing["cells"] == 0).all()


def test_other_or_too_few_tasks_are_refused(monkeypatch: pytest.MonkeyPatch, model: Bridge) -> None:
    similar = of_four(monkeypatch, model)
    for names in ("abc", "abce"):
        with pytest.raises(sl.SitelensError, match="hold different tasks"):
            similarity_predicts_transfer(similar, grid_of(noise(len(names), 0), list(names)))
    two = of({(name, 0): A for name in "ab"}, monkeypatch, model)
    with pytest.raises(sl.SitelensError, match="at least three tasks, got 2"):
        similarity_predicts_transfer(two, grid_of(noise(2, 0), list("ab")))
