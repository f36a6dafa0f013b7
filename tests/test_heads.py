"""Analyses of single heads compared with raw Hugging Face models: direct logits, attention, roles, indirect effects."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import sitelens as sl
from sitelens.conditions.embedding import TaskEmbedding, embedding_prompts
from sitelens.engine.batches import task_batch, tokenize
from sitelens.engine.memory import prefix_bytes
from sitelens.engine.prompts import Prompt, few_shot_prompts
from sitelens.heads import (
    ROLES,
    attention,
    attention_example,
    attention_roles,
    effects,
    head_attribution,
    indirect_effects,
    induction_scores,
    promoted_tokens,
)
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from sitelens.tasks import Example, Task
from tests import micro, oracle

attention_module: Any = importlib.import_module("sitelens.heads.attention")  # the package has a function of this name
LAYERS, HEADS = 2, 4
ALL = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
FIRST, INPUT, ANSWER, QUERY, TEMPLATE = ROLES


@functools.cache
def raw(family: str) -> Any:
    """A raw model with random norms and biases, which are all 1 and 0 in a usual initialization."""
    network = micro.raw(family).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        if weight.ndim == 1:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return network


@functools.cache
def _bridge(family: str) -> Bridge:
    return micro.bridged(copy.deepcopy(raw(family)), family, micro.tokenizer())


@pytest.fixture
def model(family: str) -> Iterator[Bridge]:
    """A model of each family."""
    yield _bridge(family)
    assert not micro.hooks_left(_bridge(family))


@pytest.fixture
def gpt2() -> Iterator[Bridge]:
    yield _bridge("GPT2")
    assert not micro.hooks_left(_bridge("GPT2"))


def worded(name: str = "worded", n: int = 40) -> Task:
    """A task whose inputs have one to three words, so that prompts differ in length."""
    rng, words = random.Random(name), micro.WORDS
    inputs = [" ".join([words[i], *rng.choices(words, k=i % 3)]) for i in range(n)]
    return Task.from_pairs(name, [(text, words[(7 * i + 3) % len(words)]) for i, text in enumerate(inputs)])


def embedding_for(model: Bridge, task: Task, **options: Any) -> TaskEmbedding:
    shape = LAYERS, HEADS, model.cfg.d_head
    mean_z = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    options = {"n_prompts": 3, "n_shots": 2, "seed": 0} | options
    return TaskEmbedding(mean_z, task.name, None, **options)


def by_head(frame: pd.DataFrame, name: str) -> Tensor:
    """A column of the frame as `[layer head]`; asserts that the rows are in this order."""
    assert list(zip(frame["layer"], frame["head"], strict=True)) == ALL
    return torch.tensor(frame[name].tolist()).reshape(LAYERS, HEADS)


# Direct logits, from modules of the raw model and their inputs and outputs alone


@contextmanager
def recorded(modules: Sequence[torch.nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that, after the block, holds the input and output of each module at the last token of the last pass."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(i: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            source = args[0] if args else kwargs["hidden_states"]
            seen[i] = source[0, -1], (output if isinstance(output, Tensor) else output[0])[0, -1]

        return hook

    handles = [module.register_forward_hook(keep(i), with_kwargs=True) for i, module in enumerate(modules)]
    found: list[tuple[Tensor, Tensor]] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += [seen[i] for i in range(len(modules))]


def named(network: Any, pattern: str) -> list[torch.nn.Module]:
    return [module for name, module in network.named_modules() if re.search(pattern, name)]


def frozen(norm: torch.nn.Module, source: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map that a norm is if its scale is fixed at one input; derived from input and output alone."""
    centered = isinstance(norm, torch.nn.LayerNorm)
    shift = norm(torch.zeros(1, len(source)))[0]  # what a LayerNorm adds
    gain = (output - shift) / (source - source.mean() if centered else source)
    return lambda x: (x - x.mean(-1, keepdim=True) if centered else x) * gain


