"""Training of alpha: independent of batching, equal to a plain implementation, and able to find planted heads."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.conditions.embedding import TaskEmbedding, embed_task
from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.forward import HeadEdit, LastToken, full_logits
from sitelens.engine.memory import prefix_bytes
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import few_shot_prompts
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.methods.site import loop as training_loop
from sitelens.methods.site import state as training_state
from sitelens.methods.site import train as training
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import TrainJob, TrainResult, train_jobs, train_selection, train_selections
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from sitelens.store.folder import Store, default_store
from sitelens.tasks import Example, Task
from tests import micro, oracle

Results = dict[tuple[str, int], TrainResult]
SHORT = TrainConfig(n_steps=10, eval_every=4, n_valid=3)
ONE = TrainConfig(n_steps=1, n_valid=2)


def worded(name: str, step: int = 1, n: int = 30, **options: Any) -> Task:
    """A task whose inputs have one to four words, so that prompts differ in length."""
    rng, words = random.Random(name), micro.WORDS
    inputs = [" ".join([words[i], *rng.choices(words, k=i % 4)]) for i in range(n)]
    pairs = [(text, words[(i + step) % len(words)]) for i, text in enumerate(inputs)]
    return Task.from_pairs(name, pairs, **options)


def vectors(model: Bridge, *tasks: Task, model_id: str | None = None) -> dict[str, TaskEmbedding]:
    """A random embedding for each task, by name."""
    shape = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    found = {}
    for task in tasks:
        generator = torch.Generator().manual_seed(sum(map(ord, task.name)))
        found[task.name] = TaskEmbedding(torch.randn(shape, generator=generator), task.name, model_id, 1, 0, 0)
    return found


def double(family: str) -> Bridge:
    """A micro model in float64, which the default kernel for mixtures of experts does not support."""
    model = micro.bridge(family, torch.float64)
    if family.startswith("Mixtral"):
        network: Any = model.original_model
        network.set_experts_implementation("eager")
    return model


def anew(tasks: Sequence[Task], model: Bridge, **options: Any) -> Results:
    """Selections trained without results from the cache."""
    default_store().clear("selection")
    return train_selections(tasks, model, embeddings=vectors(model, *tasks), **options)


def one_by_one(tasks: Sequence[Task], model: Bridge, seeds: Sequence[int], config: TrainConfig) -> Results:
    return {
        key: result
        for task in tasks
        for seed in seeds
        for key, result in anew([task], model, seeds=(seed,), config=config).items()
    }


def assert_equal(found: Results, expected: Results, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, result in expected.items():
        torch.testing.assert_close(found[key].selection.alpha, result.selection.alpha, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found[key].history, result.history, rtol=0, atol=10 * tolerance)


class TestHowItIsBatchedChangesNothing:
    tasks = (worded("one", 3), worded("two", 11, n=40))

    def test_tasks_and_seeds_in_one_batch_train_as_one_by_one_in_any_order(self, family: str) -> None:
        model = double(family)
        together = anew(self.tasks[::-1], model, seeds=(5, 0), config=SHORT)
        assert_equal(together, one_by_one(self.tasks, model, (0, 5), SHORT), 1e-8)

    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_so_do_several_items_a_step_from_a_random_start(self, family: str) -> None:
        model, config = double(family), replace(SHORT, batch_size=3, init="random")
        together = anew(self.tasks[::-1], model, seeds=(5, 0), config=config)
        assert_equal(together, one_by_one(self.tasks, model, (0, 5), config), 1e-8)

    @pytest.mark.parametrize(("family", "shared"), [("GPT2", False), ("Gemma3Text", False), ("Llama", True)])
    def test_the_memory_budget_changes_no_number(
        self, family: str, shared: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, config = double(family), TrainConfig(n_steps=6, batch_size=3, eval_every=3, n_valid=3)
        options: dict[str, Any] = {"config": config, "shared": shared}
        counted = Counted(monkeypatch)
        few = 3 * 8 * prefix_bytes(Model.of(model), 9)  # a third of it holds the prefixes of eight prompts
        results = {}
        for budget in counted.each(few, 1):
            with settings.using(memory_budget=budget or "2GiB"):
                results[budget] = anew(self.tasks, model, **options)
        assert_equal(results[few], results[None], 1e-8)
        assert_equal(results[1], results[None], 1e-8)
        prefixes, rows = counted.prefixes, counted.most_rows
        assert prefixes[None] == 2  # one for all training items, one for all validation items
        assert 2 < prefixes[few] < prefixes[1]
        assert prefixes[1] >= 6 + 2 * 6  # windows of at most one step, validation items one by one
        assert rows[1] == 1 and rows[None] == 6

    @pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma3Text"])
    def test_float32_agrees_to_a_thousandth_and_in_every_clear_head(self, family: str) -> None:
        model, config = micro.bridge(family), TrainConfig(n_steps=40, eval_every=20, n_valid=3)
        alone = one_by_one(self.tasks, model, (0,), config)
        budget = 3 * 8 * prefix_bytes(Model.of(model), 9)
        with settings.using(memory_budget=budget):
            together = anew(self.tasks[::-1], model, config=config)
        assert_equal(together, alone, 1e-3)
        for key, result in alone.items():
            alpha, other = result.selection.alpha, together[key].selection.alpha
            clear = (alpha - 0.5).abs() > 0.01
            assert clear.any()
            assert torch.equal((alpha > 0.5)[clear], (other > 0.5)[clear])

    def test_windows_cover_all_steps_and_fit_the_budget(self) -> None:
        model, lengths = micro.bridge("GPT2"), [5 + i % 4 for i in range(40)]
        prompt = torch.tensor(random.Random(0).choices(range(40), k=60)).reshape(20, 3)
        budget = 9 * prefix_bytes(Model.of(model), 8)
        windows = training_loop._windows(prompt, lengths, Model.of(model), budget)
        assert [step for start, stop in windows for step in range(start, stop)] == list(range(20))
        assert 1 < len(windows) < 20
        for start, stop in windows:
            items = set(prompt[start:stop].flatten().tolist())
            assert len(items) * prefix_bytes(Model.of(model), max(lengths[i] for i in items)) <= budget

    def test_a_window_holds_one_step_even_where_it_does_not_fit(self) -> None:
        windows = training_loop._windows(
            torch.arange(6).reshape(3, 2), [9] * 6, Model.of(micro.bridge("GPT2")), budget=1
        )
        assert windows == [(0, 1), (1, 2), (2, 3)]


def scaled(embedding: TaskEmbedding, factor: float) -> TaskEmbedding:
    return replace(embedding, mean_z=embedding.mean_z * factor)


class TestJobs:
    """Arbitrary mixtures of tasks, embeddings, seeds and initializations."""

    one, two = worded("one", 3), worded("two", 11, n=40)

    def mixture(self, model: Bridge) -> list[TrainJob]:
        """Jobs with matching and other embeddings, various seeds and initializations, and one shared alpha."""
        found = vectors(model, self.one, self.two)
        first, second = found["one"], found["two"]
        return [
            TrainJob(((self.one, first),), replace(SHORT, seed=5)),
            TrainJob(((self.two, second),), replace(SHORT, init="random")),
            TrainJob(((self.one, second),), replace(SHORT, seed=5)),
            TrainJob(((self.two, scaled(second, -1.0)),), replace(SHORT, init=0.2, seed=1)),
            TrainJob(((self.one, first),), replace(SHORT, seed=5, init=0.8)),
            TrainJob(((self.one, second), (self.two, first)), replace(SHORT, seed=5)),
            TrainJob(((replace(self.one, train=self.one.train[::-1]), first),), replace(SHORT, seed=5)),
        ]

    @staticmethod
    def numbered(results: Sequence[TrainResult]) -> Results:
        return {(str(i), 0): result for i, result in enumerate(results)}

    def alone(self, jobs: Sequence[TrainJob], model: Bridge) -> list[TrainResult]:
        found = []
        for job in jobs:
            default_store().clear("selection")
            found += train_jobs([job], model)
        return found

    @pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma3Text"])
    def test_a_mixture_trains_as_each_alone_in_any_order(self, family: str) -> None:
        model = double(family)
        jobs = self.mixture(model)
        alone = self.alone(jobs, model)
        for order in (list(range(7)), [3, 6, 1, 5, 0, 4, 2]):
            default_store().clear("selection")
            together = train_jobs([jobs[i] for i in order], model)
            assert_equal(self.numbered(together), self.numbered([alone[i] for i in order]), 1e-8)
            assert [result.config for result in together] == [jobs[i].config for i in order]

    def test_every_job_is_another_training(self) -> None:
        model = double("Llama")
        alphas = [result.selection.alpha for result in train_jobs(self.mixture(model), model)]
        for i, alpha in enumerate(alphas):
            assert all((alpha - other).abs().max() > 1e-3 for other in alphas[:i])

    def test_each_is_a_selection_of_its_task_seed_and_embedding(self) -> None:
        model = double("Llama")
        found = vectors(model, self.one, self.two)
        (result,) = train_jobs([TrainJob(((self.one, found["two"]),), replace(SHORT, seed=5, init=0.2))], model)
        default_store().clear("selection")
        config = replace(SHORT, seed=5, init=0.2)
        expected = train_selection(self.one, model, embedding=found["two"], config=config)
        assert_equal({("one", 5): result}, {("one", 5): expected}, 0)
        assert result.selection.task == "one" and "seed 5" in result.selection.provenance

    def test_only_what_differs_in_more_than_seed_and_init_needs_a_batch_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, asked = double("GPT2"), []
        train_runs = training.train_runs
        monkeypatch.setattr(
            training, "train_runs", lambda runs, *rest: asked.append(len(runs)) or train_runs(runs, *rest)
        )
        jobs = self.mixture(model)
        train_jobs(jobs[1:2], model)
        train_jobs([*jobs, replace(jobs[0], config=replace(SHORT, lr=0.1))], model)
        assert asked == [1, 6, 1]
        refuse_to_train(monkeypatch)
        assert len(train_jobs(jobs[::-1], model)) == 7 and train_jobs([], model) == []

    def test_bad_jobs_are_named_before_any_is_trained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = double("GPT2")
        refuse_to_train(monkeypatch)
        good, other = self.mixture(model)[0], vectors(model, self.one, model_id="other")["one"]
        with pytest.raises(SitelensError, match="the embedding of 'one'"):
            train_jobs([good, TrainJob(((self.one, other),), SHORT)], model)
        for split in ("train", "valid"):
            lacking = replace(self.two, **{split: ()})
            with pytest.raises(SitelensError, match=f"task 'two' has no {split} items"):
                train_jobs([good, TrainJob(((lacking, good.members[0][1]),), SHORT)], model)


class Counted:
    """Counts prefix computations and the largest last-token batch of trainings, by memory budget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefixes: dict[int | None, int] = {}
        self.most_rows: dict[int | None, int] = {}
        self.budget: int | None = None
        of, call = PrefixCache.of, LastToken.__call__

        def counted_of(batch: PromptBatch, model: Model, budget: int) -> PrefixCache:
            self.prefixes[self.budget] = self.prefixes.get(self.budget, 0) + 1
            return of(batch, model, budget)

        def counted_call(last_token: LastToken, prefix: PrefixCache, edit: HeadEdit | None = None) -> Tensor:
            self.most_rows[self.budget] = max(len(prefix), self.most_rows.get(self.budget, 0))
            return call(last_token, prefix, edit)

        monkeypatch.setattr(PrefixCache, "of", staticmethod(counted_of))
        monkeypatch.setattr(LastToken, "__call__", counted_call)

    def each(self, *budgets: int) -> Iterator[int | None]:
        """First no budget (None), then each of those given; trainings are counted under the current one."""
        for self.budget in (None, *budgets):
            yield self.budget


