"""Head selections: properties of everything derived from alpha, and exact saving and loading."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.selection import HeadSelection
from sitelens.errors import SitelensError
from sitelens.models.fingerprints import fingerprint
from sitelens.store.artifact import DamagedArtifactError
from tests import micro

Head = tuple[int, int]
quick = hypothesis.settings(deadline=None, max_examples=60)  # the machine may be busy

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
values = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32)  # the former, so that some are equal


@st.composite
def alphas(draw: st.DrawFn, distinct: bool = False) -> Tensor:
    layers, heads = draw(shapes)
    drawn = draw(st.lists(values, min_size=layers * heads, max_size=layers * heads, unique=distinct))
    return torch.tensor(drawn).reshape(layers, heads)


selections = st.builds(
    HeadSelection, alphas(), st.text(max_size=5), st.none() | st.text(max_size=5), st.text(max_size=5)
)


@st.composite
def selections_with_k(draw: st.DrawFn, distinct: bool = False) -> tuple[HeadSelection, int]:
    selection = HeadSelection(draw(alphas(distinct)))
    return selection, draw(st.integers(0, selection.n_heads))


@st.composite
def selections_with_heads(draw: st.DrawFn) -> tuple[HeadSelection, set[Head]]:
    selection = draw(selections)
    layers, width = selection.alpha.shape
    return selection, draw(st.sets(st.tuples(st.integers(0, layers - 1), st.integers(0, width - 1))))


def chosen(selection: HeadSelection) -> set[Head]:
    """The heads at 1; asserts that all others are at 0."""
    assert set(selection.alpha.flatten().tolist()) <= {0.0, 1.0}
    return {(layer, head) for layer, head in selection.alpha.nonzero().tolist()}


def all_heads(selection: HeadSelection) -> list[Head]:
    layers, width = selection.alpha.shape
    return [(layer, head) for layer in range(layers) for head in range(width)]


class TestRanking:
    @quick
    @hypothesis.given(selections)
    def test_is_by_falling_alpha_and_then_by_layer_and_head(self, selection: HeadSelection) -> None:
        expected = sorted(all_heads(selection), key=lambda at: (-selection.alpha[at].item(), at))
        assert selection.ranking() == expected

    @quick
    @hypothesis.given(selections_with_k())
    def test_top_is_its_beginning(self, drawn: tuple[HeadSelection, int]) -> None:
        selection, k = drawn
        assert chosen(selection.top(k)) == set(selection.ranking()[:k])

    @quick
    @hypothesis.given(selections_with_k())
    def test_bottom_takes_the_lowest_alphas_and_among_equals_the_first_heads(
        self, drawn: tuple[HeadSelection, int]
    ) -> None:
        selection, k = drawn
        expected = sorted(all_heads(selection), key=lambda at: (selection.alpha[at].item(), at))
        assert chosen(selection.bottom(k)) == set(expected[:k])

    @quick
    @hypothesis.given(selections_with_k(distinct=True))
    def test_top_and_bottom_complement_each_other(self, drawn: tuple[HeadSelection, int]) -> None:
        selection, k = drawn
        assert torch.equal(
            selection.top(k).alpha + selection.bottom(selection.n_heads - k).alpha, selection.ones().alpha
        )

    def test_equal_heads_are_taken_in_their_order(self) -> None:
        selection = HeadSelection(torch.full((2, 3), 0.3))
        assert selection.ranking() == all_heads(selection)
        assert chosen(selection.top(4)) == chosen(selection.bottom(4)) == {(0, 0), (0, 1), (0, 2), (1, 0)}


class TestBinary:
    @quick
    @hypothesis.given(selections_with_k(), st.integers(0, 3))
    def test_exactly_k_heads_are_taken(self, drawn: tuple[HeadSelection, int], seed: int) -> None:
        selection, k = drawn
        for taken in (selection.top(k), selection.bottom(k), selection.random(k, seed)):
            assert len(chosen(taken)) == taken.n_selected == k
            assert taken.alpha.dtype == selection.alpha.dtype

    @quick
    @hypothesis.given(selections)
    def test_k_is_by_default_the_number_of_alphas_above_a_half(self, selection: HeadSelection) -> None:
        k = sum(alpha > 0.5 for alpha in selection.alpha.flatten().tolist())
        assert selection.n_selected == k
        for taken in (selection.top(), selection.bottom(), selection.random()):
            assert len(chosen(taken)) == k

    @quick
    @hypothesis.given(selections, st.floats(0, 1, width=32))
    def test_hard_takes_what_lies_above_the_threshold(self, selection: HeadSelection, threshold: float) -> None:
        expected = {at for at in all_heads(selection) if selection.alpha[at].item() > threshold}
        assert chosen(selection.hard(threshold)) == expected

    @quick
    @hypothesis.given(selections)
    def test_hard_is_the_top_of_default_size(self, selection: HeadSelection) -> None:
        assert torch.equal(selection.hard().alpha, selection.top().alpha)

    @quick
    @hypothesis.given(selections_with_k())
    def test_what_is_binary_stays_as_it_is(self, drawn: tuple[HeadSelection, int]) -> None:
        binary = drawn[0].top(drawn[1])
        for again in (binary.hard(), binary.top(), binary.top(drawn[1]), HeadSelection.mean([binary, binary])):
            assert torch.equal(again.alpha, binary.alpha)

    @quick
    @hypothesis.given(selections)
    def test_ones_has_every_head_at_one(self, selection: HeadSelection) -> None:
        assert chosen(selection.ones()) == set(all_heads(selection))

    def test_the_share_of_binary_alphas_counts_those_within_a_tenth(self) -> None:
        alpha = torch.tensor([[0.0, 0.1, 0.11, 0.5], [0.89, 0.9, 0.95, 1.0]])
        assert HeadSelection(alpha).fraction_saturated == 5 / 8


class TestRandom:
    @quick
    @hypothesis.given(selections_with_k(), st.integers(-(2**62), 2**62))
    def test_the_draw_knows_nothing_of_alpha(self, drawn: tuple[HeadSelection, int], seed: int) -> None:
        selection, k = drawn
        other = HeadSelection(1 - selection.alpha, "another", "model")
        assert torch.equal(selection.random(k, seed).alpha, other.random(k, seed).alpha)

    def test_seeds_draw_different_heads(self) -> None:
        selection = HeadSelection(torch.rand(6, 6))
        assert len({frozenset(chosen(selection.random(18, seed))) for seed in range(20)}) == 20

    def test_every_head_is_drawn_about_as_often(self) -> None:
        selection = HeadSelection(torch.zeros(2, 4))
        counts = torch.stack([selection.random(2, seed).alpha for seed in range(400)]).sum(0)
        assert ((counts > 60) & (counts < 140)).all()  # 100 on average, with a standard deviation of 9


class TestKeepAndWithout:
    @quick
    @hypothesis.given(selections_with_heads())
    def test_split_alpha_between_them(self, drawn: tuple[HeadSelection, set[Head]]) -> None:
        selection, heads = drawn
        kept, rest = selection.keep(heads), selection.without(heads)
        for at in all_heads(selection):
            assert kept.alpha[at] == (selection.alpha[at] if at in heads else 0)
            assert rest.alpha[at] == (0 if at in heads else selection.alpha[at])
        assert torch.equal(kept.keep(heads).alpha, kept.alpha)
        assert torch.equal(rest.without(heads).alpha, rest.alpha)

    @quick
    @hypothesis.given(selections_with_heads())
    def test_take_pairs_or_a_mask(self, drawn: tuple[HeadSelection, set[Head]]) -> None:
        selection, heads = drawn
        mask = torch.zeros_like(selection.alpha, dtype=torch.bool)
        for at in heads:
            mask[at] = True
        assert torch.equal(selection.keep(mask).alpha, selection.keep(iter(heads)).alpha)
        assert torch.equal(selection.without(mask).alpha, selection.without(iter(heads)).alpha)

    @pytest.mark.parametrize("head", [(2, 0), (0, 3), (-1, 0), (0, -1)])
    @pytest.mark.parametrize("verb", [HeadSelection.keep, HeadSelection.without])
    def test_name_a_head_that_is_not_there(self, verb: Callable[..., HeadSelection], head: Head) -> None:
        message = rf"no head \({head[0]}, {head[1]}\): layers 0 to 1, heads 0 to 2"
        with pytest.raises(SitelensError, match=message):
            verb(HeadSelection(torch.zeros(2, 3)), [(0, 0), head])

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("mask", [torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 3), torch.zeros(2).bool()])
    def test_refuse_a_mask_that_does_not_fit(self, mask: Tensor) -> None:
        message = rf"boolean of shape \(2, 3\), not {mask.dtype} \({mask.shape[0]},"
        with pytest.raises(SitelensError, match=message):
            HeadSelection(torch.zeros(2, 3)).keep(mask)


class TestMean:
    @quick
    @hypothesis.given(st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def test_is_the_mean_of_each_head(self, seeds: list[int]) -> None:
        alphas = [torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mean = HeadSelection.mean([HeadSelection(alpha) for alpha in alphas])
        np.testing.assert_allclose(mean.alpha, np.mean([alpha.numpy() for alpha in alphas], axis=0), rtol=0, atol=1e-6)

    @quick
    @hypothesis.given(selections, st.integers(1, 9))
    def test_of_equals_is_the_same_and_stays_in_range(self, selection: HeadSelection, n: int) -> None:
        torch.testing.assert_close(HeadSelection.mean([selection] * n).alpha, selection.alpha, rtol=1e-6, atol=1e-7)

    def test_names_its_tasks_once_and_keeps_the_model(self) -> None:
        parts = [HeadSelection(torch.zeros(1, 2), task, "m") for task in ("a", "b", "a")]
        mean = HeadSelection.mean(parts)
        assert (mean.task, mean.model, mean.provenance) == ("a+b", "m", "mean of 3 selections")

    def test_of_none_is_refused(self) -> None:
        with pytest.raises(SitelensError, match="mean of no selections"):
            HeadSelection.mean([])

    @pytest.mark.parametrize(
        "other", [HeadSelection(torch.zeros(2, 3), model="b"), HeadSelection(torch.zeros(3, 2), model="a")]
    )
    def test_of_different_models_is_refused(self, other: HeadSelection) -> None:
        with pytest.raises(SitelensError, match="different models have no mean"):
            HeadSelection.mean([HeadSelection(torch.zeros(2, 3), model="a"), other])


DERIVATIONS: dict[str, tuple[Callable[[HeadSelection], HeadSelection], str]] = {
    "hard": (lambda s: s.hard(0.25), "hard(0.25)"),
    "top": (lambda s: s.top(1), "top(1)"),
    "bottom": (lambda s: s.bottom(1), "bottom(1)"),
    "random": (lambda s: s.random(1, seed=7), "random(1, seed=7)"),
    "keep": (lambda s: s.keep([(0, 0)]), "keep(1 heads)"),
    "without": (lambda s: s.without([(0, 0)]), "without(1 heads)"),
    "ones": (lambda s: s.ones(), "ones"),
}


@pytest.mark.parametrize("verb", DERIVATIONS)
class TestDerived:
    @quick
    @hypothesis.given(selection=selections)
    def test_alpha_itself_never_changes(self, verb: str, selection: HeadSelection) -> None:
        before = selection.alpha.clone()
        derived = DERIVATIONS[verb][0](selection)
        derived.alpha.fill_(0.125)  # its memory is not shared
        assert torch.equal(selection.alpha, before)

    @quick
    @hypothesis.given(selection=selections)
    def test_task_and_model_stay_and_provenance_grows(self, verb: str, selection: HeadSelection) -> None:
        derive, how = DERIVATIONS[verb]
        derived = derive(selection)
        assert (derived.task, derived.model) == (selection.task, selection.model)
        assert derived.provenance == f"{selection.provenance} | {how}"
        assert derive(derived).provenance == f"{selection.provenance} | {how} | {how}"

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_dtype_stays(self, verb: str, dtype: torch.dtype) -> None:
        assert DERIVATIONS[verb][0](HeadSelection(torch.rand(2, 3, dtype=dtype))).alpha.dtype == dtype


class TestFiles:
    @quick
    @hypothesis.given(selections, st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    def test_a_saved_selection_comes_back(self, selection: HeadSelection, dtype: torch.dtype) -> None:
        selection = replace(selection, alpha=selection.alpha.to(dtype))
        with tempfile.TemporaryDirectory() as folder:
            loaded = HeadSelection.load(selection.save(Path(folder) / "new" / "alpha.safetensors"))
            assert torch.equal(loaded.alpha, selection.alpha)
        assert loaded.alpha.dtype == dtype
        assert (loaded.task, loaded.model, loaded.provenance) == (selection.task, selection.model, selection.provenance)

    def test_what_was_loaded_is_independent_of_its_file(self, tmp_path: Path) -> None:
        path = HeadSelection(torch.full((8, 8), 0.75)).save(tmp_path / "alpha.safetensors")
        loaded = HeadSelection.load(path)
        path.write_bytes(bytes(path.stat().st_size))  # overwritten in place, as by `cp`
        assert (loaded.alpha == 0.75).all()

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SitelensError, match=r"there is no file .*nowhere.safetensors"):
            HeadSelection.load(tmp_path / "nowhere.safetensors")

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        path = HeadSelection(torch.rand(2, 3)).save(tmp_path / "alpha.safetensors")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedArtifactError, match=r"alpha.safetensors is damaged"):
            HeadSelection.load(path)

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = TaskEmbedding(torch.rand(1, 2, 3), "any", None, 1, 0, 0).save(tmp_path / "mean_z.safetensors")
        with pytest.raises(SitelensError, match=r"mean_z.safetensors holds a embedding, not a selection"):
            HeadSelection.load(path)


class TestBadInput:
    @pytest.mark.parametrize("verb", [HeadSelection.top, HeadSelection.bottom, HeadSelection.random])
    @pytest.mark.parametrize("k", [-1, 7])
    def test_k_is_a_number_of_heads(self, verb: Callable[..., HeadSelection], k: int) -> None:
        with pytest.raises(SitelensError, match=f"k must lie in 0 to 6, the number of heads; got {k}"):
            verb(HeadSelection(torch.rand(2, 3)), k)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
    def test_a_threshold_lies_in_the_range_of_alpha(self, threshold: float) -> None:
        with pytest.raises(SitelensError, match=rf"threshold must lie in \[0, 1\], got {threshold}"):
            HeadSelection(torch.rand(2, 3)).hard(threshold)

    @pytest.mark.parametrize(
        ("wrong", "span"),
        [(-0.01, "-0.01 to 0.5"), (1.01, "0.5 to 1.01"), (float("inf"), "0.5 to inf"), (float("nan"), "nan to nan")],
    )
    def test_alpha_lies_between_zero_and_one(self, wrong: float, span: str) -> None:
        alpha = torch.full((2, 3), 0.5)
        alpha[1, 2] = wrong
        with pytest.raises(SitelensError, match=rf"must lie in \[0, 1\] and be a number; it spans {span}"):
            HeadSelection(alpha)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("alpha", "what"),
        [(torch.zeros(6), r"torch.float32 of shape \(6,\)"),
         (torch.zeros(1, 2, 3), r"torch.float32 of shape \(1, 2, 3\)"),
         (torch.zeros(2, 3, dtype=torch.complex64), r"torch.complex64 of shape \(2, 3\)"),
         (torch.zeros(0, 3), r"torch.float32 of shape \(0, 3\)"),
         (torch.zeros(2, 3, device="meta"), "a Tensor"), ([[0.5], [0.5, 0.5]], r"\[\[0.5\], \[0.5, 0.5\]\]"),
         (None, "None"), ("soft", "'soft'"), ([["a"]], r"\[\['a'\]\]")],
    )  # fmt: skip
    def test_alpha_is_a_matrix_of_numbers(self, alpha: Any, what: str) -> None:
        with pytest.raises(SitelensError, match=rf"^alpha must be numbers of shape \[layer head\], not {what}$"):
            HeadSelection(alpha)

    @pytest.mark.parametrize(
        "alpha",
        [[[0, 1], [0.25, 1]], np.array([[0, 1], [0.25, 1]]), pd.DataFrame([[0, 1], [0.25, 1]]),
         torch.tensor([[0, 1], [0.25, 1]], requires_grad=True), torch.tensor([[0, 1], [0.25, 1]]).to_sparse()],
        ids=["list", "array", "DataFrame", "with gradient", "sparse"],
    )  # fmt: skip
    @pytest.mark.usefixtures("unchecked")
    def test_lists_and_arrays_become_a_tensor(self, alpha: Any) -> None:
        selection = HeadSelection(alpha)
        assert selection.alpha.tolist() == [[0, 1], [0.25, 1]] and selection.alpha.is_floating_point()
        assert not selection.alpha.requires_grad and selection.top().n_selected == 2

    def test_whole_numbers_and_booleans_are_an_alpha(self) -> None:
        for alpha in (torch.ones(2, 3, dtype=torch.bool), [[1, 1, 1], [1, 1, 1]]):
            assert HeadSelection(alpha).alpha.tolist() == torch.ones(2, 3).tolist()  # type: ignore[arg-type]

    def test_another_model_is_refused(self) -> None:
        model = micro.bridge("GPT2")
        HeadSelection(torch.zeros(2, 4), model=fingerprint(model)).check_fits(model)
        HeadSelection(torch.zeros(2, 4)).check_fits(model)
        with pytest.raises(SitelensError, match=r"selection of 'any' was made with another model .*feedfeed"):
            HeadSelection(torch.zeros(2, 4), "any", "feedfeed").check_fits(model)
        with pytest.raises(SitelensError, match=r"selection of 'any' has shape \(4, 2\) .*GPT2 has \(2, 4\)"):
            HeadSelection(torch.zeros(4, 2), "any").check_fits(model)


class TestFigureAndFrame:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_heatmap_has_layers_by_heads_on_a_fixed_scale(self, dtype: torch.dtype) -> None:
        alpha = torch.rand(3, 5, dtype=dtype)
        (trace,) = HeadSelection(alpha).heatmap().data
        np.testing.assert_array_equal(trace.z, alpha.double())
        assert (trace.zmin, trace.zmax) == (0, 1)

    def test_the_hover_has_layer_head_and_alpha(self) -> None:
        figure: Any = HeadSelection(torch.rand(3, 5)).heatmap()
        (trace,) = figure.data
        assert [part in trace.hovertemplate for part in ("layer %{y}", "head %{x}", "alpha %{z")] == [True] * 3
        assert trace.x is None and trace.y is None  # so that x and y are heads and layers, counted from 0
        assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Head", "Layer")

    @pytest.mark.parametrize(
        ("task", "given", "title"),
        [("antonym", None, "Head selection: antonym"), ("", None, "Head selection"), ("antonym", "Own", "Own")],
    )
    def test_the_heatmap_is_titled(self, task: str, given: str | None, title: str) -> None:
        figure: Any = HeadSelection(torch.rand(2, 2), task).heatmap(given)
        assert figure.layout.title.text == title

    @quick
    @hypothesis.given(selections)
    def test_the_frame_has_a_row_a_head(self, selection: HeadSelection) -> None:
        frame = selection.frame()
        assert frame.columns.tolist() == ["layer", "head", "alpha"]
        assert list(zip(frame["layer"], frame["head"], strict=True)) == all_heads(selection)
        assert frame["alpha"].tolist() == selection.alpha.flatten().tolist()