class Parts:
    """The contribution of each part of a raw model to the logits of one prompt, with the norms' scales fixed."""

    def __init__(self, family: str, ids: Sequence[int]) -> None:
        network = self.network = raw(family)
        gemma = family.startswith("Gemma")
        self.projections = micro.output_projections(network)
        after = named(network, r"layers\.\d+\.post_attention_layernorm$") if gemma else []
        mlps = named(network, r"\.\d+\.post_feedforward_layernorm$" if gemma else r"\.\d+\.mlp$")
        (final,) = named(network, r"(\.norm|ln_f|final_layer_norm)$")
        layers = named(network, r"\.(h|layers)\.\d+$")
        assert len(mlps) == len(layers) == len(self.projections) == LAYERS and len(after) == LAYERS * gemma
        with recorded([final, *after, *mlps, *layers]) as seen:
            self.logits = oracle.logits(network, ids)
        self.final = frozen(final, *seen[0])
        self.after = [frozen(norm, *pair) for norm, pair in zip(after, seen[1:], strict=False)]
        self.mlps = [output for _, output in seen[1 + len(after) :][:LAYERS]]
        self.embedded = seen[-LAYERS][0]
        self.nothing = network.lm_head(torch.zeros(len(self.embedded)))
        self.constant = self.unembed(final(torch.zeros_like(self.embedded)[None])[0])
        self.z = oracle.head_outputs(network, [ids], HEADS)[0]

    def unembed(self, x: Tensor) -> Tensor:
        return self.network.lm_head(x) - self.nothing

    def from_stream(self, write: Tensor) -> Tensor:
        """Contribution `[vocab]` of a vector in the residual stream."""
        return self.unembed(self.final(write))

    def from_attention(self, write: Tensor, layer: int) -> Tensor:
        return self.from_stream(self.after[layer](write) if self.after else write)

    def from_head(self, layer: int, head: int, z: Tensor) -> Tensor:
        """Contribution `[vocab]` of a head with output z: the projection of z alone, without its bias."""
        alone = torch.zeros(HEADS, len(z))
        alone[head] = z
        project = self.projections[layer]
        none = project(torch.zeros(1, 1, alone.numel()))
        return self.from_attention((project(alone.reshape(1, 1, -1)) - none)[0, 0], layer)

    def from_all_else(self) -> Tensor:
        """Contribution `[vocab]` of embedding, MLPs and all biases."""
        biases = [p(torch.zeros(1, 1, self.z[0].numel()))[0, 0] for p in self.projections]
        total = self.from_stream(self.embedded) + self.constant + self.nothing
        for layer in range(LAYERS):
            total = total + self.from_stream(self.mlps[layer]) + self.from_attention(biases[layer], layer)
        return total


def prompts_of(task: Task, n: int, shots: int) -> list[Prompt]:
    return few_shot_prompts(task, task.valid[:n], shots, micro.tokenizer(), 0, "valid", range(n))


def past_the_mean(logits: Tensor, prompt: Prompt) -> Tensor:
    ids = oracle.encode(prompt.answers[0])
    return logits[ids[0]] - logits.mean()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_attribution_is_what_the_answer_loses_without_the_heads_write(family: str, model: Bridge) -> None:
    task = worded()
    prompts = prompts_of(task, 3, 2)
    expected = torch.zeros(LAYERS, HEADS)
    for prompt in prompts:
        parts = Parts(family, oracle.encode(prompt.text))
        for layer, head in ALL:
            written = parts.from_head(layer, head, parts.z[layer, head])
            expected[layer, head] += past_the_mean(written, prompt) / len(prompts)
    assert len({len(oracle.encode(prompt.text)) for prompt in prompts}) > 1
    close(by_head(head_attribution(task, model, n_items=3, n_shots=2), "attribution"), expected)


