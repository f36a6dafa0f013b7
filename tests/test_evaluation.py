"""Evaluation compared with the oracle: scores, greedy continuations, custom conditions, metrics, and intervals."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import sitelens as sl
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding
from sitelens.conditions.patching import PatchHeads
from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.decoding import decode
from sitelens.engine.forward import Hook, full_logits
from sitelens.engine.prompts import Prompt, draw_demonstrations, few_shot_prompts
from sitelens.evaluation.evaluate import COLUMNS
from sitelens.models.fingerprints import fingerprint
from sitelens.models.model import Bridge, Model
from sitelens.tasks import Example, Task
from tests import micro, oracle

TEXTS = [
    " ".join(micro.WORDS[place : place + length]) for place, length in ((0, 15), (20, 9), (40, 4), (60, 1), (70, 8))
]
PLAIN: dict[str, Condition] = {"zero-shot": sl.ZeroShot()}
NEW = 6  # tokens generated
SHOTS = 2


@functools.cache
def raw(family: str) -> Any:
    return micro.raw(family).requires_grad_(False)


@pytest.fixture
def model(family: str) -> Iterator[Bridge]:
    """A model of each family."""
    yield from micro.lent(family)


@pytest.fixture(params=["GPTNeoX", "Gemma3Text"])
def one_of_two(request: pytest.FixtureRequest) -> str:
    """Two families: fused projections of q, k, v without sliding window; separate ones with a sliding window."""
    return request.param


@pytest.fixture
def model_of_two(one_of_two: str) -> Iterator[Bridge]:
    yield from micro.lent(one_of_two)


@pytest.fixture
def gpt2() -> Iterator[Bridge]:
    yield from micro.lent("GPT2")


def random_patch(model: Bridge, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers, heads, d_head = Model.of(model).shape
    alpha = torch.rand(layers, heads, generator=generator)
    return alpha, 0.3 * torch.randn(layers, heads, d_head, generator=generator)


def patch_heads(alpha: Tensor, vectors: Tensor, **options: Any) -> PatchHeads:
    return PatchHeads(sl.HeadSelection(alpha), TaskEmbedding(vectors, "random", None, 1, 0, 0), **options)


def conditions_for(model: Bridge) -> dict[str, Condition]:
    return {
        "zero-shot": sl.ZeroShot(),
        "few-shot": sl.FewShot(SHOTS),
        "convex": patch_heads(*random_patch(model)),
        "additive": patch_heads(*random_patch(model, 1), mixing="additive"),
        "patched few-shot": patch_heads(*random_patch(model, 2), n_shots=SHOTS),
    }


def batch_of(texts: Sequence[str]) -> PromptBatch:
    return tokenize([Prompt(text, ()) for text in texts], micro.tokenizer())


def zero_shot(query: str) -> list[int]:
    """Token ids of a zero-shot prompt in the published template."""
    return oracle.encode(f"Q: {query}\nA:")


def ids_for(task: Task, condition: Condition) -> list[list[int]]:
    """Token ids of the prompt of each test item."""
    if not condition.n_shots:
        return [zero_shot(item.input) for item in task.test]
    return [oracle.encode(text) for text in prompts(task, condition.n_shots)]


def mix_of(condition: Condition, model: Bridge) -> tuple[Tensor, Tensor, str]:
    if isinstance(condition, PatchHeads):
        return condition.selection.alpha, condition.embedding.mean_z, condition.mixing
    alpha, vectors = random_patch(model)
    return torch.zeros_like(alpha), torch.zeros_like(vectors), "convex"


def oracle_logits(family: str, task: Task, condition: Condition, model: Bridge) -> Tensor:
    alpha, vectors, mixing = mix_of(condition, model)
    ids = ids_for(task, condition)
    return oracle.patched_logits(raw(family), ids, [alpha] * len(ids), [vectors] * len(ids), mixing)


def task_of(test: Sequence[Example], name: str = "told") -> Task:
    """A task with the given test items and the usual training items."""
    usual = micro.task()
    return Task(name, "own", usual.train, usual.valid, tuple(test))


def told_task(family: str) -> Task:
    """A task for which the untouched model gets about half the items right, made from its own answers."""
    items = []
    for word in micro.WORDS[:40]:
        token = micro.tokenizer().decode(oracle.greedy(raw(family), zero_shot(word), 1))
        if token.startswith(" ") and token.strip() in micro.WORDS:
            items.append(Example(word, token.strip() if len(items) % 2 else micro.WORDS[90]))
    return task_of(items[:8])


def assert_same_frame(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Assert that frames are equal up to float32 rounding of log-probabilities."""
    pd.testing.assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True), rtol=1e-5, atol=1e-6)


# -- first token, log-probability, rank --


def test_scores_are_the_oracles(one_of_two: str, model_of_two: Bridge) -> None:
    task = told_task(one_of_two)
    frame = sl.evaluate(task, conditions_for(model_of_two), model_of_two)
    assert tuple(frame.columns) == COLUMNS
    answers = [oracle.encode(" " + item.output)[0] for item in task.test]
    for name, condition in conditions_for(model_of_two).items():
        found = frame[frame["condition"] == name]
        logits = oracle_logits(one_of_two, task, condition, model_of_two)
        best = logits.argmax(-1).tolist()
        assert found["score"].tolist() == [int(token == answer) for token, answer in zip(best, answers, strict=True)]
        assert found["predicted"].tolist() == [micro.tokenizer().decode([token]) for token in best]
        expected = [row.log_softmax(-1)[answer].item() for row, answer in zip(logits, answers, strict=True)]
        assert found["logprob"].tolist() == pytest.approx(expected, abs=3e-6)
        above = [1 + int((row > row[answer]).sum()) for row, answer in zip(logits, answers, strict=True)]
        assert found["rank"].tolist() == above
    assert frame[frame["condition"] == "zero-shot"]["score"].tolist() == [0, 1] * 4
    assert frame.groupby("condition")["logprob"].sum().nunique() == len(conditions_for(model_of_two))