class Plain:
    """SITE's training in the simplest form: a raw model, whole prompts one at a time, hooks on o_proj."""

    def __init__(
        self, network: Any, members: Mapping[Task, Tensor], config: TrainConfig, seed: int, start: Tensor
    ) -> None:
        self.network, self.mixing = network.requires_grad_(False), config.mixing
        logits = torch.logit(start).requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=config.lr)
        draws = {task: random.Random(f"sitelens/training/{task.name}/{seed}") for task in members}
        self.loss: list[float] = []
        self.valid: dict[int, float] = {}
        self.alphas: dict[int, Tensor] = {}
        for step in range(1, config.n_steps + 1):
            drawn = [
                (task.train[draws[task].randrange(len(task.train))], embedding)
                for task, embedding in members.items()
                for _ in range(config.batch_size)
            ]
            losses = [self.item_loss(item, torch.sigmoid(logits), embedding) for item, embedding in drawn]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            self.loss.append(sum(loss.item() for loss in losses) / len(losses))
            self.alphas[step] = torch.sigmoid(logits.detach())
            if step % config.eval_every == 0 or step == config.n_steps:
                checks = [(item, e) for task, e in members.items() for item in task.valid[: config.n_valid]]
                found = [self.item_loss(item, self.alphas[step], embedding).item() for item, embedding in checks]
                self.valid[step] = sum(found) / len(found)
        self.best = min(self.valid, key=lambda step: self.valid[step])

    def item_loss(self, item: Example, alpha: Tensor, embedding: Tensor) -> Tensor:
        prompt = oracle.encode(f"Q: {item.input}\nA:")
        (answer,) = oracle.encode(f" {item.output}")
        logits = oracle.patched_logits(self.network, [prompt], alpha[None], embedding[None], self.mixing)
        return cross_entropy(logits, torch.tensor([answer]))

    def assert_agrees(self, result: TrainResult, step: int) -> None:
        """Assert that a result has the history of this training, and its alpha after `step`."""
        torch.testing.assert_close(result.selection.alpha, self.alphas[step], rtol=0, atol=1e-8)
        np.testing.assert_allclose(result.history["loss"], self.loss, rtol=0, atol=1e-8)
        valid = result.history.set_index("step")["valid_loss"].dropna()
        assert valid.index.tolist() == list(self.valid)
        np.testing.assert_allclose(valid, list(self.valid.values()), rtol=0, atol=1e-8)