def test_heads_and_all_else_add_up_to_the_real_logit(family: str, model: Bridge) -> None:
    task = worded()
    (prompt,) = prompts_of(task, 1, 2)
    parts = Parts(family, oracle.encode(prompt.text))
    heads = head_attribution(task, model, n_items=1, n_shots=2)["attribution"].sum()
    rest = past_the_mean(parts.from_all_else(), prompt)
    total = past_the_mean(parts.logits, prompt)
    assert abs(heads) > 0.01 * abs(total)
    assert heads + float(rest) == pytest.approx(float(total), rel=1e-4, abs=1e-4 * float(parts.logits.abs().max()))


def test_attribution_of_an_embedding_uses_its_outputs_and_the_prompts_scales(family: str, model: Bridge) -> None:
    task = worded()
    embedding = embedding_for(model, task)
    (prompt,) = prompts_of(task, 1, 2)
    parts = Parts(family, oracle.encode(prompt.text))
    written = [past_the_mean(parts.from_head(*head, embedding.mean_z[head]), prompt) for head in ALL]
    found = head_attribution(task, model, embedding=embedding, n_items=1, n_shots=2)
    close(by_head(found, "attribution"), torch.stack(written).reshape(LAYERS, HEADS))


def test_promoted_tokens_are_ranked_as_by_hand(family: str, model: Bridge) -> None:
    task, n = worded(), 6
    embedding, tokenizer = embedding_for(model, task), micro.tokenizer()
    prompts = embedding_prompts(task, tokenizer, 3, 2, 0)
    for head in ((0, 1), (1, 3)):
        logits = torch.stack([
            Parts(family, oracle.encode(prompt.text)).from_head(*head, embedding.mean_z[head]) for prompt in prompts
        ]).mean(0)  # fmt: skip
        logits = logits - logits.mean()
        order = logits.argsort(descending=True).tolist()
        order = order[:n] + order[-n:]
        found = promoted_tokens(embedding, head, task, model, n=n)
        assert found["token"].tolist() == [tokenizer.decode([i]) for i in order]
        close(torch.tensor(found["logit"].tolist()), logits[order])
    with pytest.raises(sl.SitelensError, match="n must be at least 1, got 0"):
        promoted_tokens(embedding, (0, 0), task, model, n=0)


def test_the_prompts_of_promoted_tokens_are_at_most_eight_of_the_embeddings(
    gpt2: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sitelens.heads import attribution

    asked: list[tuple[Any, ...]] = []

    def seen(*args: Any) -> list[Prompt]:
        asked.append(args[2:])
        return embedding_prompts(*args)

    monkeypatch.setattr(attribution, "embedding_prompts", seen)
    task = worded()
    promoted_tokens(embedding_for(gpt2, task, n_prompts=50, n_shots=1, seed=4), (0, 0), task, gpt2)
    assert asked == [(8, 1, 4)]


# Attention


TEXTS = ["Q: aa\nA:", "Q: ba bb bc\nA: ca\n\nQ: cb cc\nA:", "Q: da\nA: db\n\nQ: ea eb ec ed\nA:", "ah bh"]


def test_attention_is_that_of_the_raw_model_whatever_the_rows_lengths(family: str, model: Bridge) -> None:
    heads = [(1, 2), (0, 0), (1, 0), (1, 2)]  # in any order, one head twice
    batch = tokenize([Prompt(text, ()) for text in TEXTS], micro.tokenizer())
    with settings.using(memory_budget=1):  # one row at a time
        found = attention(batch, heads, model)
    torch.testing.assert_close(found, attention(batch, heads, model), rtol=1e-5, atol=1e-6)
    assert batch.lengths == [6, 17, 17, 2] and found.shape == (4, 4, 17)
    for row, text in enumerate(TEXTS):
        ids = oracle.encode(text)
        weights = raw(family)(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        expected = torch.stack([weights[layer][0, head, -1] for layer, head in heads])
        torch.testing.assert_close(found[row, :, -len(ids) :], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[row, :, : -len(ids)], torch.zeros_like(found[row, :, : -len(ids)]))
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 4))