def test_any_accepted_answer_counts_and_the_preferred_one_is_ranked(one_of_two: str, model_of_two: Bridge) -> None:
    wrong, right = told_task(one_of_two).test[:2]
    task = task_of([Example(right.input, wrong.output, ("ab", right.output))])
    row = sl.evaluate(task, PLAIN, model_of_two).iloc[0]
    assert row["score"] == 1
    assert row["rank"] > 1
    assert row["answer"] == wrong.output


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_rows_are_the_whole_split_in_order_for_each_metric_and_condition(gpt2: Bridge, split: str) -> None:
    task = micro.task(n=30)
    items = task.split(split)
    metrics = ("first_token", "exact_match")
    frame = sl.evaluate(
        task, {"b": sl.ZeroShot(), "a": sl.FewShot(1)}, gpt2, split=split, metrics=metrics, max_new_tokens=1, seed=3
    )
    keys = frame[["metric", "condition", "item", "input", "answer"]].to_records(index=False).tolist()
    assert keys == [
        (metric, name, place, item.input, item.output)
        for metric in metrics
        for name in "ba"
        for place, item in enumerate(items)
    ]
    assert set(frame["task"]) == {task.name}
    assert set(frame["seed"]) == {3}


def test_conditions_together_give_what_they_give_one_by_one(model_of_two: Bridge) -> None:
    task, conditions, metrics = micro.task(), conditions_for(model_of_two), ("first_token", "exact_match")
    options: dict[str, Any] = {"metrics": metrics, "max_new_tokens": 3, "n_items": 5}
    together = sl.evaluate(task, conditions, model_of_two, **options)
    apart = [sl.evaluate(task, {name: c}, model_of_two, **options) for name, c in conditions.items()]
    by_metric = [frame[frame["metric"] == metric] for metric in metrics for frame in apart]
    assert_same_frame(together, pd.concat(by_metric))


@pytest.mark.parametrize("budget", [1, 400_000])
def test_memory_budget_does_not_matter(model_of_two: Bridge, budget: int) -> None:
    conditions = conditions_for(model_of_two) | {"hooked": Everywhere(stream_vector())}
    options: dict[str, Any] = {"metrics": ("first_token", "exact_match"), "max_new_tokens": 3, "n_items": 6}
    frames = []
    for size in (budget, "1GiB"):
        with sl.settings.using(memory_budget=size):
            frames.append(sl.evaluate(micro.task(), conditions, model_of_two, **options))
    assert_same_frame(*frames)


def test_a_sample_of_items_has_the_numbers_of_the_whole(model_of_two: Bridge) -> None:
    task, conditions = micro.task(), conditions_for(model_of_two)
    whole = sl.evaluate(task, conditions, model_of_two)
    sample = sl.evaluate(task, conditions, model_of_two, n_items=4)
    drawn = sample["item"].unique().tolist()
    assert len(drawn) == 4
    assert_same_frame(sample, whole[whole["item"].isin(drawn)])


def test_a_sample_depends_on_the_seed_and_more_items_than_there_are_means_all(gpt2: Bridge) -> None:
    drawn = {tuple(sl.evaluate(micro.task(), PLAIN, gpt2, n_items=4, seed=seed)["item"]) for seed in range(6)}
    assert len(drawn) > 1
    assert all(list(items) == sorted(set(items)) for items in drawn)
    everything = sl.evaluate(micro.task(), PLAIN, gpt2, n_items=10**6)["item"].tolist()
    assert everything == list(range(len(micro.task().test)))


def test_seed_changes_demonstrations_only(gpt2: Bridge) -> None:
    first, second = (
        sl.evaluate(micro.task(), conditions_for(gpt2), gpt2, seed=seed).set_index("condition")["logprob"]
        for seed in (0, 1)
    )
    for name, condition in conditions_for(gpt2).items():
        assert np.allclose(first[name], second[name], atol=1e-5) == (condition.n_shots == 0)


# -- demonstrations --


def shown(text: str) -> tuple[list[str], str]:
    """The inputs of the demonstrations of a prompt, and its query."""
    *inputs, query = [line.removeprefix("Q: ") for line in text.splitlines() if line.startswith("Q: ")]
    return inputs, query


def prompts(task: Task, n_shots: int, seed: int = 0, places: Sequence[int] | None = None) -> list[str]:
    items = task.test if places is None else [task.test[place] for place in places]
    return [p.text for p in few_shot_prompts(task, items, n_shots, micro.tokenizer(), seed, "test", places)]


def test_demonstrations_are_different_training_pairs_without_the_query() -> None:
    pairs = tuple(Example(micro.WORDS[i], micro.WORDS[i + 1]) for i in range(12))
    task = Task("closed", "own", pairs, pairs, pairs)  # every query is in train as well
    for seed in range(5):
        for text in prompts(task, 11, seed):
            inputs, query = shown(text)
            assert sorted([*inputs, query]) == sorted(pair.input for pair in pairs)
    text = prompts(task, 2)[0]
    inputs, query = shown(text)
    outputs = [pairs[micro.WORDS.index(word)].output for word in inputs]
    blocks = [f"Q: {word}\nA: {answer}\n\n" for word, answer in zip(inputs, outputs, strict=True)]
    assert text == "".join(blocks) + f"Q: {query}\nA:"


def test_demonstrations_depend_on_seed_task_and_item_only() -> None:
    task = micro.task()
    whole = prompts(task, 3)
    assert prompts(task, 3, places=[7, 2]) == [whole[7], whole[2]]
    assert prompts(task, 3, seed=1) != whole
    assert prompts(dataclasses.replace(task, name="other"), 3) != whole
    assert len({tuple(shown(text)[0]) for text in whole}) == len(whole)


