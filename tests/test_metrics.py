"""Metrics: a table of scores, the end of generated texts, labels, and the warning about shared first tokens."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sitelens as sl
from sitelens.engine.prompts import after_answer
from sitelens.evaluation.labels import first_tokens
from sitelens.metrics import METRICS, Metric, Output, Target, answer_end, checked_metrics
from sitelens.models.model import Bridge, Model
from sitelens.tasks import QA_TEMPLATE, Example, Task
from tests import micro

NFC, NFD, WIDE = "é", "e\u0301", "ｃｏｌｄ"
assert unicodedata.normalize("NFC", NFD) == NFC


@pytest.fixture
def llama() -> Any:
    yield from micro.lent("Llama")


def ending(template: str, one_line: bool = True) -> Any:
    return answer_end(*after_answer(Task("t", "", (), (), (), template=template), None), one_line=one_line)


QA = ending(QA_TEMPLATE)
LINES = ending(QA_TEMPLATE, one_line=False)
SEMICOLON, BAR, STOP = ending("{input}: {output}; "), ending("{input} -> {output} | "), ending("{input}: {output}. ")


# Examples per metric: generated text, accepted answers, score.

EXACT: list[tuple[str, str | tuple[str, ...], Any, int]] = [
    (" cold", "cold", QA, 1),
    (" cold\n\nQ: big", "cold", QA, 1),
    (" cold\nB: warm", "cold", QA, 1),
    ("\n cold\n", "cold", QA, 1),
    ("  COLD ", "cold", QA, 1),
    (" cold", ("warm", "cold"), QA, 1),
    ("", "cold", QA, 0),
    (" colder", "cold", QA, 0),
    (" cold", "colder", QA, 0),
    (" cold and wet", "cold", QA, 0),
    (" f(y)\n", "f(x)", QA, 0),
    (" f(x)\n", "f(x)", QA, 1),
    (" f", "f(x)", QA, 0),
    (" Paris (France)", "Paris", QA, 0),
    (" Saint Louis", "St. Louis", QA, 0),
    (" (cd)", "(cd)", QA, 1),
    (" cold", "cold\nand wet", LINES, 0),
    (" cold\n", "cold\nand wet", LINES, 0),
    (" cold\nand wet\n\nQ: up", "cold\nand wet", LINES, 1),
    (" cold\nand wet\nQ: up", "cold\nand wet", LINES, 1),
    (" cold\nand wet", "cold", LINES, 0),
    (" cold\nand wet\nand old", "cold\nand wet", LINES, 0),
    (" a\n\nb\n\nQ: up", "a\n\nb", LINES, 1),
    (" cold;", "cold", SEMICOLON, 1),
    (" cold; big: small", "cold", SEMICOLON, 1),
    (" cold;hot", "cold", SEMICOLON, 0),
    (" cold; hot; big: small", "cold; hot", SEMICOLON, 1),
    (" cold; warm; big: small", "cold; hot", SEMICOLON, 0),
    (" cold | big -> small", "cold", BAR, 1),
    (" cold |", "cold", BAR, 1),
    (" a|b | big", "a|b", BAR, 1),
    (" 3.5. 4", "3", STOP, 0),
    (" 3. 4", "3", STOP, 1),
    (" 3.5. 4", "3.5", STOP, 1),
    (" U.S.. next", "U.S.", STOP, 1),
    (" cold### big", "cold", ending("{input}={output}###"), 1),
    (" cold\n###\nbig", "cold", ending("Q: {input}\nA: {output}\n###\n"), 1),
    (" cold\nand\n###\nbig", "cold\nand", ending("Q: {input}\nA: {output}\n###\n", False), 1),
    (" coldQ: big A: small", "cold", ending("Q: {input} A: {output}"), 1),
    ("cold big", "cold", ending("{input}>{output} "), 1),
    ("cold\tbig", "cold", ending("{input}>{output}\t"), 1),
    ("cold\nbig", "cold", ending("{input}>{output}"), 0),
    (f" caf{NFD}", f"caf{NFC}", QA, 1),
    (f" caf{NFC}", f"caf{NFD}", QA, 1),
    (f" {WIDE}", "cold", QA, 1),
    (" １２", "12", QA, 1),
    (" x2", "x²", QA, 0),
    (" STRASSE", "straße", QA, 1),
    (" e", NFC, QA, 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answers", "end", "score"), EXACT)
def test_exact_match(text: str, answers: str | tuple[str, ...], end: Any, score: int):
    target = Target(answers=(answers,) if isinstance(answers, str) else answers, end=end)
    assert METRICS["exact_match"].score(Output(text=text), target) == bool(score)


PREFIX = [
    (" cold", "cold", 1), (" colder", "cold", 1), (" col", "cold", 0), ("\n cold\n", "cold", 1),
    ("\n\ncold", "cold", 1),
    (" warm\ncold", "cold", 0), (" St. Louis", "Saint Louis", 1), (" Saint Louis", "St. Louis", 1),
    (" Paris (city)", "Paris", 1), (" Paris", "Paris (France)", 1), (" (cold", "cold", 0), (" f(y)", "f(x)", 1),
    (" COLD", "cold", 1), (" cold; big", "cold", 1), (" cold\nand wet", "cold\nand wet", 0),
    (f" caf{NFD}", f"caf{NFC}", 1), (f" caf{NFC} noir", f"caf{NFD}", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "score"), PREFIX)
def test_prefix_match(text: str, answer: str, score: int):
    assert METRICS["prefix_match"].score(Output(text=text), Target(answers=(answer,), end=SEMICOLON)) == bool(score)


def released(text: str, gold: str, case_sensitive: bool) -> bool:
    """The rule of SITE's released code."""
    said, gold = text.strip().replace("St.", "Saint"), gold.replace("St.", "Saint")
    said, gold = said.split("\n")[0].split("(")[0].strip(), gold.split("(")[0].strip()
    if not case_sensitive:
        said, gold = said.lower(), gold.lower()
    return said[: len(gold)] == gold