class TestAgainstAPlainImplementation:
    task, other = worded("plain", 3), worded("other", 17)
    config = TrainConfig(n_steps=30, eval_every=8, n_valid=3, seed=4)

    def pair(self, family: str, config: TrainConfig, alpha: Tensor | float = 0.5) -> tuple[Plain, TrainResult]:
        model = double(family)
        embedding = vectors(model, self.task)[self.task.name]
        network = micro.raw(family, torch.float64)
        if family.startswith("Mixtral"):
            network.set_experts_implementation("eager")
        start = torch.as_tensor(alpha, dtype=torch.float64).expand(model.cfg.n_layers, model.cfg.n_heads).clone()
        plain = Plain(network, {self.task: embedding.mean_z.double()}, config, config.seed, start)
        return plain, train_selection(self.task, model, embedding=embedding, config=config)

    @pytest.mark.parametrize("family", micro.MORE_FAMILIES)
    def test_alpha_and_losses_are_the_same(self, family: str) -> None:
        plain, result = self.pair(family, self.config)
        plain.assert_agrees(result, plain.best)

    def test_best_is_the_evaluated_step_of_lowest_validation_loss(self) -> None:
        plain, result = self.pair("Llama", replace(self.config, lr=1.0))
        assert plain.best < 30  # so that best and last differ
        plain.assert_agrees(result, plain.best)
        assert result.best_step == plain.best

    def test_last_is_the_final_step(self) -> None:
        plain, result = self.pair("Llama", replace(self.config, lr=1.0, checkpoint="last"))
        assert plain.best < 30
        plain.assert_agrees(result, 30)

    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_additive_mixing(self, family: str) -> None:
        plain, result = self.pair(family, replace(self.config, mixing="additive"))
        plain.assert_agrees(result, plain.best)

    def test_the_losses_of_a_batch_are_summed_and_reported_as_their_mean(self) -> None:
        plain, result = self.pair("GPTNeoX", replace(self.config, batch_size=3, n_steps=12))
        plain.assert_agrees(result, plain.best)

    def test_alpha_may_start_elsewhere(self) -> None:
        plain, result = self.pair("Llama", replace(self.config, init=0.2), 0.2)
        plain.assert_agrees(result, plain.best)

    def test_a_random_start_trains_as_any_other(self) -> None:
        config = replace(self.config, init="random")
        plain, result = self.pair("Llama", config, random_start(double("Llama"), self.task, config.seed))
        plain.assert_agrees(result, plain.best)

    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_a_shared_alpha_follows_the_sum_of_all_tasks_losses(self, family: str) -> None:
        model, tasks = double(family), (self.task, self.other)
        embeddings = vectors(model, *tasks)
        members = {task: embeddings[task.name].mean_z.double() for task in tasks}
        start = torch.full((model.cfg.n_layers, model.cfg.n_heads), 0.5, dtype=torch.float64)
        plain = Plain(micro.raw(family, torch.float64), members, self.config, 7, start)
        results = train_selections(tasks, model, embeddings=embeddings, seeds=(7,), config=self.config, shared=True)
        assert list(results) == [("plain", 7), ("other", 7)]
        for result in results.values():
            plain.assert_agrees(result, plain.best)
            assert result.selection.task == "plain+other"