def words(*pairs: tuple[str, str]) -> Task:
    """A task with these training items, whose only query is "aa"."""
    train = tuple(Example(*pair) for pair in pairs)
    query = (Example("aa", "ab"),)
    return Task("told", "test", train, query, query)


def test_every_token_of_an_example_has_its_role(gpt2: Bridge) -> None:
    task = words(("ba bb", "bc"), ("ba bb", "bc"))
    frame = attention_example(task, [(1, 1), (0, 3)], gpt2, n_shots=2)
    shown = [
        ("Q", TEMPLATE), (":", TEMPLATE), (" ba", INPUT), (" bb", INPUT), ("\n", TEMPLATE), ("A", TEMPLATE),
        (":", TEMPLATE), (" bc", ANSWER), ("\n\n", TEMPLATE),
    ]  # fmt: skip
    asked = [("Q", TEMPLATE), (":", TEMPLATE), (" aa", QUERY), ("\n", TEMPLATE), ("A", TEMPLATE), (":", TEMPLATE)]
    expected = [("Q", FIRST), *shown[1:], *shown, *asked]
    assert list(zip(frame["token"], frame["role"], strict=True)) == expected
    assert list(frame.columns) == ["position", "token", "role", "1.1", "0.3"]
    assert frame["position"].tolist() == list(range(24))
    ids = oracle.encode("Q: ba bb\nA: bc\n\n" * 2 + "Q: aa\nA:")
    weights = raw("GPT2")(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    for name, (layer, head) in {"1.1": (1, 1), "0.3": (0, 3)}.items():
        expected_weights = weights[layer][0, head, -1]
        torch.testing.assert_close(torch.tensor(frame[name].tolist()), expected_weights, rtol=1e-4, atol=1e-5)


def special_tokenizer(template: str) -> Any:
    own = micro.tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return own


def byte_level() -> Any:
    """A byte-level tokenizer without merges, as for GPT-2; offsets exclude spaces, even a single space."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    signs = [sign for sign in signs if sign in "QA:ĠĊabcdefg"]
    entries = {entry: i for i, entry in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *signs])}
    own = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    own.post_processor = processors.ByteLevel(trim_offsets=True)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def example_of(own: Any) -> pd.DataFrame:
    model = micro.bridged(micro.raw("GPT2"), "GPT2", own)
    return attention_example(words(("ba", "bc")), [(0, 0)], model, n_shots=1)


def test_a_token_at_the_start_is_the_first_and_one_at_the_end_of_texts_is_no_part_of_the_prompt() -> None:
    plain = ["Q", ":", " ba", "\n", "A", ":", " bc", "\n\n", "Q", ":", " aa", "\n", "A", ":"]
    begun = ["<bos>", *plain]
    for template, tokens in (("<bos> $A", begun), ("$A <eos>", plain), ("<bos> $A <eos>", begun)):
        frame = example_of(special_tokenizer(template))
        assert frame["token"].tolist() == tokens
        assert (frame["role"] == FIRST).tolist() == [True] + [False] * (len(tokens) - 1)
        assert frame["role"].tolist()[-4:] == [QUERY, TEMPLATE, TEMPLATE, TEMPLATE]


def test_a_lone_space_has_a_role_though_its_place_in_the_text_is_empty() -> None:
    frame = example_of(byte_level())
    assert "".join(frame["token"]) == "Q: ba\nA: bc\n\nQ: aa\nA:"
    roles = [FIRST, *[TEMPLATE] * 2, *[INPUT] * 2, *[TEMPLATE] * 3, *[ANSWER] * 3, *[TEMPLATE] * 5, *[QUERY] * 2]
    assert frame["role"].tolist() == [*roles, *[TEMPLATE] * 3]


def test_shares_of_attention_are_sums_by_role_over_the_embeddings_prompts(family: str, model: Bridge) -> None:
    task = worded()
    found = attention_roles(task, None, model, n_prompts=3, n_shots=2)
    assert set(found["role"]) == set(ROLES) and len(found) == len(ROLES) * len(ALL)
    sums = found.groupby(["layer", "head"], sort=False)["share"].sum()
    assert sums.to_numpy() == pytest.approx(1, abs=1e-5) and list(sums.index) == ALL
    rows = []
    for prompt in embedding_prompts(task, micro.tokenizer(), 3, 2, 0):
        weights = raw(family)(torch.tensor([oracle.encode(prompt.text)]), output_attentions=True, use_cache=False)
        roles = by_hand(prompt.text)
        for layer, head in ALL:
            for weight, role in zip(weights.attentions[layer][0, head, -1].tolist(), roles, strict=True):
                rows.append((layer, head, role, weight / 3))
    expected = pd.DataFrame(rows, columns=list(found.columns)).groupby(["layer", "head", "role"])["share"].sum()
    for layer, head, role, share in found.itertuples(index=False):
        assert share == pytest.approx(expected[layer, head, role], abs=1e-5)
    some = attention_roles(task, [(1, 2)], model, n_prompts=3, n_shots=2)
    mine = found[(found["layer"] == 1) & (found["head"] == 2)]
    assert some["role"].tolist() == mine["role"].tolist()
    assert some["share"].tolist() == pytest.approx(mine["share"].tolist(), abs=1e-6)


def by_hand(text: str) -> list[str]:
    """The role of each token in a prompt of the published template, determined from what follows "Q:" and "A:"."""
    tokens = [micro.tokenizer().decode([i]) for i in oracle.encode(text)]
    last = max(i for i, token in enumerate(tokens) if token == "Q")
    roles, inside = [], TEMPLATE
    for i, token in enumerate(tokens):
        if token in ("Q", "A"):
            inside = ANSWER if token == "A" else QUERY if i == last else INPUT
        roles.append(inside if token.startswith(" ") else TEMPLATE)
    return [FIRST, *roles[1:]]


def test_what_cannot_have_roles_is_refused(gpt2: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    own, chat = micro.tokenizer(), replace(worded(), template="chat")
    own.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    chatting = micro.bridged(micro.raw("GPT2"), "GPT2", own)
    with pytest.raises(sl.SitelensError, match=r"a chat template's prompts.*cannot be taken apart"):
        attention_roles(chat, None, chatting, n_prompts=1, n_shots=1)
    with pytest.raises(sl.SitelensError, match=r"no valid item 9 of task 'worded': items 0 to 3"):
        attention_example(worded(), [(0, 0)], gpt2, item=9)
    monkeypatch.setattr(Model, "tokenizer", property(lambda model: SlowTokenizer()))
    with pytest.raises(sl.SitelensError, match="a fast one"):
        attention_roles(worded(), None, gpt2, n_prompts=1, n_shots=1)


class SlowTokenizer:
    is_fast = False


@pytest.mark.parametrize("head", [(2, 0), (0, 4), (-1, 0)])
def test_a_head_that_is_not_there_is_refused(head: tuple[int, int], gpt2: Bridge) -> None:
    task = worded()
    message = rf"no head \({head[0]}, {head[1]}\): layers 0 to 1, heads 0 to 3"
    calls: list[Callable[[], Any]] = [
        lambda: attention(tokenize([Prompt("Q", ())], micro.tokenizer()), [head], gpt2),
        lambda: attention_example(task, [head], gpt2),
        lambda: attention_roles(task, [head], gpt2),
        lambda: promoted_tokens(embedding_for(gpt2, task), head, task, gpt2),
    ]
    for call in calls:
        with pytest.raises(sl.SitelensError, match=message):
            call()


def test_no_validation_items_and_an_embedding_of_another_model_are_refused(gpt2: Bridge) -> None:
    task = worded()
    bare, other = replace(task, valid=()), replace(embedding_for(gpt2, task), model="another")
    for call in (
        lambda: head_attribution(bare, gpt2),
        lambda: attention_example(bare, [(0, 0)], gpt2),
        lambda: indirect_effects(bare, gpt2, embedding=embedding_for(gpt2, task)),
    ):
        with pytest.raises(sl.SitelensError, match="'worded' has no valid items"):
            call()
    for call in (
        lambda: head_attribution(task, gpt2, embedding=other, n_shots=2),
        lambda: promoted_tokens(other, (0, 0), task, gpt2),
        lambda: indirect_effects(task, gpt2, embedding=other),
    ):
        with pytest.raises(sl.SitelensError, match="another model"):
            call()


# Induction


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", ["GPT2", "Mistral"])
def test_induction_scores_are_means_of_raw_attention(family: str, bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro.bridged(copy.deepcopy(raw(family)), family, micro.tokenizer(bos))
    n_rows, length = 5, 6
    shown: list[Tensor] = []
    run = attention_module.run_with_callbacks
    monkeypatch.setattr(attention_module, "MAX_TOKENS", 2 * (2 * length + bos))  # two rows at once, then one
    monkeypatch.setattr(
        attention_module, "run_with_callbacks", lambda rows, *rest: (shown.append(rows), run(rows, *rest))
    )
    found = induction_scores(model, n_rows=n_rows, length=length, seed=2)
    assert [len(rows) for rows in shown] == [2, 2, 1]
    induction, previous = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, HEADS)
    for row in torch.cat(shown).tolist():
        assert len(row) == 2 * length + bos and row[:bos] == [1] * bos
        once = row[bos : bos + length]
        assert once == row[bos + length :] and min(once) > 3  # no special token among them
        weights = raw(family)(torch.tensor([row]), output_attentions=True, use_cache=False).attentions
        for layer, head in ALL:
            for i in range(length):
                again = bos + length + i
                induction[layer, head] += weights[layer][0, head, again, bos + i + 1] / length / n_rows
                previous[layer, head] += weights[layer][0, head, again, again - 1] / length / n_rows
    torch.testing.assert_close(by_head(found, "induction"), induction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_head(found, "previous_token"), previous, rtol=1e-4, atol=1e-5)
    assert len(set(torch.cat(shown).flatten().tolist())) > length  # random


def test_an_induction_head_scores_one(gpt2: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention set by hand: one head attends to the token after the first occurrence, one to the previous."""
    length = 5

    def planted(rows: Tensor, model: Bridge, look: dict[str, Callable[[Tensor], None]]) -> None:
        width = rows.shape[1]
        assert rows.min() > 3  # no special tokens
        for name, see in look.items():
            pattern = torch.zeros(len(rows), HEADS, width, width)
            pattern[:, :, torch.arange(width), 0] = 1
            if name == "blocks.1.attn.hook_pattern":
                behind, before = pattern[:, 2], pattern[:, 3]
                for at in range(length, width):
                    behind[:, at] = torch.eye(width)[at - length + 1]
                for at in range(1, width):
                    before[:, at] = torch.eye(width)[at - 1]
            see(pattern)

    monkeypatch.setattr(attention_module, "run_with_callbacks", planted)
    found = induction_scores(gpt2, n_rows=100, length=length)
    one, zero = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, HEADS)
    one[1, 2], zero[1, 3] = 1, 1
    torch.testing.assert_close(by_head(found, "induction"), one)
    torch.testing.assert_close(by_head(found, "previous_token"), zero)