PIECES = st.lists(st.sampled_from([" ", "\n", "\t", "St.", "Saint", "(", "cold", "Cold", "c", "o", "; ", "é", "."]))


@given(PIECES, PIECES, st.booleans())
def test_prefix_match_is_the_released_rule(said: list[str], gold: list[str], case_sensitive: bool):
    text, answer = "".join(said), "".join(gold).strip()
    target = Target(answers=(answer,), case_sensitive=case_sensitive)
    assert METRICS["prefix_match"].score(Output(text=text), target) == released(text, answer, case_sensitive)


@pytest.mark.parametrize("name", ["exact_match", "prefix_match"])
def test_case_counts_where_the_task_says_so(name: str):
    for said, case_sensitive, score in (("paris", True, False), ("Paris", True, True), ("paris", False, True)):
        target = Target(answers=("Paris",), case_sensitive=case_sensitive)
        assert METRICS[name].score(Output(text=said), target) is score


@given(st.lists(st.sampled_from([" ", "\n", "\n\n", ";", "; ", "cold", "3", ".", " |", "Q:"]), max_size=8),
       st.sampled_from(["cold", "3", "cold; 3", "3.", "cold\n\n3"]), st.sampled_from([QA, LINES, SEMICOLON, BAR, STOP]),
       st.sampled_from(["exact_match", "prefix_match"]))  # fmt: skip
def test_a_text_called_complete_has_the_score_of_every_longer_one(pieces: list[str], answer: str, end: Any, name: str):
    metric, target = METRICS[name], Target(answers=(answer,), end=end)
    scores, complete = [], False
    for n in range(len(pieces) + 1):
        text = "".join(pieces[:n])
        complete = complete or metric.complete(text, target)
        if complete:
            scores.append(metric.score(Output(text=text), target))
    assert len(set(scores)) <= 1