def test_too_few_training_items_for_the_shots_is_an_error() -> None:
    task = Task("small", "own", (Example("ab", "ac"), Example("ad", "ae")), (), (Example("ab", "ac"),))
    assert [example.input for example in draw_demonstrations(task, 1, task.test[0], 0)] == ["ad"]
    with pytest.raises(sl.SitelensError, match="'small' has too few training items for 2 shots: 2 items"):
        draw_demonstrations(task, 2, task.test[0], 0)


# -- greedy continuations --


@pytest.mark.parametrize("family", micro.MORE_FAMILIES)
@pytest.mark.parametrize("ends", [{2}, {2, *range(20, 212, 12)}], ids=["one end", "many ends"])
def test_generation_is_the_oracles(family: str, model: Bridge, ends: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", sorted(ends))
    patch = random_patch(model)
    ids = [oracle.encode(text) for text in TEXTS]
    plain = [oracle.greedy(raw(family), row, NEW) for row in ids]
    patched = [oracle.patched_greedy(raw(family), row, NEW, *patch) for row in ids]
    assert sl.generate(TEXTS, None, model, max_new_tokens=NEW) == [oracle.text_of(row, ends) for row in plain]
    found = sl.generate(TEXTS, patch_heads(*patch), model, max_new_tokens=NEW)
    assert found == [oracle.text_of(row, ends) for row in patched]
    assert plain != patched
    early = {bool(ends & set(row)) for row in plain + patched}
    several = len(ends) > 1 and family in micro.FAMILIES
    assert not several or early == {True, False}  # some rows of the batch end before others


def test_patching_acts_on_the_prompts_last_token_not_on_decoding(gpt2: Bridge) -> None:
    patch = random_patch(gpt2)
    ids = [oracle.encode(text) for text in TEXTS]
    again_at_every_step = []
    for row in ids:
        with oracle.patched(raw("GPT2"), *patch):
            again_at_every_step.append(oracle.text_of(oracle.greedy(raw("GPT2"), row, NEW)))
    assert sl.generate(TEXTS, patch_heads(*patch), gpt2, max_new_tokens=NEW) != again_at_every_step


def test_generation_ends_at_a_newline(gpt2: Bridge) -> None:
    said = torch.tensor([oracle.encode(" ab")[0], oracle.encode("\n")[0]])

    def say(logits: Tensor, hook: Any) -> Tensor:
        """Makes the first text continue without end, and the second one contain a newline."""
        return torch.nn.functional.one_hot(said[: len(logits), None], logits.shape[-1]).float()

    with gpt2.hooks(fwd_hooks=[("unembed.hook_out", say)]):
        assert sl.generate(["aa", "ac"], None, gpt2, max_new_tokens=3) == ["ab ab ab", ""]


@pytest.mark.parametrize("steps", [1, 2, NEW])
def test_at_most_max_new_tokens_are_generated(gpt2: Bridge, steps: int) -> None:
    longest = [oracle.greedy(raw("GPT2"), oracle.encode(text), NEW) for text in TEXTS]
    found = sl.generate(TEXTS, None, gpt2, max_new_tokens=steps)
    assert found == [oracle.text_of(row[:steps]) for row in longest]


@pytest.mark.parametrize("budget", [1, 300_000])
def test_generation_does_not_depend_on_order_or_memory_budget(model_of_two: Bridge, budget: int) -> None:
    condition = patch_heads(*random_patch(model_of_two))
    expected = sl.generate(TEXTS, condition, model_of_two, max_new_tokens=NEW)
    with sl.settings.using(memory_budget=budget):
        found = sl.generate(TEXTS[::-1], condition, model_of_two, max_new_tokens=NEW)
    assert found == expected[::-1]
    assert sl.generate([], condition, model_of_two) == []


@pytest.mark.parametrize("family", micro.MORE_FAMILIES)
def test_predictions_and_their_scores_are_the_oracles(family: str, model: Bridge) -> None:
    items = []
    for place, word in enumerate(micro.WORDS[:9]):
        said = oracle.text_of(oracle.greedy(raw(family), zero_shot(word), NEW))
        answer = (said, said[: len(said) // 2].strip(), "ab")[place % 3]  # right, its beginning, wrong
        if len(said) > 3:
            items.append(Example(word, answer))
    task = task_of(items)
    conditions = {name: c for name, c in conditions_for(model).items() if name in ("zero-shot", "convex", "few-shot")}
    metrics = ("exact_match", "prefix_match")
    frame = sl.evaluate(task, conditions, model, metrics=metrics, max_new_tokens=NEW).set_index(["condition", "metric"])
    for name, condition in conditions.items():
        alpha, vectors, mixing = mix_of(condition, model)
        tokens = [
            oracle.patched_greedy(raw(family), ids, NEW, alpha, vectors, mixing) for ids in ids_for(task, condition)
        ]
        texts = [oracle.text_of(row) for row in tokens]
        answers = [item.output for item in task.test]
        for metric in metrics:
            assert frame["predicted"][name, metric].tolist() == texts
        exact = [int(text == answer) for text, answer in zip(texts, answers, strict=True)]
        prefix = [int(text[: len(answer)] == answer) for text, answer in zip(texts, answers, strict=True)]
        assert frame["score"][name, "exact_match"].tolist() == exact
        assert frame["score"][name, "prefix_match"].tolist() == prefix
    hits = frame.loc["zero-shot"].groupby("metric")["score"].sum()
    assert 0 < hits["exact_match"] < hits["prefix_match"] < len(items)


# -- custom conditions --


@dataclass(frozen=True, eq=False)
class Everywhere(Condition):
    """Adds a vector to the residual stream after the first layer; subclasses restrict positions and scope."""

    vector: Tensor
    positions: ClassVar[Any] = "all"
    scope: ClassVar[Any] = "generation"

    def fwd_hooks(self, model: Bridge) -> list[Hook]:
        def add(resid: Tensor, hook: Any) -> Tensor:
            added = torch.zeros_like(resid)
            added[:, slice(None) if self.positions == "all" else slice(-1, None)] = self.vector
            return resid + added

        return [("blocks.0.hook_resid_post", add)]


class WholePrompt(Everywhere):
    scope = "prompt"


class LastOfPrompt(Everywhere):
    positions = "last"
    scope = "prompt"


class LastAndDecoded(Everywhere):
    positions = "last"


# The positions of a text that each condition edits, if the prompt has n tokens.
REACH: dict[type[Everywhere], Callable[[int], slice]] = {
    Everywhere: lambda n: slice(None),
    WholePrompt: lambda n: slice(0, n),
    LastOfPrompt: lambda n: slice(n - 1, n),
    LastAndDecoded: lambda n: slice(n - 1, None),
}
KINDS = pytest.mark.parametrize("kind", REACH, ids=lambda kind: kind.__name__)


def stream_vector() -> Tensor:
    return 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(5))


@KINDS
def test_own_condition_generates_as_raw_hooks_do(one_of_two: str, model_of_two: Bridge, kind: type[Everywhere]) -> None:
    expected = []
    for text in TEXTS:
        ids = oracle.encode(text)
        with oracle.added_to_stream(raw(one_of_two), stream_vector(), REACH[kind](len(ids))):
            expected.append(oracle.text_of(oracle.greedy(raw(one_of_two), ids, NEW)))
    assert sl.generate(TEXTS, kind(stream_vector()), model_of_two, max_new_tokens=NEW) == expected


def test_own_condition_needs_no_padding_that_float64_cannot_express(llama_double: Bridge) -> None:
    network, vector, expected = micro.raw("Llama", torch.float64), stream_vector().double(), []
    for text in TEXTS:
        with oracle.added_to_stream(network, vector, slice(None)):
            expected.append(oracle.text_of(oracle.greedy(network, oracle.encode(text), NEW)))
    assert sl.generate(TEXTS, Everywhere(vector), llama_double, max_new_tokens=NEW) == expected


def test_kinds_of_own_conditions_generate_differently(model_of_two: Bridge) -> None:
    texts = {tuple(sl.generate(TEXTS, kind(stream_vector()), model_of_two, max_new_tokens=NEW)) for kind in REACH}
    assert len(texts) == len(REACH)


def test_own_condition_scores_as_raw_hooks_do_beside_others(one_of_two: str, model_of_two: Bridge) -> None:
    task = micro.task()
    conditions = {"zero-shot": sl.ZeroShot(), "own": Everywhere(stream_vector())}
    frame = sl.evaluate(task, conditions, model_of_two).set_index("condition")
    expected = []
    for item in task.test:
        with oracle.added_to_stream(raw(one_of_two), stream_vector(), slice(None)), torch.no_grad():
            logits = oracle.logits(raw(one_of_two), zero_shot(item.input))
        expected.append(logits.log_softmax(-1)[oracle.encode(" " + item.output)[0]].item())
    assert frame["logprob"]["own"].tolist() == pytest.approx(expected, abs=3e-6)
    alone = sl.evaluate(task, PLAIN, model_of_two)["logprob"]
    assert frame["logprob"]["zero-shot"].tolist() == pytest.approx(alone.tolist(), abs=1e-6)


@KINDS
def test_applied_acts_on_the_prompt_only_if_that_is_its_step(gpt2: Bridge, kind: type[Everywhere]) -> None:
    batch = batch_of(TEXTS)
    untouched = full_logits(batch, Model.of(gpt2))
    with kind(stream_vector()).applied(gpt2):
        prompt, later = full_logits(batch, Model.of(gpt2)), full_logits(batch, Model.of(gpt2))
    assert not torch.equal(prompt, untouched)
    assert torch.equal(later, untouched if kind.scope == "prompt" else prompt)


def test_patched_heads_applied_to_whole_prompts_write_what_the_fast_path_writes(model_of_two: Bridge) -> None:
    condition, batch, cache = patch_heads(*random_patch(model_of_two)), batch_of(TEXTS), DynamicCache()
    with condition.applied(model_of_two):
        logits = full_logits(batch, Model.of(model_of_two), cache)
        texts = decode(Model.of(model_of_two), logits, cache, batch.mask, micro.tokenizer(), NEW, {2})
    assert [text.strip() for text in texts] == sl.generate(
        TEXTS, condition, model_of_two, max_new_tokens=NEW, stop=None
    )


# -- conditions on disk --


@pytest.mark.parametrize("name", ["zero-shot", "few-shot", "convex", "additive", "patched few-shot"])
def test_saved_conditions_come_back_the_same(gpt2: Bridge, tmp_path: Path, name: str) -> None:
    condition = conditions_for(gpt2)[name]
    found = Condition.load(condition.save(tmp_path / "deep" / "condition.safetensors"))
    assert type(found) is type(condition)
    assert found.n_shots == condition.n_shots
    before, after = condition.patch(gpt2), found.patch(gpt2)
    assert before is not None and after is not None
    assert torch.equal(before.alpha, after.alpha)
    assert torch.equal(before.vectors, after.vectors)
    assert before.mixing == after.mixing
    scores, again = (sl.evaluate(micro.task(n=20), {"": each}, gpt2) for each in (condition, found))
    pd.testing.assert_frame_equal(again, scores)


def test_saved_patch_remembers_where_its_parts_come_from(tmp_path: Path) -> None:
    selection = sl.HeadSelection(torch.rand(2, 4), "shift", "0" * 32, "by hand")
    embedding = TaskEmbedding(torch.rand(2, 4, 8), "other", None, 7, 3, 5)
    found = Condition.load(PatchHeads(selection, embedding).save(tmp_path / "patch.safetensors"))
    assert isinstance(found, PatchHeads)
    for before, after in ((selection, found.selection), (embedding, found.embedding)):
        fields = [field.name for field in dataclasses.fields(before) if field.name not in ("alpha", "mean_z")]
        assert [getattr(before, field) for field in fields] == [getattr(after, field) for field in fields]


def test_own_conditions_come_back_under_their_own_kind(gpt2: Bridge, tmp_path: Path) -> None:
    found = Condition.load(LastOfPrompt(stream_vector()).save(tmp_path / "own.safetensors"))
    assert type(found) is LastOfPrompt
    assert torch.equal(found.vector, stream_vector())


def test_a_condition_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    @dataclass(frozen=True, eq=False)
    class Odd(Condition):
        anything: object

        def fwd_hooks(self, model: Bridge) -> list[Hook]:
            return []

    try:
        with pytest.raises(sl.SitelensError, match="Odd cannot be saved: it must define state"):
            Odd(object()).save(tmp_path / "own.safetensors")
    finally:
        del Condition.registry[Odd.saved_as]


def test_a_condition_of_an_unknown_kind_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WholePrompt(stream_vector()).save(tmp_path / "own.safetensors")
    monkeypatch.delitem(Condition.registry, WholePrompt.saved_as)
    with pytest.raises(sl.SitelensError, match=rf"class WholePrompt: import {__name__} first, which defines it"):
        Condition.load(path)


def test_loading_what_is_no_condition_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match=r"there is no file .*none\.safetensors"):
        Condition.load(tmp_path / "none.safetensors")
    path = sl.HeadSelection(torch.rand(2, 4)).save(tmp_path / "alpha.safetensors")
    with pytest.raises(sl.SitelensError, match="holds a selection, not a condition"):
        Condition.load(path)


# -- metrics and the echo baseline --


def test_any_accepted_answer_matches(gpt2: Bridge) -> None:
    rows = sl.echo(task_of([Example("rome", "paris", ("berlin", "rome"))]), gpt2, metrics=("exact_match",))
    assert rows["score"].tolist() == [1]


def test_first_token_of_an_echo_is_compared_with_the_answers(gpt2: Bridge) -> None:
    task = task_of([Example("ab cd", "ab ef"), Example("ab", "cd"), Example("ab", "cd", ("ab",))])
    rows = sl.echo(task, gpt2, metrics=("first_token",))
    assert rows["score"].tolist() == [1, 0, 1]
    assert rows["predicted"].tolist() == [" ab"] * 3


def test_echo_stands_beside_prefix_match(gpt2: Bridge) -> None:
    task = task_of([Example("ab", "ab"), Example("ab cd", "ab"), Example("ab", "cd")])
    metrics = ("first_token", "prefix_match", "exact_match")
    frame = sl.evaluate(task, PLAIN, gpt2, metrics=metrics, max_new_tokens=1)
    rows = frame[frame["condition"] == "echo"]
    assert frame.index.tolist() == list(range(len(frame)))
    assert set(rows["metric"]) == {"prefix_match"}
    assert rows["score"].tolist() == [1, 1, 0]
    assert rows["predicted"].tolist() == rows["input"].tolist() == ["ab", "ab cd", "ab"]
    assert rows[["logprob", "rank"]].isna().all(axis=None)
    without = sl.evaluate(task, PLAIN, gpt2, metrics=metrics[::2], max_new_tokens=1)
    assert set(without["condition"]) == {"zero-shot"}
    every = sl.evaluate(task, PLAIN, gpt2, metrics=metrics, max_new_tokens=1, with_echo=True)
    pd.testing.assert_frame_equal(
        every[every["condition"] == "echo"].reset_index(drop=True), sl.echo(task, gpt2, metrics=metrics)
    )
    none = sl.evaluate(task, PLAIN, gpt2, metrics=metrics, max_new_tokens=1, with_echo=False)
    assert set(none["condition"]) == {"zero-shot"}


def test_echo_is_given_for_the_items_of_the_sample(gpt2: Bridge) -> None:
    options: dict[str, Any] = {"metrics": ("prefix_match",), "n_items": 3, "seed": 4, "split": "train"}
    frame = sl.evaluate(micro.task(), PLAIN, gpt2, max_new_tokens=1, **options)
    items = {name: rows["item"].tolist() for name, rows in frame.groupby("condition")}
    assert items["echo"] == items["zero-shot"]
    assert sl.echo(micro.task(), gpt2, **options)["item"].tolist() == items["echo"]


EMPTY_ANSWERS = pytest.mark.parametrize(
    "item", [Example("ab", "(cd)"), Example("ab", "cd", ("(ef)",))], ids=["preferred", "further"]
)


@EMPTY_ANSWERS
def test_an_answer_that_is_empty_after_normalization_is_an_error(gpt2: Bridge, item: Example) -> None:
    task = task_of([Example("ac", "ad"), item])
    message = r"'told', input 'ab': prefix_match cannot score the answer '\(..\)': it is empty after normalization"
    with pytest.raises(sl.SitelensError, match=message):
        sl.evaluate(task, PLAIN, gpt2, metrics=("prefix_match",))
    with pytest.raises(sl.SitelensError, match=message):
        sl.echo(task, gpt2, metrics=("prefix_match",))
    for metric in ("first_token", "exact_match"):
        assert len(sl.evaluate(task, PLAIN, gpt2, metrics=(metric,), max_new_tokens=1)) == 2


# -- summaries --


def scores_of(values: Mapping[tuple[str, str, int], Sequence[int]], first_item: int = 0) -> pd.DataFrame:
    """A frame in the format of `evaluate`: the scores of items 0, 1, ... by (task, condition, seed)."""
    rows = [
        (task, condition, "first_token", seed, item, score)
        for (task, condition, seed), scores in values.items()
        for item, score in enumerate(scores, start=first_item)
    ]
    return pd.DataFrame(rows, columns=["task", "condition", "metric", "seed", "item", "score"])


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 10), (7, 7), (40, 100)])
def test_one_task_has_a_wilson_interval(hits: int, n: int) -> None:
    row = sl.summarize(scores_of({("t", "c", 0): [1] * hits + [0] * (n - hits)})).iloc[0]
    z, share = 1.959963984540054, hits / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert (row["mean"], row["n"], row["interval"]) == (share, n, "wilson")
    assert (row["low"], row["high"]) == pytest.approx((center - half, center + half), abs=1e-12)


