"""Tokenization: exactly one BOS token, nothing appended or truncated, and answers as they continue a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import sitelens as sl
from sitelens.engine.batches import tokenize
from sitelens.engine.prompts import Prompt, few_shot_prompt
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.tokenizers import added, continuation, encode, spans
from sitelens.tasks import QA_TEMPLATE, Example, Task
from tests import micro


def sentencepiece(fallback: bool = False) -> Any:
    """A tokenizer that attaches a space to the following word and adds one before each text, like that of Llama."""
    words = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        "▁",
        *"QA:\n0123456789abcdefgh",
        "▁Q",
        "▁A",
        "▁aa",
        "aa",
        "▁ab",
        "ab",
        ":▁",
    ]
    words += [f"<0x{i:02X}>" for i in range(256)] if fallback else []
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [(":", "▁"), ("▁", "Q"), ("▁", "A"), ("a", "a"), ("a", "b"), ("▁", "aa"), ("▁", "ab")]
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def names(ids: Any, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


# Special tokens


@pytest.mark.parametrize("text", ["<bos>Q: aa\nA:", "<bos><bos>Q: aa\nA:", "Q: aa\nA:"])
def test_a_bos_that_stands_in_the_text_is_not_doubled(text: str):
    tokenizer = micro.tokenizer(bos=True)
    assert encode([text], tokenizer) == [tokenizer("Q: aa\nA:")["input_ids"]]
    assert len(spans(text, tokenizer)) == len(encode([text], tokenizer)[0])
    batch = tokenize([Prompt(text, (" ab",))], tokenizer)
    assert batch.tokens[0].tolist().count(1) == 1 and names(batch.answer, tokenizer) == [" ab"]


def test_a_bos_in_the_text_stays_where_the_tokenizer_adds_none():
    tokenizer = micro.tokenizer()
    assert names(encode(["<bos>Q"], tokenizer)[0], tokenizer) == ["<bos>", "Q"]


def test_generation_from_a_text_with_its_bos_is_that_of_the_text_without():
    model = micro.bridge("Llama", bos=True)
    texts = [f"Q: {word}\nA:" for word in micro.WORDS[:3]]
    assert sl.generate(["<bos>" + text for text in texts], None, model) == sl.generate(texts, None, model)


@pytest.mark.parametrize("form", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <eos> $A"])
def test_what_is_put_before_and_behind_a_text(form: str):
    tokenizer = micro.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    before, behind = form.split("$A")
    ids = {"<bos>": 1, "<eos>": 2}
    assert added(tokenizer) == ([ids[name] for name in before.split()], [ids[name] for name in behind.split()])
    assert encode(["Q: aa"], tokenizer)[0][len(added(tokenizer)[0]) :] == encode(["Q: aa"], micro.tokenizer())[0]


def test_a_tokenizer_that_knows_no_letter_a_still_shows_its_bos():
    ids = {"<bos>": 0, "1": 1}
    for kind in (
        models.BPE(ids, []),
        models.WordLevel(ids),
    ):  # one omits unknown text, the other fails
        model = Tokenizer(kind)
        model.pre_tokenizer = pre_tokenizers.Whitespace()
        model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>")
        assert added(tokenizer) == ([0], []) and encode(["1 1"], tokenizer) == [[0, 1, 1]]
        assert continuation("1", tokenizer) == [1]
    with pytest.raises(SitelensError, match="the tokenizer cannot read '1 a': WordLevel error: Missing"):
        encode(["1", "1 a"], tokenizer)


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(SitelensError, match=r"the tokenizer cannot read 'a.*ud800'"):
        encode(["a\ud800"], micro.tokenizer())


# Whole texts


def test_nothing_is_cut_or_padded_whatever_the_tokenizer_was_last_told():
    tokenizer = micro.tokenizer()
    texts = ["aa ab ac ad ae", "aa"]
    whole = [tokenizer(text)["input_ids"] for text in texts]
    short = transformers.PreTrainedTokenizerFast(
        tokenizer_object=micro.tokenizer().backend_tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=2
    )
    short.backend_tokenizer.enable_truncation(2)
    short.backend_tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=9)
    again = transformers.PreTrainedTokenizerFast(
        tokenizer_object=short.backend_tokenizer, pad_token="<pad>", unk_token="<unk>"
    )
    for other in (short, again):
        assert encode(texts, other) == whole
        assert encode(texts, other, special=False) == whole
        assert len(spans(texts[0], other)) == len(whole[0])


# Answers


@pytest.mark.parametrize("fallback", [False, True])
def test_an_answer_that_merges_with_the_prompt_gets_no_space_of_a_first_word(fallback: bool):
    tokenizer = sentencepiece(fallback)
    assert names(tokenizer("aa", add_special_tokens=False)["input_ids"], tokenizer) == ["▁aa"]
    assert names(continuation("aa", tokenizer), tokenizer) == ["aa"]
    assert names(continuation(" aa", tokenizer), tokenizer) == ["▁aa"]
    assert names(continuation("5", tokenizer), tokenizer) == ["5"]
    prompts = [few_shot_prompt(QA_TEMPLATE, [], Example("ab", answer), tokenizer) for answer in ("aa", "5")]
    with pytest.warns(SitelensWarning, match="1 of 2 answers merge"):  # ":" and " " are one token
        batch = tokenize(prompts, tokenizer)
    assert names(batch.tokens[0], tokenizer) == ["<bos>", "▁Q", ":▁", "ab", "\n", "A", ":"]
    assert names(batch.answer, tokenizer) == ["▁aa", "5"]


def test_an_answer_behind_a_byte_is_written_as_in_the_whole_text():
    tokenizer = sentencepiece(fallback=True)
    template = "{input}é{output}\n"
    batch = tokenize([few_shot_prompt(template, [], Example("aa", "ab", ("é",)), tokenizer)], tokenizer)
    assert names(batch.tokens[0], tokenizer) == ["<bos>", "▁aa", "<0xC3>", "<0xA9>"]
    assert names(batch.accepted[0], tokenizer) == ["ab", "<0xC3>"]


def test_a_normalizer_acts_on_prompt_and_answer_alike():
    tokenizer = micro.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    task = Task.from_pairs("own", [(word, "AB") for word in micro.WORDS[:6]])
    batch = tokenize([few_shot_prompt(task, task.train[:1], Example("ａａ", "ＡＢ"), tokenizer)], tokenizer)
    assert names(batch.answer, tokenizer) == [" ab"] and " aa" in names(batch.tokens[0], tokenizer)


def test_white_space_at_the_end_of_a_prompt_is_written_as_before_a_word():
    """Like GPT-2's, this tokenizer encodes blank lines as one token at the end of a text, and as two before a word."""
    from tests.test_chat import chatty

    tokenizer = chatty(None)
    assert len(tokenizer("\n\n")["input_ids"]) == 1 and len(tokenizer("\n\n:")["input_ids"]) == 3
    prompt = few_shot_prompt("{input}\n\n{output};", [], Example("aa", "ba"), tokenizer)
    batch = tokenize([prompt], tokenizer)
    whole = tokenizer("aa\n\nba")["input_ids"]
    assert (
        batch.tokens[0].tolist() == whole[: batch.tokens.shape[1]] and batch.answer[0] == whole[batch.tokens.shape[1]]
    )
    assert tokenize([Prompt(prompt.text, ())], tokenizer).tokens[0].tolist() == tokenizer("aa\n\n")["input_ids"]


# Tokenizers that lack something


def test_a_model_whose_tokenizer_has_no_padding_and_no_end_evaluates_as_with_them():
    task = micro.task(n=20)
    conditions = {"zero": sl.ZeroShot(), "few": sl.FewShot(2)}
    frames = []
    for bare in (False, True):
        tokenizer = micro.tokenizer()
        if bare:
            tokenizer.pad_token = tokenizer.eos_token = None
        model = micro.bridged(micro.raw("Llama"), "bare", tokenizer)
        network: Any = model.original_model
        network.generation_config.eos_token_id = None
        frames.append(sl.evaluate(task, conditions, model, n_items=3))
    assert frames[0].equals(frames[1])