def test_induction_is_decided_by_its_seed(gpt2: Bridge) -> None:
    first, same, other = (induction_scores(gpt2, n_rows=2, length=5, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, same)
    assert not first.equals(other)


def test_rows_that_are_too_long_are_refused(gpt2: Bridge) -> None:
    assert len(induction_scores(gpt2, n_rows=1, length=127)) == len(ALL)  # a context of 256
    for length in (1, 128):
        with pytest.raises(sl.SitelensError, match=f"length must be at least 2 and at most 127, got {length}"):
            induction_scores(gpt2, length=length)


# Indirect effects


def asked_by(task: Task, model: Bridge, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[pd.DataFrame, Any]:
    """The indirect effects, and the prompts on which they were measured."""
    batches = []

    def keep(*args: Any) -> Any:
        batches.append(task_batch(*args))
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(effects, "task_batch", keep)
        found = indirect_effects(task, model, **options)
    (batch,) = batches
    return found, batch


def test_indirect_effects_are_those_of_the_raw_model_whatever_the_budget(
    family: str, model: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, n = worded(), 4
    embedding = embedding_for(model, task)
    options: dict[str, Any] = {"embedding": embedding, "n_prompts": n, "n_shots": 2}
    found, batch = asked_by(task, model, monkeypatch, **options)
    gains = torch.zeros(n, LAYERS, HEADS)
    for i, text in enumerate(batch.texts):
        ids = oracle.encode(text)
        (answer, *_) = oracle.encode(batch.answers[i][0])
        alphas = torch.eye(len(ALL)).reshape(-1, LAYERS, HEADS)
        vectors = embedding.mean_z.expand(len(ALL), -1, -1, -1)
        patched = oracle.patched_logits(raw(family), [ids] * len(ALL), alphas, vectors).softmax(-1)[:, answer]
        gains[i] = (patched - oracle.logits(raw(family), ids).softmax(-1)[answer]).reshape(LAYERS, HEADS)
    assert len(set(batch.lengths)) > 1
    scale = float(gains.abs().max())
    for budget in ("2GiB", 3 * 2 * prefix_bytes(Model.of(model), max(batch.lengths)), 1):
        with settings.using(memory_budget=budget):
            found = indirect_effects(task, model, **options)
        torch.testing.assert_close(by_head(found, "effect"), gains.mean(0), rtol=1e-3, atol=1e-4 * scale)
        error = gains.std(0) / math.sqrt(n)
        torch.testing.assert_close(by_head(found, "error"), error, rtol=1e-3, atol=1e-4 * scale)


def test_one_prompt_has_no_error(gpt2: Bridge) -> None:
    task = worded()
    found = indirect_effects(task, gpt2, embedding=embedding_for(gpt2, task), n_prompts=1, n_shots=2)
    assert found["error"].isna().all() and found["effect"].notna().all()


def demonstrations(text: str) -> tuple[list[tuple[str, str]], str]:
    *shown, query = text.split("\n\n")
    pairs = [tuple(part.removeprefix("Q: ").split("\nA: ")) for part in shown]
    return pairs, query.removeprefix("Q: ").removesuffix("\nA:")  # type: ignore[return-value]


def test_answers_are_shuffled_among_the_demonstrations(gpt2: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    task = worded()
    truth = {example.input: example.output for example in task.train}
    options: dict[str, Any] = {"embedding": embedding_for(gpt2, task), "n_prompts": 12, "n_shots": 5}
    _, batch = asked_by(task, gpt2, monkeypatch, **options)
    shifts = set()
    for i, text in enumerate(batch.texts):
        pairs, query = demonstrations(text)
        asked = task.valid[i % len(task.valid)]
        assert query == asked.input and batch.answers[i] == (" " + asked.output,)
        own = [truth[shown] for shown, _ in pairs]
        said = [answer for _, answer in pairs]
        assert len(pairs) == 5 and sorted(own) == sorted(said)
        assert all(a != b for a, b in zip(own, said, strict=True))
        shifts.add(tuple(own.index(answer) for answer in said))
    assert len(shifts) > 3  # in many orders
    assert asked_by(task, gpt2, monkeypatch, **options)[1].texts == batch.texts
    assert asked_by(task, gpt2, monkeypatch, seed=1, **options)[1].texts != batch.texts


def test_equal_answers_cannot_be_shuffled_and_are_no_endless_search(
    gpt2: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = words(("ba", "bc"), ("bb", "bc"), ("be", "bc"))
    options: dict[str, Any] = {"embedding": embedding_for(gpt2, task), "n_prompts": 2}
    _, batch = asked_by(task, gpt2, monkeypatch, n_shots=3, **options)
    assert all(answer == "bc" for text in batch.texts for _, answer in demonstrations(text)[0])
    assert len(indirect_effects(task, gpt2, n_shots=0, **options)) == len(ALL)


# Custom prompts


def test_a_text_or_a_list_of_texts_may_stand_for_a_batch(gpt2: Bridge) -> None:
    batch = tokenize([Prompt(text, ()) for text in TEXTS], micro.tokenizer())
    torch.testing.assert_close(attention(TEXTS, "L1H2, 0.1", gpt2), attention(batch, [(1, 2), (0, 1)], gpt2))
    one = attention(TEXTS[0], ["L1H2"], gpt2)
    frame = attention_example(TEXTS[0], "L1H2", gpt2)
    assert frame["1.2"].tolist() == pytest.approx(one[0, 0].tolist())
    assert frame["role"].tolist() == [FIRST, *["text"] * 5] and "".join(frame["token"]) == TEXTS[0]


def test_attribution_on_a_text_is_that_of_the_prompt(gpt2: Bridge) -> None:
    task = worded()
    (prompt,) = prompts_of(task, 1, 2)
    expected = head_attribution(task, gpt2, n_items=1, n_shots=2)
    pd.testing.assert_frame_equal(head_attribution(prompt.text, gpt2, answer=prompt.answers[0]), expected)
    likeliest = micro.tokenizer().decode([int(oracle.logits(raw("GPT2"), oracle.encode(TEXTS[0])).argmax())])
    pd.testing.assert_frame_equal(
        head_attribution(TEXTS[0], gpt2), head_attribution([TEXTS[0]], gpt2, answer=[likeliest])
    )


def test_promoted_tokens_and_effects_take_texts(gpt2: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    task = worded()
    embedding = embedding_for(gpt2, task)
    texts = [prompt.text for prompt in embedding_prompts(task, micro.tokenizer(), 3, 2, 0)]
    by_task, by_text = (promoted_tokens(embedding, "L1H3", given, gpt2) for given in (task, texts))
    pd.testing.assert_frame_equal(by_task, by_text)
    found, batch = asked_by(task, gpt2, monkeypatch, embedding=embedding, n_prompts=3, n_shots=2)
    answers = [answer for answer, *_ in batch.answers]
    again = indirect_effects(list(batch.texts), gpt2, embedding=embedding, answer=answers)
    pd.testing.assert_frame_equal(found, again)


def test_texts_that_cannot_be_used_are_refused(gpt2: Bridge) -> None:
    task, embedding = worded(), embedding_for(gpt2, worded())
    calls: dict[str, Callable[[], Any]] = {
        "roles are known in a task's prompts only": lambda: attention_roles("Q: aa", None, gpt2),
        "shows one prompt, not 2": lambda: attention_example(["Q: aa", "Q: ba"], [(0, 0)], gpt2),
        "1 prompts and 2 answers": lambda: head_attribution("Q: aa", gpt2, answer=[" a", " b"]),
        "a task's items have their own answers": lambda: head_attribution(task, gpt2, answer=" aa"),
        "the effect on which answer": lambda: indirect_effects("Q: aa", gpt2, embedding=embedding),
        "unknown task 'antonim'": lambda: head_attribution("antonim", gpt2),
        "expected a task or a list of prompts": lambda: head_attribution([], gpt2),
    }
    for message, call in calls.items():
        with pytest.raises(sl.SitelensError, match=message):
            call()
