"""Chat templates: where answers begin, by an independent rendering; dates, arguments, instructions, errors."""

from __future__ import annotations

import datetime
import warnings
from dataclasses import replace
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sitelens.engine.batches import tokenize
from sitelens.engine.lengths import item_sizes
from sitelens.engine.prompts import Prompt, few_shot_prompt
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation.labels import shared_first_tokens
from sitelens.methods.items import prompts_with_answers
from sitelens.models.model import Model
from sitelens.tasks import Example, Task, rewritten
from sitelens.tasks.templates import checked_arguments
from tests import micro

SHOTS, QUERY = [Example("aa", "ab"), Example("ac", "ad")], Example("ba", "bb", ("bc",))

ROLES = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
# name -> template, text between the last question and the answer, and the answer as it appears
SHAPES = {
    "newline before the answer": (ROLES + ASK, "<eos>\n<|assistant|>\n", "bb"),
    "space before the answer (Mistral)": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
        "{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}", "[/INST]", " bb",
    ),
    "empty think block (Qwen 3)": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<eos>\n{% endfor %}" + ASK,
        "<eos>\n<|assistant|>\n<think>\n\n</think>\n\n", "bb",
    ),
    "a thought that content is stripped of (R1)": (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}<|{{ m.role }}|>{{ c }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}", "<|assistant|>", "bb",
    ),
    "no beginning of an answer to ask with": (ROLES, "<eos>\n<|assistant|>\n", "bb"),
    "words and a space (Vicuna)": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " ASSISTANT:", " bb",
    ),
    "a blank line that nothing asks for": (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{% else %}{{ '\nA:\n\n' + m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\nA:' }}{% endif %}", "\nA:\n\n", "bb",
    ),
    "another last turn (gpt-oss)": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<final>{% endif %}{{ m.content }}"
        "{% if loop.last and not add_generation_prompt %}<return>{% else %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<end><|assistant|><final>", "bb",
    ),
    "a system message and a date of its own": (
        "<|system|>Today: {{ strftime_now('%d %b %Y') }}<eos>\n" + ROLES + ASK, "<eos>\n<|assistant|>\n", "bb",
    ),
    "named templates": ({"default": ROLES + ASK, "tool_use": "no"}, "<eos>\n<|assistant|>\n", "bb"),
}  # fmt: skip
UNUSUAL = {"a thought that content is stripped of (R1)"}