def test_items_repeated_over_seeds_count_once() -> None:
    scores = [1] * 40 + [0] * 60
    once, thrice = (sl.summarize(scores_of({("t", "c", seed): scores for seed in range(n)})).iloc[0] for n in (1, 3))
    assert (once["interval"], thrice["interval"]) == ("wilson", "items and seeds")
    assert (thrice["mean"], thrice["n"]) == (0.4, 300)
    assert (thrice["low"], thrice["high"]) == pytest.approx(
        (once["low"], once["high"])
    )  # of 100 items, not of 300 rows


def test_seeds_that_differ_widen_the_interval() -> None:
    scores = {("t", "c", seed): [1] * (30 + 15 * seed) + [0] * (70 - 15 * seed) for seed in range(3)}
    row = sl.summarize(scores_of(scores)).iloc[0]
    half = 4.302652729911275 * 0.15 / math.sqrt(3)  # Student's t interval of three means that are 0.15 apart
    assert row["mean"] == pytest.approx(0.45) and row["interval"] == "items and seeds"
    assert (row["low"], row["high"]) == pytest.approx((0.45 - half, 0.45 + half), abs=0.04)


def test_repeats_are_told_apart_by_their_columns_or_by_their_order() -> None:
    scores = scores_of({("t", "c", seed): [1] * (30 + 20 * seed) + [0] * (70 - 20 * seed) for seed in range(3)})
    expected = sl.summarize(scores).iloc[0]
    draws = scores.assign(draw=scores["seed"].astype("Int64"), seed=0)
    unnamed = scores.drop(columns="seed")
    both = scores.assign(training_seed=scores["seed"])
    for frame, interval in (
        (draws, "items and draws"), (unnamed, "items and repeats"), (both, "items, seeds and training seeds"),
        (draws.sample(frac=1, random_state=0), "items and draws"),
    ):  # fmt: skip
        row = sl.summarize(frame).iloc[0]
        assert row["interval"] == interval
        assert row[["mean", "low", "high"]].tolist() == pytest.approx(expected[["mean", "low", "high"]].tolist())


