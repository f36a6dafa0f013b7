"""Prompts: exact template text, chat templates, special tokens, padding, answers and demonstrations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.prompts import Prompt, draw_demonstrations, few_shot_prompt, few_shot_prompts, prompt_parts
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.tasks import QA_TEMPLATE, Example, Task
from tests import micro

BOS, EOS = 1, 2
QUERY = Example("ab", "ba")
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}Q: {{ message.content }}\n{% else %}A:{{ message.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)

quick = hypothesis.settings(deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow])
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
words = st.lists(st.sampled_from(micro.WORDS), min_size=1, max_size=6).map(" ".join)


@pytest.fixture
def tokenizer() -> Any:
    return micro.tokenizer()


def zero_shot(text: str, tokenizer: Any, *answers: str) -> Prompt:
    output, *also = answers or ("ba",)
    return few_shot_prompt(QA_TEMPLATE, [], Example(text, output, tuple(also)), tokenizer)


def pieces(ids: Sequence[int] | Tensor, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


def merging_tokenizer() -> Any:
    """A tokenizer in which a colon, a space and letters form one token."""
    tokenizer = micro.tokenizer()
    pattern = Regex(r"\n\n|\n|: [a-z]+|[a-z]+|[QA:]|[0-9]| ")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    return tokenizer


# The template


def test_the_default_template_is_the_papers(tokenizer: Any):
    shown = [Example("hot", "cold"), Example("big", "small")]
    prompt = few_shot_prompt(QA_TEMPLATE, shown, Example("up", "down"), tokenizer)
    assert prompt.text == "Q: hot\nA: cold\n\nQ: big\nA: small\n\nQ: up\nA:"
    assert prompt.answers == (" down",)
    assert prompt.special_tokens


def test_a_zero_shot_prompt_is_the_query_alone(tokenizer: Any):
    assert zero_shot("up", tokenizer).text == "Q: up\nA:"


def test_an_all_digit_answer_gets_no_space_in_demonstrations_too(tokenizer: Any):
    shown = [Example("three", "5"), Example("a", "x2"), Example("b", "2 3")]
    prompt = few_shot_prompt(QA_TEMPLATE, shown, Example("eleven", "11", ("2a",)), tokenizer)
    assert prompt.text == "Q: three\nA:5\n\nQ: a\nA: x2\n\nQ: b\nA: 2 3\n\nQ: eleven\nA:"
    assert prompt.answers == ("11", " 2a")


@pytest.mark.parametrize("answer", ["٣", "²", "½", "-1", "1.5", "1,000"])
def test_an_answer_that_is_not_of_ascii_digits_alone_gets_its_space(tokenizer: Any, answer: str):
    assert zero_shot("up", tokenizer, answer).answers == (" " + answer,)


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        ("{input} -> {output}\n", "hot -> cold\nup ->", " down"),
        ("{input}->{output}\n", "hot->cold\nup->", "down"),
        ("Word: {input}\nOpposite:\n{output}\n", "Word: hot\nOpposite:\ncold\nWord: up\nOpposite:\n", "down"),
        ("{x} {input} {0}: {output};", "{x} hot {0}: cold;{x} up {0}:", " down"),
    ],
)
def test_other_templates(tokenizer: Any, template: str, text: str, answer: str):
    prompt = few_shot_prompt(template, [Example("hot", "cold")], Example("up", "down"), tokenizer)
    assert (prompt.text, prompt.answers) == (text, (answer,))


def test_a_template_without_its_places_is_refused(tokenizer: Any):
    with pytest.raises(SitelensError, match=r"must contain \{input\} and after it \{output\}"):
        few_shot_prompt("Q: {input}\nA:", [], QUERY, tokenizer)


@quick
@hypothesis.given(texts, texts, texts, texts)
def test_any_text_survives(shown: str, output: str, query: str, answer: str):
    prompt = few_shot_prompt(QA_TEMPLATE, [Example(shown, output)], Example(query, answer), None)
    gaps = ["" if text.isascii() and text.isdigit() else " " for text in (output, answer)]
    assert prompt.text == "Q: " + shown + "\nA:" + gaps[0] + output + "\n\nQ: " + query + "\nA:"
    assert prompt.answers == (gaps[1] + answer,)


gaps = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=6)
pairs = st.tuples(texts, texts)


@quick
@hypothesis.given(gaps, gaps, st.sampled_from(["", " ", "  "]), gaps, st.lists(pairs, max_size=3), pairs)
def test_parts_joined_are_the_prompt_of_any_template(
    before: str, between: str, spaces: str, after: str, drawn: list[tuple[str, str]], asked: tuple[str, str]
):
    shown, query = [Example(*pair) for pair in drawn], Example(*asked)
    between = between + ":" + spaces
    template = before + "{input}" + between + "{output}" + after
    parts = prompt_parts(template, shown, query)

    def answer(text: str) -> str:
        bare = between.endswith(" ") and text.isascii() and text.isdigit()
        return (between[:-1] if bare else between) + text

    expected = "".join(before + e.input + answer(e.output) + after for e in shown)
    expected += before + query.input + between[: len(between) - between.endswith(" ")]
    assert "".join(text for _, text in parts) == expected
    assert expected == few_shot_prompt(template, shown, query, None).text
    texts_of = {role: [text for kind, text in parts if kind == role] for role, _ in parts}
    assert texts_of["query"] == [query.input]
    assert texts_of.get("demonstration input", []) == [e.input for e in shown]
    answers = texts_of.get("demonstration answer", [])
    assert all(text in (e.output, " " + e.output) for text, e in zip(answers, shown, strict=True))


def test_parts_of_the_published_template_by_hand():
    parts = prompt_parts(QA_TEMPLATE, [Example("hot", "cold"), Example("three", "3")], Example("up", "down"))
    assert parts == [
        ("template", "Q: "), ("demonstration input", "hot"), ("template", "\nA:"), ("demonstration answer", " cold"),
        ("template", "\n\n"),
        ("template", "Q: "), ("demonstration input", "three"), ("template", "\nA:"), ("demonstration answer", "3"),
        ("template", "\n\n"),
        ("template", "Q: "), ("query", "up"), ("template", "\nA:"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("Give {input}.", "Give {input}.\n\n"),
        ("Give the opposite.\n", "Give the opposite.\n"),
        ("", ""),
    ],
)
def test_an_instruction_is_said_once_before_the_demonstrations(tokenizer: Any, instruction: str, text: str):
    task, plain = micro.task(instruction=instruction), micro.task()
    for shown in ([], task.train[:3]):
        prompts = [few_shot_prompt(one, shown, task.test[0], tokenizer) for one in (task, plain)]
        assert prompts[0].text == text + prompts[1].text and prompts[0].answers == prompts[1].answers
    assert prompt_parts(task, [], QUERY)[: bool(text)] == [("template", text)] * bool(text)
    assert (task.digest == plain.digest) is (not instruction)


@pytest.mark.parametrize(
    ("template", "together"),
    [
        ("{input} -> {output}", True),
        ("Q: {input} A: {output}", True),
        ("{input} -> {output}x", True),
        ("{input} -> {output};", False),
        ("{input} -> {output}\n", False),
        ("\nQ: {input} A: {output}", False),
        (QA_TEMPLATE, False),
    ],
)
def test_demonstrations_that_run_together_are_said(tokenizer: Any, template: str, together: bool):
    queries = [few_shot_prompt(template, shown, QUERY, tokenizer) for shown in ([], [Example("aa", "ac")])]
    tokenize(queries[:1], tokenizer)
    if not together:
        tokenize(queries, tokenizer)
        return
    with pytest.warns(SitelensWarning, match="puts nothing between an answer and the next demonstration") as caught:
        tokenize(queries * 2, tokenizer)
    assert len(caught) == 1


@pytest.mark.parametrize(("template", "message"), [("chat", "cannot be taken apart"), ("{input}", "must contain")])
def test_a_template_without_parts_is_refused(template: str, message: str):
    with pytest.raises(SitelensError, match=message):
        prompt_parts(template, [], QUERY)


@pytest.mark.parametrize("text", ["{input}", "{output}", "{}", "{{", "%s", "\\n", "a\nb", "$x$", "née 日本"])
def test_braces_and_signs_survive(tokenizer: Any, text: str):
    prompt = few_shot_prompt(QA_TEMPLATE, [Example(text, text)], Example(text, text), tokenizer)
    assert prompt.text == f"Q: {text}\nA: {text}\n\nQ: {text}\nA:"


# Chat templates


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_prompt_ends_where_the_answer_begins_and_has_one_bos(bos: bool):
    tokenizer = micro.tokenizer(bos=bos)
    tokenizer.chat_template = CHAT
    prompt = few_shot_prompt("chat", [Example("aa", "bb")], Example("ab", "5", ("ba",)), tokenizer)
    assert prompt.text == "<bos>Q: aa\nA:bb\n\nQ: ab\nA:"
    assert prompt.answers == ("5", "ba")
    batch = tokenize([prompt], tokenizer)
    assert batch.tokens[0].tolist().count(BOS) == 1 and batch.tokens[0, 0] == BOS
    assert pieces(batch.tokens[0, -2:], tokenizer) == ["A", ":"]
    assert pieces(batch.accepted[0], tokenizer) == ["5", "ba"]


def test_a_chat_prompt_without_a_chat_template_is_refused(tokenizer: Any):
    with pytest.raises(SitelensError, match="'chat' needs a tokenizer with a chat template; this model's has none"):
        few_shot_prompt("chat", [], QUERY, tokenizer)


# Tokens


@pytest.mark.parametrize("bos", [False, True])
def test_bos_stands_only_where_the_tokenizer_adds_it(bos: bool):
    tokenizer = micro.tokenizer(bos=bos)
    batch = tokenize([zero_shot("ab", tokenizer)], tokenizer)
    assert pieces(batch.tokens[0], tokenizer) == ["<bos>"] * bos + ["Q", ":", " ab", "\n", "A", ":"]
    assert pieces(batch.answer, tokenizer) == [" ba"]


def test_a_prompt_does_not_end_in_eos_where_the_tokenizer_appends_one():
    from tokenizers import processors

    tokenizer = micro.tokenizer()
    both = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = both
    batch = tokenize([zero_shot("ab", tokenizer)], tokenizer)
    assert pieces(batch.tokens[0], tokenizer) == ["<bos>", "Q", ":", " ab", "\n", "A", ":"]
    assert pieces(batch.answer, tokenizer) == [" ba"]


def test_prompts_are_padded_on_the_left(tokenizer: Any):
    batch = tokenize([zero_shot(text, tokenizer) for text in ("ab", "ab ac ad", "ab ac")], tokenizer)
    assert batch.tokens.shape == batch.mask.shape == (3, 8) and len(batch) == 3
    assert batch.lengths == [6, 8, 7]
    assert batch.mask.tolist() == [[False] * 2 + [True] * 6, [True] * 8, [False] + [True] * 7]
    assert (batch.tokens[~batch.mask] == tokenizer.pad_token_id).all()
    assert pieces(batch.tokens[:, -1], tokenizer) == [":"] * 3


@quick
@hypothesis.given(st.lists(words, min_size=1, max_size=5), st.booleans())
def test_a_row_of_a_batch_is_the_prompt_alone(inputs: list[str], bos: bool):
    tokenizer = micro.tokenizer(bos=bos)
    prompts = [zero_shot(text, tokenizer) for text in inputs]
    batch = tokenize(prompts, tokenizer)
    for i, prompt in enumerate(prompts):
        assert batch.tokens[i][batch.mask[i]].tolist() == tokenizer(prompt.text)["input_ids"]
        assert batch.mask[i].tolist() == sorted(batch.mask[i].tolist())
    assert batch.texts == tuple(prompt.text for prompt in prompts)


def test_a_tokenizer_without_padding_token_will_do():
    tokenizer = micro.tokenizer()
    tokenizer.pad_token = None
    batch = tokenize([zero_shot(text, tokenizer) for text in ("ab", "ab ac")], tokenizer)
    assert batch.lengths == [6, 7]


def test_every_accepted_answer_has_its_first_token(tokenizer: Any):
    prompts = [zero_shot("ab", tokenizer, "ba", "bb ac", "57", "ba ab"), zero_shot("ac", tokenizer, "5")]
    batch = tokenize(prompts, tokenizer)
    assert [pieces(row, tokenizer) for row in batch.accepted] == [[" ba", " bb", "5", " ba"], ["5"]]
    assert pieces(batch.answer, tokenizer) == [" ba", "5"]
    assert batch.answers == ((" ba", " bb ac", "57", " ba ab"), ("5",))


def test_a_prompt_without_answers_is_marked(tokenizer: Any):
    batch = tokenize([Prompt("Q: ab\nA:", ())], tokenizer)
    assert batch.answer.tolist() == [-1] and batch.accepted == ((),)


def test_no_prompts_make_an_empty_batch(tokenizer: Any):
    batch = tokenize([], tokenizer)
    assert len(batch) == 0 and batch.answer.dtype == torch.long


def test_answers_that_merge_with_the_prompt_are_said_and_take_their_own_first_token():
    tokenizer = merging_tokenizer()
    prompts = [Prompt("Q: ab\nA:", (" ba", "5")), Prompt("Q: ac\nA:", (" bb",))]
    with pytest.warns(SitelensWarning, match=r"(?s)^here: 2 of 3 answers merge .*'Q: ab\\nA: ba'") as caught:
        batch = tokenize(prompts, tokenizer, where="here")
    assert len(caught) == 1
    alone = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in (" ba", "5", " bb")]
    assert batch.accepted == ((alone[0], alone[1]), (alone[2],))
    assert batch.lengths == [5, 5]


@pytest.mark.parametrize("answer", ["", " ", "\n", " \n\n"])
def test_an_answer_without_a_token_of_its_own_is_refused(tokenizer: Any, answer: str):
    with pytest.raises(SitelensError, match=r"here: the answer .* has no token of its own after 'Q: ab\\nA:'"):
        tokenize([Prompt("Q: ab\nA:", (" ba", answer))], tokenizer, where="here")


def test_a_prompt_without_tokens_is_refused(tokenizer: Any):
    with pytest.raises(SitelensError, match="here: the prompt '' has no tokens"):
        tokenize([Prompt("", (" ba",))], tokenizer, where="here")


def test_a_prompt_may_fill_the_context_but_not_more(tokenizer: Any):
    prompts = [zero_shot("ab", tokenizer), zero_shot("ab ac ad", tokenizer)]
    assert tokenize(prompts, tokenizer, context=8).lengths == [6, 8]
    with pytest.raises(
        SitelensError, match=r"(?s)here: a prompt has 8 tokens, the model's context holds 7: use fewer shots.*ab ac ad"
    ):
        tokenize(prompts, tokenizer, context=7, where="here")


# Rows of a batch


@pytest.fixture
def batch(tokenizer: Any) -> PromptBatch:
    return tokenize([zero_shot(text, tokenizer, "ba", "bb") for text in ("ab", "ab ac ad", "ab ac")], tokenizer)


def test_rows_trims_the_padding_that_none_needs(batch: PromptBatch):
    chosen = batch.rows([2, 0])
    assert chosen.tokens.shape == (2, 7) and chosen.lengths == [7, 6]
    assert torch.equal(chosen.tokens[0], batch.tokens[2, 1:]) and torch.equal(chosen.mask, batch.mask[[2, 0], 1:])
    assert chosen.texts == (batch.texts[2], batch.texts[0])
    assert chosen.answers == (batch.answers[2], batch.answers[0])
    assert chosen.accepted == (batch.accepted[2], batch.accepted[0])
    assert torch.equal(chosen.answer, batch.answer[[2, 0]])


def test_rows_may_repeat_and_be_chosen_again(batch: PromptBatch):
    assert batch.rows([1, 1, 0]).rows([2, 2]).tokens.tolist() == batch.rows([0, 0]).tokens.tolist()
    assert batch.rows(range(3)).tokens.tolist() == batch.tokens.tolist()
    assert len(batch.rows([])) == 0


# Demonstrations


def own_task(train: Sequence[Example], name: str = "own") -> Task:
    return Task(name, "own", tuple(train), (QUERY,), (QUERY,))


def test_demonstrations_are_different_training_items():
    task = micro.task()
    for place in range(20):
        drawn = draw_demonstrations(task, 10, task.test[0], 0, "test", place)
        assert len(set(drawn)) == 10 and set(drawn) <= set(task.train)


@pytest.mark.parametrize("n_shots", [0, 1, 5])
def test_a_demonstration_never_has_the_query_s_input(n_shots: int):
    others = [Example(word, "x") for word in micro.WORDS[8:13]]
    train = [*others[:2], Example("ab", "one"), Example("ab", "two"), *others[2:], Example("ab", "three")]
    task = own_task(train)
    for place in range(30):
        drawn = draw_demonstrations(task, n_shots, Example("ab", "ba"), 0, place)
        assert len(drawn) == n_shots and all(example.input != "ab" for example in drawn)


def test_all_training_items_may_be_shown():
    task = micro.task()
    assert set(draw_demonstrations(task, len(task.train), None, 0)) == set(task.train)


@pytest.mark.parametrize(("n_shots", "query"), [(3, None), (2, Example("aa", "x"))])
def test_too_few_training_items_are_refused(n_shots: int, query: Example | None):
    task = own_task([Example("aa", "x"), Example("ac", "x")])
    with pytest.raises(SitelensError, match=f"'own' has too few training items for {n_shots} shots: 2 items"):
        draw_demonstrations(task, n_shots, query, 0)


def test_a_draw_depends_on_the_task_s_name_and_the_key_alone():
    task = micro.task()
    first = draw_demonstrations(task, 5, task.test[0], 0, "test", 3)
    random.seed(1)
    torch.manual_seed(1)
    assert draw_demonstrations(task, 5, task.test[1], 0, "test", 3) == first
    others = [
        draw_demonstrations(task, 5, task.test[0], 1, "test", 3),
        draw_demonstrations(task, 5, task.test[0], 0, "valid", 3),
        draw_demonstrations(task, 5, task.test[0], 0, "test", 4),
        draw_demonstrations(own_task(task.train, "other"), 5, task.test[0], 0, "test", 3),
    ]
    assert all(other != first for other in others)


def test_a_draw_is_the_same_everywhere():
    drawn = draw_demonstrations(micro.task(), 5, None, 0, "test", 3)
    assert [example.input for example in drawn] == ["ca", "ga", "eb", "bb", "eh"]


def test_demonstrations_come_in_any_order():
    task = own_task([Example("aa", "x"), Example("ac", "x")])
    orders = {tuple(example.input for example in draw_demonstrations(task, 2, None, place)) for place in range(20)}
    assert orders == {("aa", "ac"), ("ac", "aa")}


def test_an_item_has_the_same_prompt_among_others_and_alone(tokenizer: Any):
    task = micro.task()
    whole = few_shot_prompts(task, task.test, 3, tokenizer, seed=2)
    some = few_shot_prompts(task, [task.test[4], task.test[1]], 3, tokenizer, seed=2, places=[4, 1])
    assert some == [whole[4], whole[1]]
    assert few_shot_prompts(task, task.test, 3, tokenizer, seed=2, split="valid") != whole


def test_few_shot_prompts_use_the_task_s_template(tokenizer: Any):
    task = micro.task(template="{input} -> {output}\n")
    [prompt] = few_shot_prompts(task, task.test[:1], 2, tokenizer)
    assert prompt.text.count(" -> ") == 2 and prompt.text.endswith(f"\n{task.test[0].input} ->")