def chatty(template: Any, bos: bool = False, space: bool = False) -> Any:
    """A byte-level tokenizer with this chat template; with `space`, it adds a space before each text."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["Q: aa\nA: ab\n\n ba bb bc ac ad"] * 9, trainer)
    if bos:
        model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


OWN = Task.from_pairs("own", [(word, "bb") for word in micro.WORDS[:8]], template="chat")


def turns(answer: str | None = None, system: str = "") -> list[dict[str, str]]:
    said = [("system", system)] if system else []
    for shown in SHOTS:
        said += [("user", shown.input), ("assistant", shown.output)]
    said += [("user", QUERY.input)] + ([] if answer is None else [("assistant", answer)])
    return [{"role": role, "content": content} for role, content in said]


def rendered(template: Any, messages: list[dict[str, str]], day: str = "2024-07-26", **values: Any) -> str:
    """A conversation rendered directly by Jinja."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    clock = datetime.date.fromisoformat(day)
    text = template["default"] if isinstance(template, dict) else template
    return environment.from_string(text).render(
        messages=messages, bos_token="<bos>", eos_token="<eos>", strftime_now=clock.strftime, **values
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_s_tokens_are_those_behind_the_prompt_in_the_whole_conversation(shape: str, bos: bool):
    template, between, written = SHAPES[shape]
    tokenizer = chatty(template, bos)
    prompt = few_shot_prompt("chat", SHOTS, QUERY, tokenizer)
    whole = rendered(template, turns("bb"))
    assert whole.startswith(prompt.text + written) and prompt.text.endswith(QUERY.input + between)
    assert prompt.answers == (written, written.replace("bb", "bc"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if shape in UNUSUAL else "error", SitelensWarning)
        batch = tokenize([prompt], tokenizer)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert batch.tokens[0].tolist() == ids[: batch.tokens.shape[1]]
    assert batch.answer[0] == ids[batch.tokens.shape[1]]
    assert (
        tokenizer.decode([int(batch.answer[0])]).strip()
        == "bb"[: len(tokenizer.decode([ids[batch.tokens.shape[1]]]).strip())]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_and_shared_first_tokens_know_the_written_answer(shape: str):
    tokenizer = chatty(SHAPES[shape][0])
    pairs = [("ba", "bb"), ("bc", "ab"), ("ac", "bb"), ("ad", "ab"), ("aa", "bb")]
    task = Task.from_pairs("say", pairs, template="chat")
    assert shared_first_tokens(task, tokenizer) == set()
    [size] = item_sizes(task.train[:1], task, tokenizer)
    texts = [few_shot_prompt(task, shown, task.train[0], tokenizer).text for shown in ([], task.train[:1])]
    assert size == 1 + len(tokenizer(texts[1])["input_ids"]) - len(tokenizer(texts[0])["input_ids"])


def test_a_template_that_asks_with_another_beginning_than_it_writes_is_said():
    tokenizer = chatty(SHAPES["a thought that content is stripped of (R1)"][0])
    prompts = [few_shot_prompt("chat", SHOTS, QUERY, tokenizer)] * 2
    with pytest.warns(SitelensWarning, match=r"asks for an answer with .*<think>.* but writes one behind") as caught:
        tokenize(prompts, tokenizer, where="here")
    assert len(caught) == 1


def test_an_answer_s_loss_covers_the_answer_and_not_the_end_of_its_turn():
    model = micro.bridged(micro.raw("Llama"), "chatty", micro.tokenizer())
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: {{ m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    task = Task.from_pairs("own", [(w, f"{w} bb") for w in micro.WORDS[:8]], template="chat")
    [(ids, size)] = prompts_with_answers(task, task.test[:1], Model.of(model))
    word = task.test[0].input
    assert model.tokenizer.decode(ids) == f"Q: {word}\nA: {word} bb" and size == 2


# Dates and arguments


DATED = (
    "{%- set d = strftime_now('%d %b %Y') %}\n  {% if strftime_now is defined %}It is {{ d }}{% endif %}\n"
    + ROLES
    + ASK
)


def test_the_date_stands_still_and_is_an_argument():
    tokenizer = chatty(DATED)
    for arguments, day in (((), "2024-07-26"), ((("strftime_now", "2031-01-02"),), "2031-01-02")):
        task = Task.from_pairs(
            "own", [(w, "bb") for w in micro.WORDS[:8]], template="chat", template_arguments=arguments
        )
        prompt = few_shot_prompt(task, SHOTS, QUERY, tokenizer)
        assert prompt.text == rendered(DATED, turns(), day, add_generation_prompt=True)
    assert "02 Jan 2031" in prompt.text


def test_a_clock_inside_a_macro_or_with_its_format_in_a_variable_stands_still():
    template = (
        "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{% set f = '%H' %}"
        '{{ today() }}/{{ strftime_now(f) }}/{{ strftime_now(format="%B") }}' + ROLES + ASK
    )
    text = few_shot_prompt("chat", [], QUERY, chatty(template)).text
    assert text.startswith("2024/2024-07-26/July<|user|>")


def test_arguments_reach_the_template_and_its_answers():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if loop.last and m.role == 'assistant' and thinking is false %}"
        "<think></think>{% endif %}{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% if thinking is false %}<think></think>{% endif %}{% endif %}"
    )
    tokenizer = chatty(template)
    for value, between in ((True, "<|assistant|>\n"), (False, "<|assistant|>\n<think></think>")):
        given = replace(OWN, template_arguments={"thinking": value})
        prompt = few_shot_prompt(given, SHOTS, QUERY, tokenizer)
        assert prompt.text == rendered(template, turns(), add_generation_prompt=True, thinking=value)
        assert prompt.text.endswith(between) and prompt.answers == ("bb", "bc") and not prompt.note
        assert given.template_arguments == (("thinking", value),)
        assert given.digest not in (OWN.digest, replace(given, template_arguments={"thinking": not value}).digest)
        assert hash(given) != hash(OWN)


def test_an_argument_that_the_template_does_not_read_is_said():
    task = replace(OWN, template_arguments={"enable_thinkin": False})
    tokenizer = chatty(ROLES + ASK)
    with pytest.warns(SitelensWarning, match="reads no enable_thinkin, given as a template argument"):
        tokenize([few_shot_prompt(task, [], QUERY, tokenizer)], tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": "x"}, "here: 'messages' cannot be a template argument"),
        ({"a b": 1}, "'a b' cannot be a template argument"),
        ({3: 1}, "3 cannot be a template argument"),
        ({"a": [1]}, r"argument a must be text, a number, True or False"),
        ("no", "must be like"),
        (3, "must be like"),
        ({"strftime_now": "today"}, "must be a date such as '2024-07-26', not 'today'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: Any, message: str):
    with pytest.raises(SitelensError, match=message):
        checked_arguments(arguments, "chat", "here")


def test_arguments_go_with_the_template_chat_only():
    with pytest.raises(SitelensError, match="task 'own': template arguments are for the template 'chat'"):
        replace(OWN, template="Q: {input}\nA: {output}\n", template_arguments={"a": 1})
    given = replace(OWN, template_arguments={"a": 1})
    assert rewritten(given, "Q: {input}\nA: {output}\n").template_arguments == ()
    assert rewritten(given, instruction="Hm").template_arguments == (("a", 1),)
    assert rewritten(given, template_arguments=[["b", None]]).template_arguments == (("b", None),)


# Instructions


def test_an_instruction_is_the_system_message_or_the_head_of_the_first_question():
    task = replace(OWN, instruction="Say {it}.")
    assert few_shot_prompt(task, SHOTS, QUERY, chatty(ROLES + ASK)).text == rendered(
        ROLES + ASK, turns(system="Say {it}."), add_generation_prompt=True
    )
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ROLES + ASK
    ignoring = (
        ROLES.replace("%}<|", "%}{% if m.role != 'system' %}<|").replace("{% endfor", "{% endif %}{% endfor") + ASK
    )
    for template in (refusing, ignoring):
        text = few_shot_prompt(task, SHOTS, QUERY, chatty(template)).text
        assert text.count("Say {it}.") == 1 and text.startswith("<|user|>\nSay {it}.\n\naa<eos>")
        assert few_shot_prompt(task, [], QUERY, chatty(template)).text.startswith("<|user|>\nSay {it}.\n\nba<eos>")


# Special tokens


@pytest.mark.parametrize("bos", [False, True])
def test_a_bos_stands_as_often_as_the_template_writes_it(bos: bool):
    for template, n in ((ROLES + ASK, 0), ("{{ bos_token }}" + ROLES + ASK, 1)):
        tokenizer = chatty(template, bos)
        batch = tokenize([few_shot_prompt("chat", SHOTS, QUERY, tokenizer)], tokenizer)
        assert batch.tokens[0].tolist().count(1) == n


def test_prompts_of_chat_and_of_other_templates_in_one_batch_have_their_own_special_tokens():
    tokenizer = chatty("{{ bos_token }}" + ROLES + ASK, bos=True)
    prompts = [few_shot_prompt("Q: {input}\nA: {output}\n\n", [], QUERY, tokenizer)]
    prompts += [few_shot_prompt("chat", [], QUERY, tokenizer), Prompt("Q: aa", ())]
    batch = tokenize(prompts, tokenizer)
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        assert tokens[mask].tolist().count(1) == 1 and tokens[mask][0] == 1


# Errors


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only system prompts') }}", "cannot write a conversation of the roles user.*Only system"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('say more') }}{% endif %}" + ROLES, "say more"),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].content.missing.attr }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ({"tool_use": ROLES}, "cannot be used: ValueError.*no default"),
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", "does not write what the user says"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write what the assistant"),
    ],
)
def test_a_template_that_fails_is_named_with_its_reason(template: Any, message: str):
    with pytest.raises(SitelensError, match=f"(?s)the chat template of this model.*{message}"):
        few_shot_prompt("chat", [], QUERY, chatty(template))


def test_a_template_that_takes_no_last_answer_leaves_the_answer_as_it_is_and_says_so():
    template = "{% if messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}" + ROLES + ASK
    tokenizer = chatty(template)
    prompt = few_shot_prompt("chat", SHOTS, QUERY, tokenizer)
    assert prompt.text == rendered(template, turns(), add_generation_prompt=True) and prompt.answers == ("bb", "bc")
    with pytest.warns(SitelensWarning, match="ask.*answers are taken as they are, directly behind the prompt"):
        tokenize([prompt], tokenizer)
