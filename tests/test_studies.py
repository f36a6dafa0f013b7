"""Studies on a micro model: the content of each frame, its numbers recomputed by hand, and rejected input."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import sitelens as sl
from sitelens import figures, studies
from sitelens.conditions.base import Condition
from sitelens.evaluation import cached as scoring
from sitelens.heads import attention_roles, indirect_effects, induction_scores
from sitelens.methods.site import train as training
from sitelens.methods.site.train import TrainResult
from sitelens.models.model import Bridge
from sitelens.settings import settings
from sitelens.store.folder import default_store
from sitelens.studies import heads as heads_study
from sitelens.studies import patching
from sitelens.studies.common import Prepared, head_counts_up_to
from tests import micro

CONFIG = sl.TrainConfig(n_steps=4, eval_every=2, n_valid=4, lr=1.0, seed=1)
OPTIONS: dict[str, Any] = {"n_items": 7, "seed": 2}
MEASURED = ["mean", "low", "high", "n", "loss"]


@pytest.fixture(scope="module")
def model() -> Bridge:
    """A Llama in float64, so that alpha is the same for a batch and for its parts."""
    return micro.bridge("Llama", torch.float64)


@pytest.fixture(scope="module")
def tasks(model: Bridge) -> list[sl.Task]:
    """Two tasks for which the untouched model gets about every other item right, so that accuracies differ."""
    found = []
    for name, offset in (("one", 0), ("two", 40)):
        inputs = [micro.WORDS[(i + offset) % 96] for i in range(56)]
        said = sl.generate([f"Q: {word}\nA:" for word in inputs], model=model, max_new_tokens=1)
        known = [text if text in micro.WORDS else micro.WORDS[0] for text in said]
        pairs = [(word, known[i] if i % 2 else micro.WORDS[(7 * i) % 96]) for i, word in enumerate(inputs)]
        found.append(sl.Task.from_pairs(name, pairs))
    return found


class TrainedAnewError(Exception):
    """Raised in place of training or evaluation, to show that a result was not in the cache."""


def refuse_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TrainedAnewError

    monkeypatch.setattr(training, "train_runs", refuse)
    monkeypatch.setattr(scoring, "evaluate", refuse)


def trained(task: sl.Task, model: Bridge, config: sl.TrainConfig = CONFIG) -> tuple[sl.TaskEmbedding, TrainResult]:
    """The task's embedding with the seed of OPTIONS, and the result of training on it without the cache."""
    default_store().clear("selection")
    vector = sl.embed_task(task, model, seed=OPTIONS["seed"])
    return vector, sl.train_selection(task, model, embedding=vector, config=config)


def assert_measured(
    row: pd.Series, task: sl.Task, condition: Condition, model: Bridge, mean: str = "mean", **more: Any
) -> None:
    """Assert that a row's accuracy and loss are those of a separate evaluation of the condition."""
    scores = sl.evaluate(task, {"it": condition}, model, **{**OPTIONS, **more})
    (summary,) = sl.summarize(scores).to_dict("records")
    ends = ("low", "high") if mean == "mean" else (f"{mean}_low", f"{mean}_high")
    assert [row[mean], *row[list(ends)]] == pytest.approx([summary[name] for name in ("mean", "low", "high")])
    if mean == "mean":
        assert row["n"] == len(scores)
        assert row["loss"] == pytest.approx(-scores["logprob"].mean(), abs=1e-7)


def only(frame: pd.DataFrame, **facts: Any) -> pd.Series:
    """The only row with these values."""
    for name, value in facts.items():
        frame = frame[frame[name] == value]
    (row,) = (row for _, row in frame.iterrows())
    return row


STUDIES: dict[str, tuple[Callable[..., pd.DataFrame], dict[str, Any], list[str], int]] = {
    "soft_hard": (
        studies.soft_hard, {"thresholds": (0.2, 0.8)},
        ["task", "threshold", "n_heads", *MEASURED, "soft", "soft_low", "soft_high", "gap"], 4,
    ),
    "random_heads": (studies.random_heads, {"ks": (1, 3), "draws": 2}, ["task", "heads", "k", "draw", *MEASURED], 12),
    "head_counts": (studies.head_counts, {"ks": (1, 3)}, ["task", "order", "change", "k", *MEASURED], 16),
    "task_agnostic": (studies.task_agnostic, {"n_shots": 2}, ["task", "condition", *MEASURED], 10),
    "mixing": (studies.mixing, {}, ["task", "mixing", "n_heads", "fraction_saturated", "hard", *MEASURED], 8),
    "prompt_counts": (
        studies.prompt_counts, {"n_prompts": (1, 3), "n_shots": (1, 2)},
        ["task", "n_prompts", "n_shots", *MEASURED, "few_shot", "few_shot_low", "few_shot_high"], 8,
    ),
    "seed_variance": (
        studies.seed_variance, {"prompt_seeds": (0, 3), "training_seeds": (0, 1, 2), "n_prompts": 3, "n_shots": 2},
        ["task", "prompt_seed", "training_seed", "n_heads", *MEASURED], 12,
    ),
    "initializations": (
        studies.initializations, {"inits": (0.3, "random")},
        ["task", "init", "seed", "valid_loss", "n_heads", "fraction_saturated", *MEASURED], 8,
    ),
    "initialization_distances": (
        studies.initialization_distances, {"inits": (0.3, "random")},
        ["task", "init_a", "seed_a", "init_b", "seed_b", "pair", "distance", "pearson", "hard_agreement"], 12,
    ),
    "checkpoints": (studies.checkpoints, {}, ["task", "checkpoint", "step", "valid_loss", *MEASURED], 4),
    "alpha_distribution": (studies.alpha_distribution, {}, ["task", "alpha", "share"], 40),
    "alpha_distribution by layer": (
        studies.alpha_distribution, {"by": "layer"}, ["task", "layer", "mean", "on", "binary"], 4,
    ),
    "alpha_distribution by step": (
        studies.alpha_distribution, {"by": "step", "steps": (1, 3)}, ["task", "step", "alpha", "share"], 80,
    ),
    "head_overlap": (
        studies.head_overlap, {"k": 3, "n_prompts": 2, "n_shots": 2},
        ["task", "kind", "k", "shared", "share", "expected", "p", "auc", "spearman"], 6,
    ),
    "shared_attention": (
        studies.shared_attention, {"n_prompts": 2, "n_shots": 2},
        ["task_a", "task_b", "layer", "head", "group", "role", "share_a", "share_b", "distance"], 40,
    ),
}  # fmt: skip
generic = pytest.mark.filterwarnings("ignore:the shared alpha:sitelens.SitelensWarning")