def test_items_that_all_have_the_same_mean_leave_a_width() -> None:
    row = sl.summarize(scores_of({("t", "c", 0): [0, 1] * 5, ("t", "c", 1): [1, 0] * 5})).iloc[0]
    assert row["mean"] == 0.5 and row["low"] < 0.45 and row["high"] > 0.55 and row["interval"] == "items and seeds"


def test_several_tasks_weigh_the_same_and_have_both_intervals() -> None:
    scores = scores_of({("small", "c", 0): [1, 0] * 10, ("large", "c", 0): [1] * 100})
    row = sl.summarize(scores, by=("condition", "metric")).iloc[0]
    assert (row["mean"], row["n"], row["interval"]) == (0.75, 120, "items")
    half = 1.96 * math.sqrt(0.25 / 20) / 2
    assert (row["low"], row["high"]) == pytest.approx((0.75 - half, 0.75 + half), abs=0.03)
    assert row["tasks_low"] < 0.1 and row["tasks_high"] > 0.95  # two tasks say little about others
    alone = sl.summarize(scores, by=("task", "condition")).set_index("task")
    assert alone["interval"].tolist() == ["wilson", "wilson"] and "tasks_low" not in alone


def test_differences_are_paired_by_item() -> None:
    scores = scores_of({("t", "a", 0): [0, 1] * 25, ("t", "b", 0): [0, 1] * 25, ("t", "c", 0): [1] * 50})
    summary = sl.summarize(scores.sample(frac=1, random_state=0), against="a").set_index("condition")
    columns = ["difference", "difference_low", "difference_high"]
    same = [summary[column]["b"] for column in columns]
    assert same == pytest.approx([0, -0.0523, 0.0523], abs=1e-4)  # fifty identical pairs
    assert summary.loc["c", "difference"] == 0.5
    assert summary.loc["c", "difference_low"] == pytest.approx(0.5 - 1.96 * math.sqrt(0.25 / 50), abs=0.03)
    assert all(pd.isna(summary[column]["a"]) for column in columns)