TOKENS = [  # the model's token and its text, accepted ones, scores of first_token and first_token_ignore_case
    (7, " cold", {7: " cold"}, 1, 1),
    (8, " Cold", {7: " cold"}, 0, 1),
    (8, "cold", {7: " cold"}, 0, 1),
    (9, " co", {7: " cold"}, 0, 0),
    (9, " warm", {7: " cold", 9: " warm"}, 1, 1),
    (3, "\n", {4: " "}, 0, 0),
    (5, "\ufffd", {6: "\ufffd"}, 0, 0),
    (5, " " + NFD, {6: NFC}, 0, 1),
]


@pytest.mark.parametrize(("token", "text", "accepted", "exact", "any_case"), TOKENS)
def test_first_token_metrics(token: int, text: str, accepted: dict[int, str], exact: int, any_case: int):
    target = Target(answers=("x",), tokens=tuple(accepted), token_texts=tuple(accepted.values()), case_sensitive=True)
    output = Output(token=token, token_text=text)
    assert METRICS["first_token"].score(output, target) == bool(exact)
    assert METRICS["first_token_ignore_case"].score(output, target) == bool(any_case)


# The registry


def test_every_metric_has_one_sentence_of_definition():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.definition and not metric.definition.endswith(".")


def test_a_metric_of_ones_own_is_a_value(llama: Bridge):
    def contains(output: Output, target: Target) -> bool:
        return any(answer in output.text for answer in target.answers)

    own = Metric("contains", contains, generates=True)
    [said] = sl.generate([f"Q: {micro.WORDS[0]}\nA:"], model=llama, max_new_tokens=3, stop=None)
    part = said[1:4]
    examples = (Example(micro.WORDS[0], part),)
    task = Task("own", "", examples, examples, examples)
    frame = sl.evaluate(task, {"z": sl.ZeroShot()}, llama, metrics=(own,), max_new_tokens=3)
    assert frame[["metric", "score", "predicted"]].to_numpy().tolist() == [["contains", 1, said]]


def test_a_metric_of_ones_own_is_never_taken_from_the_cache(llama: Bridge):
    from sitelens.evaluation.cached import score_conditions

    for value in (True, False):
        own = Metric("mine", lambda output, target, value=value: value)
        scores = score_conditions(micro.task(), {"z": sl.ZeroShot()}, Model.of(llama), metrics=(own,))["score"]
        assert set(scores) == {int(value)}


def test_metrics_are_given_once():
    with pytest.raises(sl.SitelensError, match="each metric may be given once, got first_token, first_token"):
        checked_metrics(["first_token", "first_token"])


# Generation


def path_hook(model: Bridge, pieces: Sequence[str]) -> tuple[str, Any]:
    """A hook that makes the model generate these pieces, one token each, for any prompt."""
    tokens = [model.tokenizer.get_vocab()[piece] for piece in pieces]
    step = iter(range(1000))

    def say(logits: Tensor, hook: Any) -> Tensor:
        forced = torch.full_like(logits, -9.0)
        if not logits.shape[1]:  # a prefix, for which no logits are computed
            return forced
        forced[:, -1, tokens[min(next(step), len(tokens) - 1)]] = 9.0
        return forced

    return "unembed.hook_out", say


ONE = Example(micro.WORDS[0], micro.WORDS[1])


def scores_of(model: Bridge, pieces: Sequence[str], template: str, answer: str = ONE.output) -> pd.DataFrame:
    task = Task("one", "", *[(Example(ONE.input, answer),)] * 3, template=template)
    metrics = ("exact_match", "prefix_match")
    with model.hooks(fwd_hooks=[path_hook(model, pieces)]):
        return sl.evaluate(task, {"z": sl.ZeroShot()}, model, metrics=metrics, with_echo=False).set_index("metric")


def test_the_end_of_one_metric_does_not_change_another(llama: Bridge):
    word = " " + ONE.output
    frame = scores_of(llama, ["\n", word, "\n", "A"], QA_TEMPLATE)
    assert frame["score"].tolist() == [1, 1] and frame["predicted"].tolist() == [ONE.output] * 2
    assert scores_of(llama, [word, ":", word, "<eos>"], "{input}>{output}:")["score"].tolist() == [1, 1]
    both = f"{ONE.output}: {ONE.output}"  # longer than what exact_match reads
    assert scores_of(llama, [word, ":", word, "<eos>"], "{input}>{output}:", both)["score"].tolist() == [1, 1]