LONG = (
    "initialization_distances",
    "initializations",
    "prompt_counts",
    "mixing",
    "checkpoints",
    "task_agnostic",
    "seed_variance",
)


@generic
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in STUDIES]
)
def test_a_study_has_its_columns_and_the_same_numbers_again(
    name: str, model: Bridge, tasks: list[sl.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, more, columns, rows = STUDIES[name]
    frame = study(tasks, model, config=CONFIG, **more, **OPTIONS)
    assert sorted(frame.columns) == sorted(columns) and len(frame) == rows
    assert frame.index.tolist() == list(range(rows))
    figure = getattr(figures, name.split()[0])(frame)
    assert sum(len(trace.x) for trace in figure.data if trace.hoverinfo != "skip") > 0
    if "task" in frame:
        assert set(frame["task"]) == {"one", "two"}
    for kind in ("selection", "scores"):
        default_store().clear(kind)
    again = study((task for task in tasks), model, config=CONFIG, **more, **OPTIONS)
    pd.testing.assert_frame_equal(again, frame)
    refuse_to_compute(monkeypatch)
    pd.testing.assert_frame_equal(study(tasks, model, config=CONFIG, **more, **OPTIONS), frame)


@pytest.mark.parametrize("name", STUDIES)
def test_without_tasks_a_study_says_so(name: str, model: Bridge) -> None:
    study, more, _, _ = STUDIES[name]
    with pytest.raises(sl.SitelensError, match=r"give at least (one task|2 tasks), got 0"):
        study([], model, config=CONFIG, **more, **OPTIONS)


@pytest.mark.parametrize("study", [studies.task_agnostic, studies.shared_attention])
def test_one_task_has_nothing_to_share_and_nothing_is_trained(
    study: Any, model: Bridge, tasks: list[sl.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_compute(monkeypatch)
    with pytest.raises(sl.SitelensError, match="give at least 2 tasks, got 1"):
        study(tasks[:1], model, config=CONFIG)


BAD: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "k too large": (studies.head_counts, {"ks": (1, 9)}, "k must lie in 0 to 8, the number of heads; got 9"),
    "negative k": (studies.random_heads, {"ks": (-1,)}, r"ks\[0\] must be at least 0, got -1"),
    "k of overlap": (studies.head_overlap, {"k": 20}, "k must lie in 0 to 8, the number of heads; got 20"),
    "no draws": (studies.random_heads, {"draws": 0}, "draws must be at least 1, got 0"),
    "threshold": (studies.soft_hard, {"thresholds": (0.5, 1.2)}, r"thresholds\[1\] must lie in \[0, 1\], got 1.2"),
    "no threshold": (studies.soft_hard, {"thresholds": ()}, r"thresholds must lie in \[0, 1\], got none"),
    "by": (studies.alpha_distribution, {"by": "head"}, "by must be 'task', 'layer' or 'step', not 'head'"),
    "steps": (studies.alpha_distribution, {"by": "step", "steps": (0,)}, r"steps\[0\] must be at least 1, got 0"),
    "inits": (studies.initializations, {"inits": (1.5,)}, "init must be 'random' or lie between 0 and 1, got 1.5"),
    "shots": (studies.prompt_counts, {"n_shots": (1, 90)}, "'one' has too few training items for 90 shots"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_trained(
    case: str, model: Bridge, tasks: list[sl.Task], monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    study, more, message = BAD[case]
    refuse_to_compute(monkeypatch)
    with pytest.raises(sl.SitelensError, match=message):
        study(tasks, model, config=CONFIG, **more, **OPTIONS)


def test_the_split_is_measured_that_is_asked_for(model: Bridge, tasks: list[sl.Task]) -> None:
    frame = studies.checkpoints(tasks[:1], model, config=CONFIG, split="valid", n_items=None)
    assert frame["n"].tolist() == [len(tasks[0].valid)] * 2
    vector = sl.embed_task(tasks[0], model)
    best = sl.train_selection(tasks[0], model, embedding=vector, config=CONFIG).selection
    assert_measured(frame.iloc[0], tasks[0], sl.PatchHeads(best, vector), model, split="valid", n_items=None, seed=0)


class TestSoftHard:
    def test_each_threshold_is_the_evaluation_of_its_hard_selection(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.soft_hard(tasks, model, thresholds=(0.0, 0.4, 0.7, 1.0), config=CONFIG, **OPTIONS)
        for task in tasks:
            vector, result = trained(task, model)
            for threshold in (0.0, 0.4, 0.7, 1.0):
                row = only(frame, task=task.name, threshold=threshold)
                hard = result.selection.hard(threshold)
                assert_measured(row, task, sl.PatchHeads(hard, vector), model)
                assert_measured(row, task, sl.PatchHeads(result.selection, vector), model, mean="soft")
                assert row["n_heads"] == int((result.selection.alpha > threshold).sum())
                assert row["gap"] == pytest.approx(row["soft"] - row["mean"])
        assert frame.groupby("task")["n_heads"].agg(["first", "last"]).to_numpy().tolist() == [[8, 0], [8, 0]]
        assert frame["n_heads"].dtype.kind == "i" and frame["loss"].nunique() >= 6

    def test_additive_training_is_evaluated_additively(self, model: Bridge, tasks: list[sl.Task]) -> None:
        config = replace(CONFIG, mixing="additive")
        frame = studies.soft_hard(tasks[:1], model, thresholds=(0.4,), config=config, **OPTIONS)
        vector, result = trained(tasks[0], model, config)
        assert_measured(frame.iloc[0], tasks[0], sl.PatchHeads(result.selection.hard(0.4), vector, "additive"), model)


class TestRandomHeads:
    def test_a_draw_is_that_of_the_selection_and_its_seed(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.random_heads(tasks, model, ks=(2, 5), draws=3, config=CONFIG, **OPTIONS)
        for task in tasks:
            vector, result = trained(task, model)
            for k in (2, 5):
                top = only(frame, task=task.name, heads="high-alpha", k=k)
                assert top["draw"] == 0
                assert_measured(top, task, sl.PatchHeads(result.selection.top(k), vector), model)
                for draw in range(3):
                    row = only(frame, task=task.name, heads="random", k=k, draw=draw)
                    assert_measured(row, task, sl.PatchHeads(result.selection.random(k, draw), vector), model)
        drawn = frame[(frame["heads"] == "random") & (frame["k"] == 2) & (frame["task"] == "one")]
        assert drawn["loss"].nunique() == 3

    def test_by_default_counts_go_from_none_to_all(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.random_heads(tasks[:1], model, draws=1, config=CONFIG, **OPTIONS)
        assert frame["k"].drop_duplicates().tolist() == list(range(9))
        counts = head_counts_up_to(270)
        assert counts == tuple(sorted(set(counts))) and {0, 1, 2, 4, 8, 270} <= set(counts) and 16 <= len(counts) <= 24
        assert max(b - a for a, b in pairwise(counts)) <= 18


class TestHeadCounts:
    def test_its_ends_are_conditions_known_otherwise(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.head_counts(tasks, model, ks=range(9), config=CONFIG, **OPTIONS)
        for task in tasks:
            vector, result = trained(task, model)
            ends = {
                ("added", 0): sl.ZeroShot(), ("removed", 8): sl.ZeroShot(),
                ("added", 8): sl.PatchHeads(result.selection.ones(), vector),
                ("removed", 0): sl.PatchHeads(result.selection, vector),
            }  # fmt: skip
            for (change, k), condition in ends.items():
                for order in ("high-alpha", "low-alpha"):
                    row = only(frame, task=task.name, change=change, k=k, order=order)
                    assert_measured(row, task, condition, model)

    def test_between_them_heads_go_by_alpha(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame, task = studies.head_counts(tasks[:1], model, ks=(3,), config=CONFIG, **OPTIONS), tasks[0]
        vector, result = trained(task, model)
        ranks = result.selection.alpha.flatten().argsort(descending=True, stable=True)
        for order, chosen in (("high-alpha", ranks[:3]), ("low-alpha", ranks[-3:])):
            mask = torch.zeros(8, dtype=torch.bool).index_fill(0, chosen, True).reshape(2, 4)
            alphas = {"added": mask.double(), "removed": result.selection.alpha * ~mask}
            for change, alpha in alphas.items():
                row = only(frame, order=order, change=change)
                assert_measured(row, task, sl.PatchHeads(sl.HeadSelection(alpha), vector), model)
        assert frame["loss"].nunique() == 4


class TestTaskAgnostic:
    @generic
    def test_every_condition_by_itself(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.task_agnostic(tasks, model, n_shots=2, config=CONFIG, **OPTIONS)
        own = {task.name: trained(task, model) for task in tasks}
        vectors = {name: vector for name, (vector, _) in own.items()}
        default_store().clear("selection")
        shared = sl.train_selections(tasks, model, embeddings=vectors, seeds=(1,), config=CONFIG, shared=True)
        mean = sl.HeadSelection(torch.stack([result.selection.alpha for _, result in own.values()]).mean(0))
        for task in tasks:
            vector, result = own[task.name]
            conditions = {
                "zero-shot": sl.ZeroShot(), "2-shot": sl.FewShot(2),
                "own alpha": sl.PatchHeads(result.selection, vector),
                "shared alpha": sl.PatchHeads(shared[task.name, 1].selection, vector),
                "mean alpha": sl.PatchHeads(mean, vector),
            }  # fmt: skip
            assert frame.loc[frame["task"] == task.name, "condition"].tolist() == list(conditions)
            for name, condition in conditions.items():
                assert_measured(only(frame, task=task.name, condition=name), task, condition, model)
        assert frame.loc[frame["task"] == "one", "loss"].nunique() == 5

    @pytest.mark.parametrize(
        ("own", "shared", "generic"), [(0.5, 0.49, True), (0.5, 0.9, True), (0.5, 0.45, False), (0.11, 0.11, False)]
    )
    def test_a_shared_alpha_as_good_as_helpful_own_ones_is_warned_of(
        self, own: float, shared: float, generic: bool, model: Bridge, tasks: list[sl.Task],
        monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder,
    ) -> None:  # fmt: skip
        means = {"zero-shot": 0.1, "10-shot": 0.2, "own alpha": own, "shared alpha": shared, "mean alpha": 0.3}

        def measure(task: sl.Task, *rest: Any) -> pd.DataFrame:
            difference = 0.1 if task.name == "one" else -0.1  # the mean over tasks counts
            return pd.DataFrame([{"condition": name, "mean": value + difference} for name, value in means.items()])

        monkeypatch.setattr(patching, "measure", measure)
        if generic:
            with pytest.warns(sl.SitelensWarning, match=rf"shared alpha \({shared:.2f}\) is as good .*\({own:.2f}\)"):
                studies.task_agnostic(tasks, model, config=CONFIG)
        else:
            studies.task_agnostic(tasks, model, config=CONFIG)
            assert not recwarn.list


def test_mixing_trains_and_evaluates_under_both(model: Bridge, tasks: list[sl.Task]) -> None:
    frame = studies.mixing(tasks, model, config=CONFIG, **OPTIONS)
    assert frame["task"].tolist() == ["one"] * 4 + ["two"] * 4
    for task in tasks:
        for kind in ("convex", "additive"):
            vector, result = trained(task, model, replace(CONFIG, mixing=kind))
            for hard in (False, True):
                row = only(frame, task=task.name, mixing=kind, hard=hard)
                alpha = result.selection.hard() if hard else result.selection
                assert_measured(row, task, sl.PatchHeads(alpha, vector, kind), model)
                facts = (result.selection.n_selected, result.selection.fraction_saturated)
                assert (row["n_heads"], row["fraction_saturated"]) == facts
    assert frame["loss"].nunique() == 8


def test_prompt_counts_embed_train_and_evaluate_each_cell(model: Bridge, tasks: list[sl.Task]) -> None:
    frame = studies.prompt_counts(tasks, model, n_prompts=(1, 4), n_shots=(1, 3), config=CONFIG, **OPTIONS)
    for task in tasks:
        for m in (1, 4):
            for n in (1, 3):
                default_store().clear("selection")
                vector = sl.embed_task(task, model, n_prompts=m, n_shots=n, seed=OPTIONS["seed"])
                result = sl.train_selection(task, model, embedding=vector, config=CONFIG)
                row = only(frame, task=task.name, n_prompts=m, n_shots=n)
                assert_measured(row, task, sl.PatchHeads(result.selection, vector), model)
                assert_measured(row, task, sl.FewShot(n), model, mean="few_shot")
    assert frame["loss"].nunique() == 8


class TestSeedVariance:
    def test_each_cell_has_its_prompt_seed_and_training_seed(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.seed_variance(
            tasks, model, prompt_seeds=(0, 3), training_seeds=(0, 5), n_prompts=2, n_shots=2, config=CONFIG, **OPTIONS
        )
        for task in tasks:
            for prompt_seed in (0, 3):
                vector = sl.embed_task(task, model, n_prompts=2, n_shots=2, seed=prompt_seed)
                for seed in (0, 5):
                    default_store().clear("selection")
                    config = replace(CONFIG, seed=seed)
                    alpha = sl.train_selection(task, model, embedding=vector, config=config).selection
                    row = only(frame, task=task.name, prompt_seed=prompt_seed, training_seed=seed)
                    assert_measured(row, task, sl.PatchHeads(alpha, vector), model)
                    assert row["n_heads"] == alpha.n_selected
        assert frame["loss"].nunique() == 8

    def test_components_by_hand(self) -> None:
        cells = [(p, t, mean) for p, row in enumerate([[0.2, 0.4], [0.6, 0.8]]) for t, mean in enumerate(row)]
        frame = pd.DataFrame(cells, columns=["prompt_seed", "training_seed", "mean"]).assign(task="b", n=100)
        other = frame.assign(task="a", mean=0.5, n=25)
        found = studies.variance_components(pd.concat([frame, other], ignore_index=True))
        deviations = ["prompt_sd", "training_sd", "residual_sd", "total_sd"]
        assert found.columns.tolist() == ["task", "mean", *deviations, "item_se"]
        assert found["task"].tolist() == ["b", "a"]
        # Means over the other seed are 0.3 and 0.7, and 0.4 and 0.6: variance d^2 / 2, where d is their difference.
        # They explain the whole table, so the residual is 0.
        by_hand = [0.5, 0.08**0.5, 0.02**0.5, 0, 0.1**0.5, 0.05]
        assert found.iloc[0, 1:].tolist() == pytest.approx(by_hand, abs=1e-9)
        assert found.iloc[1, 1:].tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0.1])

    def test_a_residual_takes_what_neither_seed_explains(self) -> None:
        cells = [(p, t, 0.5 + 0.1 * ((p + t) % 2)) for p in range(2) for t in range(2)]
        frame = pd.DataFrame(cells, columns=["prompt_seed", "training_seed", "mean"]).assign(task="a", n=100)
        found = studies.variance_components(frame).iloc[0]
        assert found["prompt_sd"] == found["training_sd"] == 0
        variance = 4 * 0.05**2 / 3  # of four numbers about their mean
        assert found["residual_sd"] == found["total_sd"] == pytest.approx(variance**0.5)

    @pytest.mark.parametrize("deviations", [(0.06, 0.02, 0.03), (0.0, 0.05, 0.04), (0.0, 0.0, 0.05), (0.04, 0.0, 0.0)])
    def test_components_are_those_of_simulated_runs(self, deviations: tuple[float, float, float]) -> None:
        rng, tasks, n_prompts, n_training = np.random.default_rng(0), 300, 5, 4
        prompt, training, residual = (
            rng.normal(0, sd, (tasks, *shape))
            for sd, shape in zip(deviations, [(n_prompts, 1), (1, n_training), (n_prompts, n_training)], strict=True)
        )
        index = pd.MultiIndex.from_product([range(tasks), range(n_prompts), range(n_training)])
        means = 0.6 + prompt + training + residual
        frame = pd.Series(means.flatten(), index.set_names(["task", "prompt_seed", "training_seed"]), name="mean")
        found = studies.variance_components(frame.reset_index().assign(n=100))
        variances = found[["prompt_sd", "training_sd", "residual_sd"]] ** 2
        assert (variances >= 0).all(axis=None)
        assert (variances.sum(axis=1) - found["total_sd"] ** 2).abs().max() < 1e-12
        for name, true in zip(variances, deviations, strict=True):
            assert variances[name].mean() ** 0.5 == pytest.approx(true, rel=0.1, abs=0.35 * 0.05 if true == 0 else None)
            if true == 0:
                assert variances[name].median() < 1e-9 or name == "residual_sd"

    def test_a_pair_of_seeds_that_is_missing_or_there_twice_is_an_error(self) -> None:
        cells = [(p, t, 0.5) for p in range(2) for t in range(2)]
        frame = pd.DataFrame(cells, columns=["prompt_seed", "training_seed", "mean"]).assign(task="a", n=100)
        for wrong in (frame.iloc[:3], pd.concat([frame, frame.iloc[:1]])):
            with pytest.raises(sl.SitelensError, match="task 'a' must have every prompt seed with every training seed"):
                studies.variance_components(wrong)
        with pytest.raises(sl.SitelensError, match="no column n: give the frame of seed_variance"):
            studies.variance_components(frame.drop(columns="n"))

    def test_one_seed_of_a_kind_leaves_its_share_open(self) -> None:
        cells = [(p, 0, mean) for p, mean in enumerate((0.4, 0.6))]
        frame = pd.DataFrame(cells, columns=["prompt_seed", "training_seed", "mean"]).assign(task="a", n=100)
        found = studies.variance_components(frame).iloc[0]
        assert found["prompt_sd"] == found["total_sd"] == pytest.approx(0.02**0.5)
        assert found[["training_sd", "residual_sd"]].isna().all()

    def test_one_seed_shows_no_variance(self) -> None:
        frame = pd.DataFrame({"task": ["a"], "prompt_seed": [0], "training_seed": [0], "mean": [0.5], "n": [4]})
        found = studies.variance_components(frame)
        assert (
            found[["prompt_sd", "training_sd", "residual_sd", "total_sd"]].isna().all(axis=None)
            and found["item_se"][0] == 0.25
        )


class TestInitializations:
    inits = (0.3, "random")

    def test_each_run_starts_where_it_says(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.initializations(tasks, model, inits=self.inits, seeds=(0, 4), config=CONFIG, **OPTIONS)
        for task in tasks:
            for init in self.inits:
                for seed in (0, 4):
                    vector, result = trained(task, model, replace(CONFIG, init=init, seed=seed))
                    row, alpha = only(frame, task=task.name, init=str(init), seed=seed), result.selection
                    assert_measured(row, task, sl.PatchHeads(alpha, vector), model)
                    assert (row["n_heads"], row["fraction_saturated"]) == (alpha.n_selected, alpha.fraction_saturated)
                    lowest = result.history["valid_loss"].dropna().to_numpy().min()
                    assert row["valid_loss"] == pytest.approx(lowest, abs=1e-8)
        assert frame["loss"].nunique() == 8

    def test_distances_by_hand(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.initialization_distances(tasks, model, inits=self.inits, seeds=(0, 4), config=CONFIG, **OPTIONS)
        assert frame["task"].tolist() == ["one"] * 6 + ["two"] * 6
        for task in tasks:
            keys = [(init, seed) for init in self.inits for seed in (0, 4)]
            alphas = [trained(task, model, replace(CONFIG, init=i, seed=s))[1].selection.alpha for i, s in keys]
            for (one, a), (other, b) in combinations(zip(keys, alphas, strict=True), 2):
                row = only(frame, task=task.name, init_a=str(one[0]), seed_a=one[1], init_b=str(other[0]),
                           seed_b=other[1])  # fmt: skip
                x, y = a.flatten().numpy(), b.flatten().numpy()
                assert row["distance"] == pytest.approx(np.abs(x - y).mean(), abs=1e-8)
                assert row["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
                assert row["hard_agreement"] == np.mean((x > 0.5) == (y > 0.5))
                same = (one[0] == other[0], one[1] == other[1])
                assert row["pair"] == {(True, False): "same init", (False, True): "same seed"}.get(same, "both differ")
        assert frame["pair"].value_counts().to_dict() == {"same init": 4, "same seed": 4, "both differ": 4}


class TestLossPath:
    @pytest.fixture
    def ends(self, model: Bridge) -> tuple[sl.HeadSelection, sl.HeadSelection]:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.rand(2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        return sl.HeadSelection(a), sl.HeadSelection(b)

    @pytest.mark.parametrize("mixing", ["convex", "additive"])
    def test_it_goes_straight_from_one_alpha_to_the_other(
        self, mixing: Any, model: Bridge, tasks: list[sl.Task], ends: tuple[sl.HeadSelection, sl.HeadSelection]
    ) -> None:
        (a, b), task, vector = ends, tasks[0], sl.embed_task(tasks[0], model)
        frame = studies.loss_path(task, a, b, vector, model, points=5, mixing=mixing, **OPTIONS)
        assert set(frame.columns) == {"task", "position", *MEASURED}
        assert frame["position"].tolist() == [0, 0.25, 0.5, 0.75, 1]
        for position, (_, row) in zip(frame["position"], frame.iterrows(), strict=True):
            alpha = sl.HeadSelection((1 - position) * a.alpha + position * b.alpha)
            assert_measured(row, task, sl.PatchHeads(alpha, vector, mixing), model, split="valid")
        assert frame["loss"].nunique() == 5

    def test_another_split_may_be_asked_for(
        self, model: Bridge, tasks: list[sl.Task], ends: tuple[sl.HeadSelection, sl.HeadSelection]
    ) -> None:
        vector = sl.embed_task(tasks[0], model)
        frame = studies.loss_path(tasks[0], *ends, vector, model, points=2, split="test", **OPTIONS)
        assert_measured(frame.iloc[0], tasks[0], sl.PatchHeads(ends[0], vector), model)

    def test_one_point_or_another_model_is_refused(
        self, model: Bridge, tasks: list[sl.Task], ends: tuple[sl.HeadSelection, sl.HeadSelection]
    ) -> None:
        a, b = ends
        vector = sl.embed_task(tasks[0], model)
        with pytest.raises(sl.SitelensError, match="points must be at least 2, got 1"):
            studies.loss_path(tasks[0], a, b, vector, model, points=1)
        wide, foreign = sl.HeadSelection(torch.ones(3, 4)), replace(a, model="other")
        for first, second in ((a, foreign), (foreign, b), (a, wide), (wide, b)):
            with pytest.raises(sl.SitelensError, match="the selection of ''"):
                studies.loss_path(tasks[0], first, second, vector, model)


def test_checkpoints_are_the_step_of_lowest_validation_loss_and_the_final_one(
    model: Bridge, tasks: list[sl.Task]
) -> None:
    config = replace(CONFIG, n_steps=6, lr=4.0)
    frame = studies.checkpoints(tasks, model, config=config, **OPTIONS)
    for task in tasks:
        for kind in ("best", "last"):
            vector, result = trained(task, model, replace(config, checkpoint=kind))
            valid = dict(result.history.set_index("step")["valid_loss"].dropna())
            assert list(valid) == [2, 4, 6]
            step = 6 if kind == "last" else min(valid, key=lambda step: valid[step])
            row = only(frame, task=task.name, checkpoint=kind)
            assert row["step"] == step and row["valid_loss"] == pytest.approx(valid[step], abs=1e-8)
            assert_measured(row, task, sl.PatchHeads(result.selection, vector), model)
    steps = frame.pivot(index="task", columns="checkpoint", values="step")
    assert (steps["best"] < steps["last"]).any()  # otherwise the comparison would mean nothing


class TestAlphaDistribution:
    @staticmethod
    def assert_histogram(part: pd.DataFrame, alpha: torch.Tensor) -> None:
        assert part["alpha"].tolist() == pytest.approx([0.025 + i / 20 for i in range(20)])
        counts = [0] * 20
        for value in alpha.flatten().tolist():
            counts[min(19, int(value * 20))] += 1
        assert part["share"].tolist() == [count / 8 for count in counts]
        assert part["share"].sum() == 1

    def test_all_heads_of_a_task(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.alpha_distribution(tasks, model, config=CONFIG, **OPTIONS)
        for task in tasks:
            self.assert_histogram(frame[frame["task"] == task.name], trained(task, model)[1].selection.alpha)

    def test_by_layer(self, model: Bridge, tasks: list[sl.Task]) -> None:
        config = replace(CONFIG, n_steps=8, lr=2.0)
        frame = studies.alpha_distribution(tasks, model, by="layer", config=config, **OPTIONS)
        for task in tasks:
            for layer, alpha in enumerate(trained(task, model, config)[1].selection.alpha.tolist()):
                row = only(frame, task=task.name, layer=layer)
                assert row["mean"] == pytest.approx(sum(alpha) / 4, abs=1e-8)
                assert row["on"] == sum(value > 0.5 for value in alpha) / 4
                assert row["binary"] == sum(value <= 0.1 or value >= 0.9 for value in alpha) / 4
        assert frame["binary"].max() > 0 and frame["on"].nunique() > 1

    def test_of_a_step_it_is_that_of_a_training_which_ends_there(self, model: Bridge, tasks: list[sl.Task]) -> None:
        frame = studies.alpha_distribution(tasks, model, by="step", steps=(1, 3), config=CONFIG, **OPTIONS)
        assert frame["step"].drop_duplicates().tolist() == [1, 3]
        for task in tasks:
            long = trained(task, model, replace(CONFIG, n_steps=5))[1].history
            for step in (1, 3):
                _, result = trained(task, model, replace(CONFIG, n_steps=step, checkpoint="last"))
                part = frame[(frame["task"] == task.name) & (frame["step"] == step)]
                self.assert_histogram(part, result.selection.alpha)
                for column in ("loss", "mean_alpha"):  # a longer training draws the same items up to here
                    np.testing.assert_allclose(result.history[column], long[column][:step], rtol=0, atol=1e-8)


class TestCosts:
    """A prompt `Q: word\\nA:` has 6 tokens, and a demonstration `Q: word\\nA: word\\n\\n` has 8."""

    options: dict[str, Any] = {"n_shots": 2, "n_prompts": 3, "config": CONFIG, "seed": 2}  # noqa: RUF012

    def test_tokens_by_hand(self, model: Bridge) -> None:
        task = micro.task("shift")
        frame = studies.costs(task, model, counts=(1, 5, 30), **self.options)
        assert frame.columns.tolist() == ["method", "prompts", "seconds", "tokens"]
        assert len(frame) == 12 and (frame["seconds"] > 0).all() and len(task.test) < 30
        tokens = frame.pivot(index="prompts", columns="method", values="tokens")
        rng = random.Random("sitelens/training/shift/1")
        drawn = {rng.randrange(len(task.train)) for _ in range(CONFIG.n_steps)}
        # Prefixes of the sampled items and of 4 validation items, once; the last token in 4 steps and 2 validations.
        preparing = 3 * (2 * 8 + 6) + 5 * len(drawn) + 4 + 5 * 4 + 2 * 4
        for count in (1, 5, 30):
            expected = {"zero-shot": 6 * count, "2-shot": 22 * count, "SITE, prepared": 6 * count,
                        "SITE": preparing + 6 * count}  # fmt: skip
            assert tokens.loc[count].to_dict() == expected

    def test_preparation_is_the_same_seconds_at_every_count(self, model: Bridge) -> None:
        frame = studies.costs(micro.task("shift"), model, counts=(1, 4), **self.options)
        seconds = frame.pivot(index="prompts", columns="method", values="seconds")
        first, second = (seconds["SITE"] - seconds["SITE, prepared"]).tolist()
        assert first == pytest.approx(second) and first > 0

    def test_the_users_cache_is_neither_used_nor_touched(self, model: Bridge, own_cache: Path) -> None:
        task = micro.task("shift")
        first = studies.costs(task, model, counts=(1,), **self.options)
        assert settings.cache_dir == own_cache and not list(own_cache.rglob("*.safetensors"))
        vector = sl.embed_task(task, model, n_prompts=3, n_shots=2, seed=2)
        sl.train_selection(task, model, embedding=vector, config=CONFIG)
        kept = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()}
        again = studies.costs(task, model, counts=(1,), **self.options)
        assert again["tokens"].tolist() == first["tokens"].tolist()
        assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()} == kept
        assert not micro.hooks_left(model)

    def test_the_cache_comes_back_after_an_error(self, model: Bridge, own_cache: Path) -> None:
        with pytest.raises(sl.SitelensError, match="too few training items for 90 shots"):
            studies.costs(micro.task("shift"), model, counts=(1,), n_shots=90)
        assert settings.cache_dir == own_cache and not micro.hooks_left(model)

    @pytest.mark.parametrize("counts", [(), (3, 0)])
    def test_a_count_below_one_is_refused(self, model: Bridge, counts: tuple[int, ...]) -> None:
        with pytest.raises(sl.SitelensError, match=r"counts.* must be at least 1, got"):
            studies.costs(micro.task("shift"), model, counts=counts)

    def test_a_split_without_items_is_refused(self, model: Bridge) -> None:
        with pytest.raises(sl.SitelensError, match="task 'shift' has no test items"):
            studies.costs(replace(micro.task("shift"), test=()), model)


class TestHeadOverlap:
    def prepared(self, alpha: list[list[float]]) -> Callable[..., list[Prepared]]:
        selection = sl.HeadSelection(torch.tensor(alpha), "one")
        vector = sl.TaskEmbedding(torch.zeros(2, 4, 8), "one", None, 1, 1, 0)
        result = TrainResult(selection, pd.DataFrame(), CONFIG)
        return lambda *rest, **options: [Prepared(micro.task("one"), vector, result)]

    def overlap(self, alpha: list[list[float]], k: int, model: Bridge, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
        """head_overlap of alpha and scores that are set by hand."""
        induction = pd.DataFrame({"induction": [0.9, 0.8, 0.1, 0.7, 0.6, 0.5, 0.4, 0.3], "previous_token": range(8)})
        monkeypatch.setattr(heads_study, "prepare", self.prepared(alpha))
        monkeypatch.setattr(heads_study, "induction_scores", lambda *rest, **options: induction)
        monkeypatch.setattr(
            heads_study, "indirect_effects", lambda *rest, **options: pd.DataFrame({"effect": [-i for i in range(8)]})
        )
        return studies.head_overlap(["ignored"], model, k=k).set_index("kind")

    def test_worked_out_by_hand(self, model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
        alpha = [[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.4, 0.5]]  # 0.5 itself is not selected
        found = self.overlap(alpha, 4, model, monkeypatch)
        assert found["k"].tolist() == [4] * 3 and found["expected"].tolist() == [3 / 8] * 3
        # 70 ways to choose 4 of 8 heads; of 3 selected ones 2 are among them in 3 * 10 ways, 3 in 5 ways, none in 5.
        assert found["shared"].to_dict() == {"induction": 2, "previous token": 0, "function vector": 3}
        assert found["share"].to_dict() == {"induction": 0.5, "previous token": 0.0, "function vector": 0.75}
        p = {"induction": 35 / 70, "previous token": 1.0, "function vector": 5 / 70}
        assert found["p"].to_dict() == pytest.approx(p)
        # Of the 15 pairs of a selected and another head, induction ranks 10 right: all but those with head 2.
        auc = {"induction": 10 / 15, "previous token": 0.0, "function vector": 1.0}
        assert found["auc"].to_dict() == pytest.approx(auc)
        flat = [value for row in alpha for value in row]
        assert found["spearman"]["previous token"] == pytest.approx(spearmanr(flat, range(8))[0])
        assert -found["spearman"]["function vector"] == pytest.approx(spearmanr(flat, range(8))[0])

    def test_without_selected_heads_there_is_nothing_to_tell_apart(
        self, model: Bridge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.overlap([[0.1, 0.2, 0.3, 0.4], [0.15, 0.25, 0.35, 0.45]], 3, model, monkeypatch)
        assert found["auc"].isna().all() and (found["p"] == 1).all() and (found["shared"] == 0).all()

    def test_no_top_heads_share_nothing(self, model: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.overlap([[0.9, 0.2, 0.3, 0.4], [0.15, 0.25, 0.35, 0.45]], 0, model, monkeypatch)
        assert found["share"].isna().all() and (found["p"] == 1).all() and found["auc"]["induction"] == 1

    def test_scores_are_those_of_the_model(self, model: Bridge, tasks: list[sl.Task]) -> None:
        options: dict[str, Any] = {"n_prompts": 3, "n_shots": 2}
        frame = studies.head_overlap(tasks, model, k=3, config=CONFIG, **options, **OPTIONS)
        known = induction_scores(model, seed=2)
        for task in tasks:
            vector, result = trained(task, model)
            effects = indirect_effects(task, model, embedding=vector, seed=2, **options)
            scores = {"induction": known["induction"], "previous token": known["previous_token"],
                      "function vector": effects["effect"]}  # fmt: skip
            alpha = result.selection.alpha.flatten().numpy()
            for kind, score in scores.items():
                row = only(frame, task=task.name, kind=kind)
                top = score.sort_values(ascending=False).index[:3]
                assert row["shared"] == int((alpha[top] > 0.5).sum())
                assert row["spearman"] == pytest.approx(spearmanr(alpha, score)[0])
                pairs = [(x > y) + (x == y) / 2 for x, a in zip(score, alpha, strict=True) if a > 0.5
                         for y, b in zip(score, alpha, strict=True) if b <= 0.5]  # fmt: skip
                assert row["auc"] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_shared_attention_compares_what_both_tasks_attend_to(model: Bridge, tasks: list[sl.Task]) -> None:
    three, config = [*tasks, micro.task("three", step=5)], replace(CONFIG, n_steps=10)
    options: dict[str, Any] = {"n_prompts": 3, "n_shots": 2}
    frame = studies.shared_attention(three, model, config=config, **options, **OPTIONS)
    pairs = frame[["task_a", "task_b"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [["one", "two"], ["one", "three"], ["two", "three"]]
    alphas = {task.name: trained(task, model, config)[1].selection.alpha for task in three}
    shares = {task.name: attention_roles(task, None, model, seed=2, **options) for task in three}
    groups: Any = frame.groupby(["task_a", "task_b", "layer", "head"])
    for (a, b, layer, head), rows in groups:
        on = (bool(alphas[a][layer, head] > 0.5), bool(alphas[b][layer, head] > 0.5))
        group = {(True, True): "both", (True, False): "only a", (False, True): "only b"}.get(on, "neither")
        assert set(rows["group"]) == {group} and rows["distance"].nunique() == 1
        own = [
            shares[name][(shares[name]["layer"] == layer) & (shares[name]["head"] == head)].set_index("role")["share"]
            for name in (a, b)
        ]
        by_role = rows.set_index("role")
        assert by_role["share_a"].to_dict() == pytest.approx(own[0].to_dict())
        assert by_role["share_b"].to_dict() == pytest.approx(own[1].to_dict())
        # Total variation: the most by which the two can differ on any set of roles.
        differences = [own[0][role] - own[1][role] for role in own[0].index]
        most = max(abs(sum(some)) for n in range(1, 6) for some in combinations(differences, n))
        assert rows["distance"].iloc[0] == pytest.approx(most, abs=1e-6) and 0 < most < 1
    assert frame["group"].nunique() == 4


def once(items: Iterable[Any]) -> Iterable[Any]:
    yield from items


def test_tasks_may_come_one_by_one_where_runs_are_shared(model: Bridge, tasks: list[sl.Task]) -> None:
    runs = studies.initialization_runs(once(tasks), model, inits=(0.3,), seeds=(0, 1), config=CONFIG, **OPTIONS)
    assert list(runs) == [("one", 0.3, 0), ("one", 0.3, 1), ("two", 0.3, 0), ("two", 0.3, 1)]
    assert all(result.config == replace(CONFIG, init=0.3, seed=seed) for (_, _, seed), (_, result) in runs.items())