def test_differences_pair_seeds_where_both_have_them() -> None:
    """A shift that a seed causes in both conditions does not affect their difference."""
    rng = np.random.default_rng(0)
    rows = {}
    for seed, p in enumerate((0.1, 0.5, 0.9)):
        base = rng.random(200)
        rows["t", "a", seed] = (base < p).astype(int).tolist()
        rows["t", "b", seed] = (base < p + 0.05).astype(int).tolist()
    scores = scores_of(rows)
    paired = sl.summarize(scores, against="a").set_index("condition").loc["b"].to_dict()
    assert paired["difference_high"] - paired["difference_low"] < 0.1
    moved = scores.assign(seed=scores["seed"].where(scores["condition"] == "a", scores["seed"] + 10))
    apart = sl.summarize(moved, against="a").set_index("condition").loc["b"].to_dict()
    assert apart["difference"] == pytest.approx(paired["difference"])
    assert apart["difference_high"] - apart["difference_low"] > 0.9
    single = scores[(scores["condition"] == "a") | (scores["seed"] == 1)]
    mixed = (
        sl.summarize(single, against="b").set_index("condition").loc["a"].to_dict()
    )  # every seed of a against the single seed of b
    assert mixed["difference"] == pytest.approx(scores[scores["condition"] == "a"]["score"].mean()
                                                - single[single["condition"] == "b"]["score"].mean())  # fmt: skip
    assert mixed["difference_high"] - mixed["difference_low"] > 0.9