def test_generate_stops_at_the_text_given(llama: Bridge):
    word = " " + ONE.output
    for stop, expected in (("\n", ONE.output), (":", f"{ONE.output}\nA"), (None, f"{ONE.output}\nA:{word}"),
                           ([":", "A"], ONE.output)):  # fmt: skip
        with llama.hooks(fwd_hooks=[path_hook(llama, ["\n", word, "\n", "A", ":", word, "<eos>"])]):
            assert sl.generate(["Q"], model=llama, stop=stop) == [expected]
    with pytest.raises(sl.SitelensError, match="stop must be a text, a list of texts that are not empty, or None"):
        sl.generate(["Q"], model=llama, stop="")


CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<unk>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip


def test_what_stands_after_an_answer_of_a_chat_template():
    tokenizer = micro.tokenizer()
    tokenizer.chat_template = CHAT
    assert after_answer(micro.task(template="chat"), tokenizer) == ("<unk><|user|>", "")
    assert after_answer(micro.task(), tokenizer) == ("\n\n", "Q: ")


def test_a_chat_answer_ends_at_the_special_token_of_its_turn():
    tokenizer = micro.tokenizer()
    tokenizer.chat_template = CHAT
    model = micro.bridged(micro.raw("Llama"), "chat", tokenizer)
    word = " " + ONE.output
    assert scores_of(model, [word, "<unk>", word], "chat").loc["exact_match", "score"] == 1
    assert scores_of(model, [word, word, "<unk>"], "chat").loc["exact_match", "score"] == 0


# Labels


def labeled(start: int) -> tuple[Example, ...]:
    """Twelve words from index `start` on, each with one of three labels."""
    return tuple(map(Example, micro.WORDS[start : start + 12], ["ab", "cd", "ef"] * 4))


LABELS = Task("labels", "", labeled(0), labeled(12), labeled(24))


def test_label_token_is_the_argmax_over_the_labels(llama: Bridge):
    frame = sl.evaluate(LABELS, {"z": sl.ZeroShot()}, llama, metrics=("label_token", "first_token"))
    frame = frame.set_index("metric")
    ids = {label: llama.tokenizer.get_vocab()[f" {label}"] for label in ("ab", "cd", "ef")}
    prompts = [llama.tokenizer(f"Q: {item.input}\nA:", return_tensors="pt")["input_ids"] for item in LABELS.test]
    raw = micro.raw("Llama")
    with torch.no_grad():
        logits = [raw(row).logits[0, -1] for row in prompts]
    best = [max(ids, key=lambda label, row=row: float(row[ids[label]])) for row in logits]
    assert [text.strip() for text in frame["predicted"]["label_token"]] == best
    assert frame["score"]["label_token"].tolist() == [
        int(label == item.output) for label, item in zip(best, LABELS.test, strict=True)
    ]
    assert not set(frame["predicted"]["first_token"].str.strip()) <= set(ids)


def test_label_token_of_the_echo_counts_labels_only(llama: Bridge):
    task = replace(LABELS, test=(Example("ab", "ab"), Example("cd", "ab"), Example("ba", "ab")))
    assert sl.echo(task, llama, metrics=("label_token",))["score"].tolist() == [1, 0, 0]


def relabeled(task: Task, labels: dict[str, str]) -> Task:
    parts = {
        split: tuple(replace(item, output=labels[item.output]) for item in task.split(split))
        for split in ("train", "valid", "test")
    }
    return replace(task, **parts)


SHARING = relabeled(LABELS, {"ab": "ab ef", "cd": "ab gh", "ef": "ef"})
SAID = (r"task 'labels': 2 of 3 answers \(24 of 36 items\) share their first token with another answer, for example "
        r"'ab ef' and 'ab gh' \(' ab'\)")  # fmt: skip