def random_start(model: Bridge, task: Task, seed: int) -> Tensor:
    """The alpha of a random initialization, after one step that is too small to change it."""
    config = TrainConfig(n_steps=1, lr=1e-14, n_valid=1, init="random")
    return anew([task], model, seeds=(seed,), config=config)[task.name, seed].selection.alpha


def test_a_random_start_depends_on_task_and_seed() -> None:
    model, tasks = double("GPT2"), (worded("one"), worded("two"))
    starts = [random_start(model, task, seed) for task in tasks for seed in (0, 1)]
    for start in starts:
        assert ((start > 0) & (start < 1)).all()
    for a, b in itertools.combinations(starts, 2):
        assert (a - b).abs().min() > 1e-4
    torch.testing.assert_close(starts[0], random_start(model, tasks[0], 0), rtol=0, atol=0)


def test_a_shared_random_start_does_not_depend_on_the_order_of_its_tasks() -> None:
    model, tasks = double("GPT2"), [worded("one"), worded("two")]
    config = TrainConfig(n_steps=1, lr=1e-14, n_valid=1, init="random")
    first, again = (
        anew(order, model, seeds=(0,), config=config, shared=True)["one", 0].selection.alpha
        for order in (tasks, tasks[::-1])
    )
    torch.testing.assert_close(first, again, rtol=0, atol=1e-12)
    assert (first - random_start(model, tasks[0], 0)).abs().min() > 1e-4