def test_differences_use_the_items_that_both_have() -> None:
    left = scores_of({("t", "a", 0): [0, 0, 1, 1]})
    right = scores_of({("t", "b", 0): [1, 0, 1, 1]}, first_item=2)  # items 2 to 5
    with pytest.warns(
        sl.SitelensWarning, match="b against a: 4 items were answered under one of the two conditions only"
    ):
        row = sl.summarize(pd.concat([left, right]), against="a").set_index("condition").loc["b"].to_dict()
    assert row["difference"] == -0.5
    right["item"] += 10
    with pytest.raises(sl.SitelensError, match="not evaluated on the same items"):
        sl.summarize(pd.concat([left, right]), against="a")


def test_differences_over_tasks_are_the_mean_of_the_tasks_own() -> None:
    scores = scores_of({("s", "a", 0): [0], ("s", "b", 0): [1], ("l", "a", 0): [1, 1, 0], ("l", "b", 0): [1, 1, 0]})
    row = sl.summarize(scores, by=("condition",), against="a").set_index("condition").loc["b"].to_dict()
    assert row["difference"] == 0.5
    assert row["difference_low"] < 0.4 and row["difference_high"] > 0.6
    assert row["difference_tasks_low"] == -1 and row["difference_tasks_high"] == 1


def test_a_missing_key_is_a_group_of_its_own() -> None:
    scores = scores_of({("t", "a", 0): [0, 1], ("t", "b", 0): [1, 1]})
    scores["draw"] = pd.array([0, 0, pd.NA, pd.NA], dtype="Int64")
    summary = sl.summarize(scores, by=("condition", "draw"))
    assert summary["condition"].tolist() == ["a", "b"] and summary["mean"].tolist() == [0.5, 1]
    assert summary["draw"].isna().tolist() == [False, True]
    scores["draw"] = pd.array([pd.NA] * 4, dtype="Int64")
    assert sl.summarize(scores, by=("condition", "draw"), against="a")["difference"].tolist()[1] == 0.5


def test_copies_count_once() -> None:
    scores = scores_of({("t", "a", 0): [0, 1, 1]}).assign(
        logprob=[-1.0, -2.0, -3.0], predicted=pd.Series(["x", None, "z"])
    )
    with pytest.warns(sl.SitelensWarning, match="3 rows are exact copies of others"):
        row = sl.summarize(pd.concat([scores, scores])).iloc[0]
    assert (row["n"], row["interval"]) == (3, "wilson")
    other = scores.assign(logprob=[-1.5, -2.0, -2.5])  # of another run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sl.summarize(pd.concat([scores, other.iloc[[0, 2]]])).iloc[0]["n"] == 5


def test_groups_keep_their_order_and_the_echo_has_no_difference(gpt2: Bridge) -> None:
    conditions = {"zero-shot": sl.ZeroShot(), "another": sl.FewShot(1)}
    frame = sl.evaluate(micro.task(), conditions, gpt2, metrics=("prefix_match",), max_new_tokens=1)
    summary = sl.summarize(frame, against="zero-shot")
    assert summary["condition"].tolist() == ["zero-shot", "another", "echo"]
    assert summary["difference"].isna().tolist() == [True, False, True]
    assert (summary["n"] == len(micro.task().test)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: sl.summarize(frame.iloc[:0]), "nothing to summarize: no rows"),
        (lambda frame: sl.summarize(frame.drop(columns="score")), "no column score"),
        (lambda frame: sl.summarize(frame, by=("color",)), "no column color"),
        (lambda frame: sl.summarize(frame, against="b"), "no condition 'b' to compare with.*there are: a"),
        (lambda frame: sl.summarize(frame, by=("task",), against="a"), "'condition' is not in by"),
        (lambda frame: sl.summarize(frame, by="task"), r"by must be a list of column names: write \('task',\)"),
        (lambda frame: sl.summarize(frame, by=()), "by must name a column at least"),
        (lambda frame: sl.summarize(frame, by=("task", "task")), "the column 'task' is given twice"),
        (lambda frame: sl.summarize(pd.concat([frame, frame], axis=1)), "the column 'task' is given twice"),
        (lambda frame: sl.summarize(frame.assign(score=[1, None])), "1 lack one; first task 't', item 1, score"),
        (lambda frame: sl.summarize(frame.assign(score=["1", "x"])), "score x"),
        (lambda frame: sl.summarize(frame.assign(score=[-1.5, 0])), "a score from 0 to 1; 1 lack one.*score -1.5"),
        (lambda frame: sl.summarize(frame.assign(item=[None, 1])), "needs a task, an item"),
        (
            lambda frame: sl.summarize(pd.concat([frame, frame.assign(metric="exact_match")]), by=("task",)),
            "several metrics .first_token, exact_match. have no mean in common: add 'metric' to by",
        ),
    ],
)
def test_what_cannot_be_summarized_is_an_error(change: Callable[[pd.DataFrame], Any], message: str) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        change(scores_of({("t", "a", 0): [0, 1]}))