def test_labels_that_begin_alike_are_refused_or_named(llama: Bridge):
    options: dict[str, Any] = {"metrics": ("label_token",)}
    with pytest.warns(sl.SitelensWarning, match=SAID):
        sl.evaluate(SHARING, {"z": sl.ZeroShot()}, llama, **options)
    alike = relabeled(LABELS, {"ab": "ab ef", "cd": "ab gh", "ef": "ab"})
    with (
        pytest.warns(sl.SitelensWarning, match="3 of 3 answers"),
        pytest.raises(sl.SitelensError, match=r"all answers .'ab ef', 'ab gh', 'ab'. begin with the token ' ab'"),
    ):
        sl.evaluate(alike, {"z": sl.ZeroShot()}, llama, **options)


def test_answers_that_are_no_set_of_labels_are_warned_of(llama: Bridge):
    with pytest.warns(sl.SitelensWarning, match=r"60 different answers in 60 items .*label_token is for tasks with a"):
        sl.evaluate(micro.task(), {"z": sl.ZeroShot()}, llama, metrics=("label_token",))


# The warning about shared first tokens

CONFIG = sl.TrainConfig(n_steps=2, eval_every=1, n_valid=2)


@pytest.mark.parametrize(
    "act",
    [
        lambda task, model: sl.evaluate(task, {"z": sl.ZeroShot(), "few": sl.FewShot(2)}, model),
        lambda task, model: sl.train_selection(task, model, config=CONFIG),
        lambda task, model: sl.transfer_matrix([task, micro.task("b")], model, n_items=2, n_prompts=2, n_shots=2,
                                               config=CONFIG),
        lambda task, model: sl.compare([task], ["zero-shot", sl.methods.TV(n_sets=2)], model, n_items=2),
        lambda task, model: sl.head_similarity([task, micro.task("b")], model, config=CONFIG, seeds=(0, 1)),
        lambda task, model: sl.methods.MTV(n_prompts=2, n_steps=2, n_masks=2).fit(task, model),
        lambda task, model: sl.heads.indirect_effects(
            task, model, embedding=sl.embed_task(task, model, n_prompts=2), n_prompts=2),
        lambda task, model: sl.heads.head_attribution(task, model, n_items=2),
        lambda task, model: sl.studies.soft_hard([task], model, config=CONFIG, n_items=2),
    ],
    ids=["evaluate", "train", "transfer", "compare", "similarity", "mtv", "effects", "attribution", "study"],
)  # fmt: skip
def test_shared_first_tokens_are_said_once_wherever_they_count(act: Any, llama: Bridge):
    for _ in range(2):  # cached or not
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            act(SHARING, llama)
        assert len(said) == 1
        with pytest.warns(sl.SitelensWarning, match=SAID):
            warnings.warn_explicit(said[0].message, said[0].category, "", 0)


def test_metrics_that_generate_do_not_warn_of_first_tokens(llama: Bridge):
    sl.evaluate(SHARING, {"z": sl.ZeroShot()}, llama, metrics=("exact_match",), max_new_tokens=2)


def test_a_few_answers_that_begin_alike_are_no_warning(llama: Bridge):
    pairs = [(word, answer) for word, answer in zip(micro.WORDS[:60], micro.WORDS[1:61], strict=True)]
    pairs[0], pairs[1] = (pairs[0][0], "ab cd"), (pairs[1][0], "ab ef")  # 3 of 60 with "ab" itself would be 5%
    few = Task.from_pairs("few", [pair for pair in pairs if pair[1] != "ab"])
    tokens = first_tokens(few, llama.tokenizer)
    assert tokens["ab cd"] == tokens["ab ef"]
    sl.evaluate(few, {"z": sl.ZeroShot()}, llama)