class TestPlantedHeads:
    """A Llama whose weights are set by hand, for three tasks over the same four inputs.

    The residual stream has a dimension for each input (0 to 3), each task (4 to 6) and all other tokens (7), and every
    head writes its z directly to these dimensions. Attention is uniform and the MLPs are zero; the logit of the answer
    to (input, task) is 2 * (input dimension + task dimension). Heads 0 and 1 of layer 0 copy the input: their z is 1.5
    in its dimension. In the embedding of a task, two planted heads have the dimension of the task, all others that of
    another task; so training should set the planted heads to 1, and all others, including the copying ones, to 0.
    """

    inputs = tuple(micro.WORDS[:4])
    names = ("first", "second", "third")
    planted = (((0, 2), (1, 1)), ((0, 3), (1, 0)), ((1, 2), (1, 3)))

    @pytest.fixture
    def model(self) -> Bridge:
        model = micro.bridge("Llama", torch.float64)
        token = model.tokenizer.get_vocab()
        weights = {n.replace("._original_component", ""): p for n, p in model.original_model.named_parameters()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.fill_(1.0 if "norm" in name else 0.0)
            embed = weights["model.embed_tokens.weight"]
            embed[:, 7] = 1
            for i, word in enumerate(self.inputs):
                embed[token[f" {word}"]] = torch.eye(32, dtype=torch.float64)[i]
            for layer in range(2):
                weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:8] = torch.eye(8).repeat(1, 4)
            copying = weights["model.layers.0.self_attn.v_proj.weight"]  # shared by two query heads per group
            copying[:4, :4] = torch.eye(4) * 1.5 * 6 / math.sqrt(32)  # six tokens; the norm scales by sqrt(32)
            for task in range(3):
                for i in range(4):
                    weights["lm_head.weight"][token[f" {self.answer(i, task)}"], [i, 4 + task]] = 2.0
        return model

    @staticmethod
    def answer(i: int, task: int) -> str:
        return micro.WORDS[4 + 4 * task + i]

    def task(self, which: int) -> Task:
        items = tuple(Example(word, self.answer(i, which)) for i, word in enumerate(self.inputs))
        return Task(self.names[which], "planted", items, items, items)

    def embedding(self, which: int) -> TaskEmbedding:
        mean_z = torch.zeros(2, 4, 8)
        for layer in range(2):
            for head in range(4):
                wrong = (which + 1 + head % 2) % 3
                mean_z[layer, head, 4 + (which if (layer, head) in self.planted[which] else wrong)] = 1
        return TaskEmbedding(mean_z, self.names[which], None, 1, 0, 0)

    def logits(self, model: Bridge, which: int, alpha: Tensor) -> dict[str, float]:
        """Logits of the first item's answer, of another task's answer, of another item's answer, and of a sign."""
        prompts = few_shot_prompts(self.task(which), self.task(which).test[:1], 0, model.tokenizer)
        batch = tokenize(prompts, model.tokenizer)
        assert batch.lengths == [6]
        edit = HeadEdit.mix(alpha[None], self.embedding(which).mean_z[None].double())
        with torch.no_grad(), LastToken(Model.of(model)) as last_token:
            found = last_token(PrefixCache.of(batch, Model.of(model), 10**9), edit)[0]
        token = model.tokenizer.get_vocab()
        answers = {"right": (0, which), "task": (0, (which + 1) % 3), "item": (1, which)}
        return {k: found[token[f" {self.answer(*v)}"]].item() for k, v in answers.items()} | {
            "sign": found[token["Q"]].item()
        }

    @pytest.mark.parametrize("which", range(3))
    def test_logits_are_those_worked_out_by_hand(self, model: Bridge, which: int) -> None:
        # Untouched: 3 along the input and 1 along the other tokens, so the final norm divides by sqrt(10 / 32).
        root = math.sqrt(32 / 10)
        untouched = {"right": 6 * root, "task": 6 * root, "item": 0, "sign": 0}
        assert self.logits(model, which, torch.zeros(2, 4, dtype=torch.float64)) == pytest.approx(untouched, abs=1e-4)
        # Planted heads on: 2 along the task besides, sqrt(14 / 32).
        alpha, root = torch.zeros(2, 4, dtype=torch.float64), math.sqrt(32 / 14)
        for head in self.planted[which]:
            alpha[head] = 1
        patched = {"right": 10 * root, "task": 6 * root, "item": 4 * root, "sign": 0}
        assert self.logits(model, which, alpha) == pytest.approx(patched, abs=1e-4)

    def test_training_finds_the_planted_heads_of_every_task(self, model: Bridge) -> None:
        tasks = [self.task(which) for which in range(3)]
        embeddings = {task.name: self.embedding(which) for which, task in enumerate(tasks)}
        results = train_selections(tasks, model, embeddings=embeddings, config=TrainConfig(n_steps=80))
        for which, task in enumerate(tasks):
            alpha = results[task.name, 0].selection.alpha.clone()
            rows, columns = zip(*self.planted[which], strict=True)
            assert alpha[rows, columns].min() > 0.9
            alpha[rows, columns] = 0
            assert alpha.max() < 0.1