# -- bad input --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("accuracy",)}, "unknown metric 'accuracy'; one of first_token, .*, exact_match, prefix_match"),
        ({"metrics": ()}, "unknown metric .none given."),
        ({"split": "dev"}, "unknown split 'dev'; one of train, valid, test"),
        ({"n_items": 0}, "n_items must be at least 1, got 0"),
        ({"n_items": -1}, "n_items must be at least 1, got -1"),
        ({"memory_budget": "1GiB"}, r"is a setting, as in `with sl.settings.using\(memory_budget='1GiB'\):`"),
        ({"progress": False}, r"is a setting, as in `with sl.settings.using\(progress=False\):`"),
        ({"metrics": ("exact_match",), "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met_are_an_error(gpt2: Bridge, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        sl.evaluate(micro.task(), PLAIN, gpt2, **options)


def test_no_conditions_are_an_error(gpt2: Bridge) -> None:
    with pytest.raises(sl.SitelensError, match="give at least one condition"):
        sl.evaluate(micro.task(), {}, gpt2)


def test_a_task_without_items_is_an_error(gpt2: Bridge) -> None:
    with pytest.raises(sl.SitelensError, match="task 'told' has no test items"):
        sl.evaluate(task_of([]), PLAIN, gpt2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: sl.generate("Q: ab", None, model), r"must be a list of texts: write generate\(\['Q: ab'\]\)"),
        (lambda model: sl.generate(["ab"], None, model, max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda model: sl.generate(["ab", ""], None, model), "the prompt '' has no tokens"),
        (
            lambda model: sl.generate(["ab " * 300], None, model),
            "a prompt has .* tokens, the model's context holds 256",
        ),
        (lambda model: sl.generate([" ab" * 250], None, model, max_new_tokens=20), "context holds 256"),
    ],
    ids=["one text", "no new tokens", "empty", "too long", "too long with its continuation"],
)
def test_prompts_that_cannot_be_continued_are_an_error(
    gpt2: Bridge, call: Callable[[Bridge], Any], message: str
) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        call(gpt2)


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        (40, "task 'shift', 40 shots: a prompt has 326 tokens, the model's context holds 256: use fewer shots"),
        (43, "task 'shift' has too few training items for 43 shots: 42 items"),
    ],
)
def test_too_many_shots_are_an_error(gpt2: Bridge, shots: int, message: str) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        sl.evaluate(micro.task(), {"": sl.FewShot(shots)}, gpt2)


def test_numbers_of_shots_that_make_no_sense_are_an_error() -> None:
    with pytest.raises(sl.SitelensError, match="n_shots must be at least 0, got -1"):
        sl.FewShot(-1)
    with pytest.raises(sl.SitelensError, match=r"use FewShot\(3\)"):
        sl.ZeroShot(3)


def patch_made_for(alpha: str | None, vectors: str | None, shape: tuple[int, int, int] = (2, 4, 8)) -> PatchHeads:
    selection = sl.HeadSelection(torch.rand(shape[:2]), "shift", alpha)
    return PatchHeads(selection, TaskEmbedding(torch.rand(shape), "shift", vectors, 1, 0, 0))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (patch_made_for("0" * 32, None), "the selection of 'shift' was made with another model"),
        (patch_made_for(None, "0" * 32), "the embedding of 'shift' was made with another model"),
        (patch_made_for(None, None, (3, 4, 8)), r"the selection of 'shift' has shape \(3, 4\).*has \(2, 4\)"),
        (patch_made_for(None, None, (2, 4, 16)), r"the embedding of 'shift' has shape \(2, 4, 16\).*has \(2, 4, 8\)"),
    ],
    ids=["selection", "embedding", "layers", "d_head"],
)
def test_a_patch_made_for_another_model_is_an_error_everywhere(
    gpt2: Bridge, condition: PatchHeads, message: str
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: sl.evaluate(micro.task(), {"plain": sl.ZeroShot(), "other": condition}, gpt2),
        lambda: sl.generate(["ab"], condition, gpt2),
        lambda: condition.fwd_hooks(gpt2),
        lambda: condition.applied(gpt2).__enter__(),
    ]
    for call in calls:
        with pytest.raises(sl.SitelensError, match=message):
            call()


def test_a_patch_fits_the_model_it_was_made_with(gpt2: Bridge) -> None:
    made_here = patch_made_for(fingerprint(gpt2), fingerprint(gpt2))
    assert len(sl.generate(["ab"], made_here, gpt2)) == 1
    with pytest.raises(sl.SitelensError, match="was made with another model"):
        sl.generate(["ab"], made_here, micro.bridge("GPT2", seed=1))


def test_parts_of_a_patch_that_do_not_belong_together_are_an_error() -> None:
    embedding = TaskEmbedding(torch.rand(2, 4, 8), "t", None, 1, 0, 0)
    with pytest.raises(sl.SitelensError, match=r"\(2, 3\) and the embedding of 't' \(2, 4, 8\) come from different"):
        PatchHeads(sl.HeadSelection(torch.rand(2, 3)), embedding)
    with pytest.raises(sl.SitelensError, match="come from different models"):
        patch_made_for("0" * 32, "1" * 32)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_mixing_is_an_error() -> None:
    with pytest.raises(sl.SitelensError, match="mixing must be 'convex' or 'additive', not 'half'"):
        patch_heads(torch.rand(2, 4), torch.rand(2, 4, 8), mixing="half")


def test_logits_that_are_no_numbers_are_an_error(gpt2: Bridge) -> None:
    alpha, vectors = random_patch(gpt2)
    with pytest.raises(sl.SitelensError, match="not finite"):
        sl.evaluate(micro.task(), {"broken": patch_heads(alpha, vectors * math.nan)}, gpt2)


def test_a_condition_named_like_the_echo_baseline_is_an_error(gpt2: Bridge) -> None:
    with pytest.raises(sl.SitelensError, match="echo"):
        sl.evaluate(micro.task(), {"echo": sl.ZeroShot()}, gpt2, metrics=("prefix_match",), max_new_tokens=1)