def test_many_tasks_share_one_warning(llama: Bridge):
    tasks = [replace(SHARING, name=f"task {i}") for i in range(4)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sl.train_selections(tasks, llama, config=CONFIG)
    text = "in 4 of 4 tasks, answers share their first token with another answer of the task (most: task 0 67%"
    assert [str(entry.message)[: len(text)] for entry in said] == [text]


# Logits that are NaN


def spoilt(after: str) -> Bridge:
    """A Llama whose logits are NaN once it reads a certain word."""
    network = micro.raw("Llama")
    with torch.no_grad():
        network.model.embed_tokens.weight[micro.tokenizer().get_vocab()[after]] = float("nan")
    return micro.bridged(network, "spoilt", micro.tokenizer())


@pytest.mark.parametrize("condition", [sl.ZeroShot(), sl.FewShot(1)])
def test_logits_that_are_not_finite_while_decoding_name_task_condition_and_item(condition: sl.Condition):
    whole = micro.bridge("Llama")
    frame = sl.evaluate(micro.task(), {"c": condition}, whole)
    texts = frame["predicted"].tolist()
    seen = {word for item in micro.task().train for word in (" " + item.input, " " + item.output)}
    place, first = next((i, text) for i, text in enumerate(texts) if text.strip() in micro.WORDS and text not in seen)
    task = replace(micro.task(), test=micro.task().test[place : place + 1])
    if isinstance(condition, sl.FewShot):
        task, condition = replace(task, train=task.train[:1] * 3), sl.ZeroShot()
    model = spoilt(sl.evaluate(task, {"c": condition}, whole)["predicted"].iloc[0])
    with pytest.raises(sl.SitelensError, match=r"task 'shift', condition 'site', item 0 \('..'\), generated token 2: "
                                               r"the model's logits are not finite \(dtype float32\)"):  # fmt: skip
        sl.evaluate(task, {"site": condition}, model, metrics=("exact_match",))
    assert first
    with pytest.raises(sl.SitelensError, match=r"prompt 2 \('Q: ..\\nA:'\), generated token 2"):
        sl.generate([f"Q: {ONE.input}\nA:", f"Q: {task.test[0].input}\nA:"], model=model, max_new_tokens=3)


def test_effects_of_logits_that_are_not_finite_name_the_prompt(llama: Bridge):
    embedding = sl.embed_task(micro.task(), llama, n_prompts=2)
    broken = replace(embedding, mean_z=torch.full_like(embedding.mean_z, float("inf")))
    with pytest.raises(sl.SitelensError, match=r"task 'shift', prompt 0 with shuffled answers.*are not finite"):
        sl.heads.indirect_effects(micro.task(), llama, embedding=broken, n_prompts=2, n_shots=2)


# Tasks


def test_case_is_a_field_of_the_task(tmp_path: Path):
    assert sl.load_task("capitalize").case_sensitive and sl.load_task("lowercase_first_letter").case_sensitive
    assert not sl.load_task("antonym").case_sensitive
    pairs = [(word, word.upper()) for word in micro.WORDS[:8]]
    own = Task.from_pairs("capitalize", pairs)
    assert not own.case_sensitive and Task.from_pairs("x", pairs, case_sensitive=True).case_sensitive
    assert own.digest != replace(own, case_sensitive=True).digest
    file = tmp_path / "t.json"
    file.write_text('{"case_sensitive": true, "metric": "exact_match", '
                    '"examples": [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]}')  # fmt: skip
    task = sl.load_task(file)
    assert task.case_sensitive and task.published_metric == "exact_match"


@pytest.mark.usefixtures("unchecked")
def test_what_is_neither_true_nor_false_is_no_case_sensitivity():
    with pytest.raises(sl.SitelensError, match="case_sensitive must be true or false, not 'yes'"):
        Task.from_pairs("t", [(word, "b") for word in "acde"], case_sensitive="yes")


def test_no_name_decides_scoring(llama: Bridge):
    for name in ("capitalize", "place"):
        examples = (Example("paris", "Paris"),)
        task = Task(name, "", examples, examples, examples)
        assert sl.echo(task, llama, metrics=("exact_match",))["score"].tolist() == [1]
        strict = replace(task, case_sensitive=True)
        assert sl.echo(strict, llama, metrics=("exact_match", "prefix_match"))["score"].tolist() == [0, 0]