class TestHistory:
    config = TrainConfig(n_steps=7, eval_every=3, n_valid=3, checkpoint="last", lr=0.9)

    @pytest.fixture
    def result(self) -> TrainResult:
        model, task = micro.bridge("GPT2"), worded("history")
        return train_selection(task, model, embedding=vectors(model, task)[task.name], config=self.config)

    def test_has_a_row_a_step_from_one(self, result: TrainResult) -> None:
        assert result.history.columns.tolist() == ["step", "loss", "valid_loss", "mean_alpha", "fraction_saturated"]
        assert result.history["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert result.history["step"].dtype.kind == "i"
        assert result.history.drop(columns="valid_loss").notna().all(axis=None)

    def test_validation_is_measured_at_its_interval_and_at_the_end(self, result: TrainResult) -> None:
        assert result.history["step"][result.history["valid_loss"].notna()].tolist() == [3, 6, 7]

    def test_ends_with_the_facts_of_the_last_alpha(self, result: TrainResult) -> None:
        final = result.history.iloc[-1]
        assert final["mean_alpha"] == pytest.approx(result.selection.alpha.mean().item(), abs=1e-6)
        assert final["fraction_saturated"] == pytest.approx(result.selection.fraction_saturated, abs=1e-12)
        assert 0 < final["fraction_saturated"] < 1

    def test_the_result_says_how_it_was_made(self, result: TrainResult) -> None:
        assert result.config == self.config
        assert result.selection.task == "history"
        assert "last of 7 steps, seed 0" in result.selection.provenance


class TrainedAnewError(Exception):
    """Raised in place of training, to show that a result was not in the cache."""


def refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise TrainedAnewError

    monkeypatch.setattr(training, "train_runs", refuse)


def edited(model: Bridge) -> Bridge:
    with torch.no_grad():
        next(model.original_model.parameters()).mul_(1.001)
    return model


def with_config(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda call: {"config": replace(call["config"], **changes)}


def with_task(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda call: {"task": replace(call["task"], **changes)}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "seed": with_config(seed=1),
    "lr": with_config(lr=0.1),
    "n_steps": with_config(n_steps=2),
    "batch size": with_config(batch_size=2),
    "interval": with_config(eval_every=1),
    "n_valid": with_config(n_valid=1),
    "checkpoint": with_config(checkpoint="last"),
    "init": with_config(init=0.4),
    "mixing": with_config(mixing="additive"),
    "name": with_task(name="another"),
    "template": with_task(template="Q: {input}\nA: {output}\n"),
    "train items": lambda call: {"task": replace(call["task"], train=call["task"].train[1:])},
    "valid items": lambda call: {"task": replace(call["task"], valid=call["task"].valid[::-1])},
    "embedding": lambda call: {"embedding": replace(call["embedding"], mean_z=call["embedding"].mean_z * 1.001)},
    "weights": lambda call: {"model": edited(call["model"])},
    "dtype": lambda call: {"model": micro.bridge("GPT2", torch.float64)},
}


class TestCache:
    @pytest.fixture
    def call(self) -> dict[str, Any]:
        """The arguments of a training that is already in the cache."""
        model, task = micro.bridge("GPT2"), worded("cached")
        call = {"task": task, "model": model, "embedding": vectors(model, task)[task.name], "config": ONE}
        train_selection(**call)
        return call

    def test_a_second_call_trains_nothing_and_gives_the_same(
        self, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = anew([call["task"]], call["model"], config=ONE)
        refuse_to_train(monkeypatch)
        second = train_selection(**call)
        assert_equal({("cached", 0): second}, first, 0)
        pd.testing.assert_frame_equal(second.history, first["cached", 0].history)
        assert second.config == first["cached", 0].config
        assert second.selection.provenance == first["cached", 0].selection.provenance

    @pytest.mark.parametrize("change", CHANGES)
    def test_another_experiment_is_another_entry(
        self, call: dict[str, Any], change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse_to_train(monkeypatch)
        train_selection(**call)
        with pytest.raises(TrainedAnewError):
            train_selection(**call | CHANGES[change](call))

    def test_only_what_is_missing_is_trained(self, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        model, tasks = call["model"], [worded("before"), call["task"], worded("behind")]
        asked: list[int] = []
        train_runs = training.train_runs
        monkeypatch.setattr(
            training, "train_runs", lambda runs, *rest: asked.append(len(runs)) or train_runs(runs, *rest)
        )
        kept = train_selections(tasks, model, embeddings=vectors(model, *tasks), seeds=(0, 1), config=ONE)
        assert asked == [5]
        assert_equal(kept, anew(tasks, model, seeds=(0, 1), config=ONE), 1e-6)

    def test_a_shared_alpha_is_another_entry_than_each_task_of_its_own(
        self, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tasks = call["model"], [call["task"], worded("two")]
        anew(tasks, model, config=ONE)
        refuse_to_train(monkeypatch)
        with pytest.raises(TrainedAnewError):
            train_selections(tasks, model, embeddings=vectors(model, *tasks), config=ONE, shared=True)

    @pytest.mark.parametrize("damage", ["truncated", "altered"])
    def test_a_damaged_entry_is_named_and_made_anew(self, call: dict[str, Any], own_cache: Path, damage: str) -> None:
        first = anew([call["task"]], call["model"], config=ONE)
        (path,) = own_cache.glob("artifacts/selection/*.safetensors")
        content = path.read_bytes()
        path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.warns(SitelensWarning, match=f"{path.name} is damaged.*computed again"):
            second = train_selection(**call)
        assert_equal({("cached", 0): second}, first, 0)
        assert_equal({("cached", 0): train_selection(**call)}, first, 0)

    def test_without_an_embedding_the_tasks_own_is_used(self) -> None:
        model, tasks = micro.bridge("GPT2"), [micro.task("one"), micro.task("two", step=4)]
        given = vectors(model, tasks[0])
        mixed = train_selections(tasks, model, embeddings=given, config=ONE)
        default_store().clear("selection")
        embeddings = given | {"two": embed_task(tasks[1], model)}
        assert_equal(mixed, train_selections(tasks, model, embeddings=embeddings, config=ONE), 0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("n_steps", 0, "TrainConfig.n_steps must be at least 1, got 0"),
            ("batch_size", 0, "TrainConfig.batch_size must be at least 1, got 0"),
            ("eval_every", 0, "TrainConfig.eval_every must be at least 1, got 0"),
            ("n_valid", -1, "TrainConfig.n_valid must be at least 1, got -1"),
            ("lr", 0.0, "TrainConfig.lr must be positive.*got 0.0"),
            ("lr", math.nan, "TrainConfig.lr must be positive.*got nan"),
            ("lr", math.inf, "TrainConfig.lr must be .*got inf"),
            ("checkpoint", "first", "TrainConfig.checkpoint must be 'best' or 'last', not 'first'"),
            ("mixing", "concave", "TrainConfig.mixing must be 'convex' or 'additive', not 'concave'"),
            ("init", 0.0, "TrainConfig.init must be 'random' or lie between 0 and 1, got 0.0"),
            ("init", 1, "TrainConfig.init must be 'random' or lie between 0 and 1, got 1"),
            ("init", math.nan, "TrainConfig.init must be 'random' or lie between 0 and 1, got nan"),
            ("init", "ones", "TrainConfig.init must be a number or 'random', not 'ones'"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_a_config_names_what_is_wrong(self, field: str, value: Any, message: str) -> None:
        with pytest.raises(SitelensError, match=message):
            TrainConfig(**{field: value})

    @pytest.mark.parametrize(("tasks", "seeds"), [((), (0,)), ((worded("one"),), ()), ((worded("one"),), (3, 3))])
    def test_tasks_and_different_seeds_are_needed(self, tasks: Sequence[Task], seeds: Sequence[int]) -> None:
        with pytest.raises(SitelensError, match="at least one task, and seeds that differ"):
            train_selections(tasks, micro.bridge("GPT2"), embeddings={}, seeds=seeds, config=ONE)

    def test_two_tasks_of_one_name_are_refused(self) -> None:
        with pytest.raises(SitelensError, match="'one' is given 2 times; names must differ"):
            anew([worded("one"), worded("one", 5)], micro.bridge("GPT2"), config=ONE)

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_a_task_without_items_is_named(self, split: str) -> None:
        empty = replace(worded("hollow"), **{split: ()})
        with pytest.raises(SitelensError, match=f"'hollow' has no {split} items"):
            anew([worded("full"), empty], micro.bridge("GPT2"), config=ONE)

    def test_an_embedding_of_another_model_is_refused(self) -> None:
        model, task = micro.bridge("GPT2"), worded("one")
        foreign = vectors(model, task, model_id="0123456789abcdef")[task.name]
        with pytest.raises(SitelensError, match=r"embedding of 'one' was made with another model.*0123456789ab"):
            train_selection(task, model, embedding=foreign, config=ONE)

    def test_an_embedding_of_another_shape_is_refused(self) -> None:
        task = worded("one")
        wider = vectors(micro.bridge("Qwen3"), task)[task.name]
        with pytest.raises(SitelensError, match=r"embedding of 'one' has shape \(2, 4, 16\).* has \(2, 4, 8\)"):
            train_selection(task, micro.bridge("GPT2"), embedding=wider, config=ONE)


class TestLossThatIsNoNumber:
    """A training whose loss becomes NaN stores nothing, and its error says where that happened."""

    word = micro.WORDS[40]

    @pytest.fixture
    def model(self) -> Bridge:
        """A model whose logits are NaN after one word."""
        model = micro.bridge("Llama")
        with torch.no_grad():
            network: Any = model.original_model
            network.get_input_embeddings().weight[model.tokenizer.get_vocab()[f" {self.word}"]] = torch.nan
        return model

    def task(self, name: str, split: str | None = None) -> Task:
        """Nine items of known words; the third item of `split` contains the word that gives NaN."""
        items = tuple(Example(word, micro.WORDS[60]) for word in micro.WORDS[:9])
        task = Task(name, "own", items, items, items)
        return (
            replace(task, **{split: (*items[:2], Example(self.word, items[2].output), *items[3:])}) if split else task
        )

    def kept(self, cache: Path) -> list[Path]:
        return list(cache.glob("artifacts/selection/*"))

    def test_it_is_named_with_task_seed_and_step(self, model: Bridge, own_cache: Path) -> None:
        tasks, config = [self.task("sound"), self.task("broken", "train")], replace(SHORT, n_steps=40)
        first: dict[int, int] = {}
        for seed in (0, 1):
            rng = random.Random(f"sitelens/training/broken/{seed}")
            first[seed] = 1 + [rng.randrange(9) for _ in range(40)].index(2)
        assert min(first.values()) > 1 and first[0] != first[1]
        seed = min(first, key=lambda seed: first[seed])
        with pytest.raises(SitelensError, match=f"loss of task 'broken', seed {seed}, is nan at step {first[seed]}:"):
            anew(tasks, model, seeds=(0, 1), config=config)
        assert not self.kept(own_cache)

    def test_it_is_named_where_validation_meets_it(self, model: Bridge, own_cache: Path) -> None:
        with pytest.raises(SitelensError, match=r"validation loss of task 'broken', seed 6, is nan at step 4"):
            anew([self.task("sound"), self.task("broken", "valid")], model, seeds=(6,), config=SHORT)
        assert not self.kept(own_cache)

    def test_an_infinite_embedding_is_named(self, own_cache: Path) -> None:
        model, task = micro.bridge("GPT2"), worded("boundless")
        embedding = vectors(model, task)[task.name]
        embedding.mean_z[0, 0, 0] = torch.inf
        with pytest.raises(SitelensError, match="task 'boundless', seed 0, is nan at step 1: nothing is kept"):
            train_selection(task, model, embedding=embedding, config=SHORT)
        assert not self.kept(own_cache)

    def test_the_model_works_as_before_afterwards(self, model: Bridge) -> None:
        batch = tokenize(
            few_shot_prompts(self.task("sound"), self.task("sound").test, 0, model.tokenizer), model.tokenizer
        )
        before = full_logits(batch, Model.of(model))
        with pytest.raises(SitelensError, match="is nan"):
            anew([self.task("broken", "train")], model, config=replace(SHORT, n_steps=40))
        assert torch.equal(full_logits(batch, Model.of(model)), before)


class TestUndecidedAlpha:
    @pytest.fixture(autouse=True)
    def undecided(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Training is replaced by one that leaves five of eight alphas near the middle."""
        alpha = torch.tensor([[0.0, 0.1, 0.9, 0.5], [0.11, 0.89, 0.3, 0.7]])

        def train_runs(
            runs: Sequence[Any], tasks: Any, vectors: Any, model: Any, config: TrainConfig, *rest: Any
        ) -> Any:
            history = torch.zeros(config.n_steps, 5, dtype=torch.float64)
            history[:, 0] = torch.arange(1, config.n_steps + 1)
            return ({"alpha": alpha, "history": history} for _ in runs)

        monkeypatch.setattr(training, "train_runs", train_runs)

    def test_is_warned_of_after_a_training_of_full_length(self) -> None:
        with pytest.warns(SitelensWarning, match="task 'one', seed 0: only 38% of alpha is within 0.1 of 0 or 1"):
            anew([worded("one")], micro.bridge("GPT2"))

    def test_is_no_surprise_after_a_short_training(self) -> None:
        result = anew([worded("one")], micro.bridge("GPT2"), config=TrainConfig(n_steps=399))
        assert result["one", 0].selection.fraction_saturated == 0.375


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("trainable", [False, True])
    def test_no_parameter_changes_or_gets_a_gradient(self, family: str, trainable: bool) -> None:
        model, task = micro.bridge(family), worded("one")
        model.requires_grad_(trainable)
        before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
        anew([task], model, config=replace(SHORT, n_steps=3))
        for name, value in model.original_model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(p.grad is None and p.requires_grad == trainable for p in model.original_model.parameters())

    def test_trainable_parameters_change_no_number(self) -> None:
        model, task = double("Llama"), worded("one")
        frozen = anew([task], model, config=SHORT)
        model.requires_grad_(True)
        assert_equal(anew([task], model, config=SHORT), frozen, 1e-12)


class TestInterruptions:
    CONFIG = TrainConfig(n_steps=24, eval_every=6, n_valid=3, lr=0.5)

    def interrupted(self, model: Bridge, at: int, monkeypatch: pytest.MonkeyPatch) -> Results:
        """Results of a training that is interrupted in step `at` and then resumed."""
        monkeypatch.setattr(training_state, "KEEP_SECONDS", 0)
        tasks, steps = [worded("one"), worded("two", 5)], []
        step = training_state.Record.step

        def stop(record: Any, number: int, *rest: Any) -> None:
            steps.append(number)
            if len(steps) == at:
                raise KeyboardInterrupt
            step(record, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(training_state.Record, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                anew(tasks, model, seeds=(0, 1), config=self.CONFIG)
            assert len(list((settings.cache() / "artifacts" / "training").glob("*"))) == 1
            found = train_selections(tasks, model, embeddings=vectors(model, *tasks), seeds=(0, 1), config=self.CONFIG)
        again = (at - 1) // 6 * 6  # the last validation
        assert steps[: at + 24 - again] == [*range(at), *range(again, 24)]
        assert not list((settings.cache() / "artifacts" / "training").glob("*"))
        return found

    @pytest.mark.parametrize("at", [7, 12, 13, 24])
    @pytest.mark.parametrize("budget", ["2GiB", "1MB"])
    def test_a_training_goes_on_where_it_was_with_the_same_numbers(
        self, at: int, budget: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = micro.bridge("Llama")
        with settings.using(memory_budget=budget):
            found = self.interrupted(model, at, monkeypatch)
            expected = anew([worded("one"), worded("two", 5)], model, seeds=(0, 1), config=self.CONFIG)
        for key, result in expected.items():
            assert torch.equal(found[key].selection.alpha, result.selection.alpha)
            pd.testing.assert_frame_equal(found[key].history, result.history, check_exact=True)

    def test_short_trainings_write_no_state(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put, kinds = Store.put, []
        monkeypatch.setattr(Store, "put", lambda store, artifact: kinds.append(artifact.kind) or put(store, artifact))
        anew([worded("one")], micro.bridge("Llama"), config=self.CONFIG)
        assert kinds == ["selection"]
