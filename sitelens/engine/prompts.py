"""Prompts: the template, few-shot prompts, the answer's tokens, and batches of them.

The default template is the paper's: `Q: {input}\\nA: {output}\\n\\n` for each demonstration, then `Q: {input}\\nA:`.
The space before the answer belongs to the answer, and an all-digit answer gets none. The template "chat" is the
tokenizer's chat template (`sitelens.models.chat`).
"""

from __future__ import annotations

import random
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.chat import chat_prompt
from sitelens.models.tokenizers import continuation, encode
from sitelens.tasks import Arguments, Example, Task, check_template
from sitelens.tasks.templates import running_together

Role = Literal["template", "demonstration input", "demonstration answer", "query"]


@dataclass(frozen=True)
class Prompt:
    """The text up to where the answer begins, and every accepted answer as it would continue that text.

    special_tokens: whether the tokenizer is to add its own (a chat template writes them itself).
    note: what is unusual about how it was written; `tokenize` warns of it.
    """

    text: str
    answers: tuple[str, ...]
    special_tokens: bool = True
    note: str = ""


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Tokenized prompts, left-padded so that every prompt ends at position -1.

    tokens, mask: token ids, and which of them are real.
    answer: the first token of the preferred answer (-1 where none is known); accepted: those of every accepted answer,
        as it is given and in Unicode form NFC.
    texts, answers: what was tokenized.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    answer: Int[Tensor, " batch"]
    accepted: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.mask.sum(-1).tolist()

    def rows(self, index: Sequence[int]) -> PromptBatch:
        """The chosen rows, without the padding that none of them needs."""
        keep = torch.as_tensor(list(index), dtype=torch.long, device=self.tokens.device)
        mask = self.mask[keep]
        start = mask.shape[1] - int(mask.sum(-1).max()) if len(index) else 0
        return PromptBatch(
            self.tokens[keep, start:], mask[:, start:], self.answer[keep],
            tuple(self.accepted[i] for i in index), tuple(self.texts[i] for i in index),
            tuple(self.answers[i] for i in index),
        )  # fmt: skip


def few_shot_prompt(template: str | Task, demonstrations: Sequence[Example], query: Example, tokenizer: Any) -> Prompt:
    """The prompt that shows `demonstrations` and asks `query`; none of the former is a zero-shot prompt.

    Of a task the template, the instruction and the template arguments are used.

    Raises:
        SitelensError: if the template is "chat" and the tokenizer has no chat template, or one that fails.
    """
    form, instruction, arguments = _form(template)
    if form == "chat":
        chat = chat_prompt(demonstrations, query, tokenizer, instruction, arguments)
        return Prompt(chat.text, chat.answers, special_tokens=False, note=chat.note)
    parts = prompt_parts(template, demonstrations, query)
    head = form.split("{output}")[0]
    answers = tuple(_answer(text, spaced=head.endswith(" ")) for text in query.answers)
    note = running_together(form) if demonstrations else ""
    return Prompt("".join(text for _, text in parts), answers, note=note)


def prompt_parts(template: str | Task, demonstrations: Sequence[Example], query: Example) -> list[tuple[Role, str]]:
    """The pieces of a few-shot prompt in their order, and what each is; joined they are the prompt's text.

    Raises:
        SitelensError: for a template that cannot be used ("chat" has no pieces: its tokenizer writes it).
    """
    form, instruction, _ = _form(template)
    if form == "chat":
        raise SitelensError("a chat template's prompts are written by the tokenizer and cannot be taken apart")
    check_template(form)
    head, tail = form.split("{output}")
    before, behind = head.removesuffix(" ").split("{input}")
    parts: list[tuple[Role, str]] = []
    if instruction:
        parts.append(("template", instruction if instruction[-1].isspace() else instruction + "\n\n"))
    for shown in demonstrations:
        answer = _answer(shown.output, spaced=head.endswith(" "))
        parts.append(("template", before))
        parts.append(("demonstration input", shown.input))
        parts.append(("template", behind))
        parts.append(("demonstration answer", answer))
        parts.append(("template", tail))
    asked: list[tuple[Role, str]] = [("template", before), ("query", query.input), ("template", behind)]
    return parts + asked


def _form(template: str | Task) -> tuple[str, str, Arguments]:
    """Template, instruction and template arguments."""
    if isinstance(template, Task):
        return template.template, template.instruction, tuple(dict(template.template_arguments).items())
    return template, "", ()


def after_answer(task: Task, tokenizer: Any) -> tuple[str, str]:
    """What stands behind an answer, and before the next input: of "Q: {input}\\nA: {output}\\n\\n", "\\n\\n" and "Q: ".

    Of a chat template, the text from the end of an answer to the next user's input, and nothing.
    """
    if task.template != "chat":
        head, tail = task.template.split("{output}")
        return tail, head.split("{input}")[0]
    shown, query = Example("first input", "first answer"), Example("second input", "second answer")
    text = few_shot_prompt(task, [shown], query, tokenizer).text
    return text.split(shown.output)[-1].split(query.input)[0] if shown.output in text else "", ""


def _answer(text: str, spaced: bool) -> str:
    """An answer as it continues a prompt: after a space, but for one of digits only."""
    return " " + text if spaced and not (text.isascii() and text.isdigit()) else text


def draw_demonstrations(task: Task, n_shots: int, query: Example | None, *key: object) -> list[Example]:
    """`n_shots` different training items in random order, none of them with the query's input.

    The draw depends on the task's name and `key` only (say a seed, a purpose and an item's index).

    Raises:
        SitelensError: if train has too few items.
    """
    if n_shots == 0:
        return []
    pool = task.train
    rng = random.Random("/".join(map(str, ("sitelens/demonstrations", task.name, *key))))
    # Some to spare: a training item may share the query's input.
    wanted = min(len(pool), n_shots + sum(query is not None and e.input == query.input for e in pool))
    drawn = [pool[i] for i in rng.sample(range(len(pool)), wanted)]
    drawn = [example for example in drawn if query is None or example.input != query.input][:n_shots]
    if len(drawn) < n_shots:
        raise SitelensError(f"task {task.name!r} has too few training items for {n_shots} shots: {len(pool)} items")
    return drawn


def few_shot_prompts(
    task: Task,
    queries: Sequence[Example],
    n_shots: int,
    tokenizer: Any,
    seed: int = 0,
    split: str = "test",
    places: Sequence[int] | None = None,
) -> list[Prompt]:
    """One prompt a query, its demonstrations drawn anew, keyed by seed, task, split and the item's place there."""
    return [
        few_shot_prompt(task, draw_demonstrations(task, n_shots, query, seed, split, place), query, tokenizer)
        for query, place in zip(queries, places or range(len(queries)), strict=True)
    ]


def tokenize(
    prompts: Sequence[Prompt], tokenizer: Any, context: int | None = None, where: str = "", new_tokens: int = 0
) -> PromptBatch:
    """Tokenize prompts with the model's own tokenizer, its own habit of a beginning-of-sequence token included.

    The answer's first token is the one that follows the prompt when both are tokenized together. Where they
    merge across the boundary, it is the first token of the answer behind another text, and a warning says how often.

    Raises:
        SitelensError: if a prompt is empty, does not fit into `context` tokens with the `new_tokens` that are to
            follow it (the last of which is never read), or an answer has no token.
    """
    where = f"{where}: " if where else ""
    ids = prompt_tokens(prompts, tokenizer)
    for note in dict.fromkeys(prompt.note for prompt in prompts if prompt.note):
        warnings.warn(where + note, SitelensWarning, stacklevel=2)
    for prompt, row in zip(prompts, ids, strict=True):
        if not row:
            raise SitelensError(f"{where}the prompt {prompt.text!r} has no tokens")
        if context is not None and len(row) + max(new_tokens - 1, 0) > context:
            more = f" ({new_tokens} more may follow)" if new_tokens else ""
            raise SitelensError(
                f"{where}a prompt has {len(row)} tokens, the model's context holds {context}{more}: "
                f"use fewer shots or shorter inputs ({prompt.text[:60]!r}...)"
            )
    pairs = [(i, form) for i, prompt in enumerate(prompts) for answer in prompt.answers for form in _forms(answer)]
    accepted: list[list[int]] = [[] for _ in prompts]
    merged: list[str] = []
    for (i, answer), (rest, apart) in zip(pairs, answer_tokens(prompts, ids, pairs, tokenizer), strict=True):
        if apart:
            merged.append(prompts[i].text[-20:] + answer)
        if not rest or not answer.strip():
            raise SitelensError(f"{where}the answer {answer!r} has no token of its own after {prompts[i].text[-40:]!r}")
        accepted[i].append(rest[0])
    if merged:
        warnings.warn(
            f"{where}{len(merged)} of {len(pairs)} answers merge with the end of the prompt when tokenized together, "
            f"for example {merged[0]!r}; their first token is that of the answer behind a text that it does not merge "
            "with",
            SitelensWarning, stacklevel=2,
        )  # fmt: skip
    width = max(map(len, ids), default=0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(width) >= width - lengths[:, None]
    first = torch.tensor([row[0] if row else -1 for row in accepted], dtype=torch.long)
    return PromptBatch(
        tokens.reshape(len(ids), width), mask, first,
        tuple(map(tuple, accepted)), tuple(p.text for p in prompts), tuple(p.answers for p in prompts),
    )  # fmt: skip


def _forms(answer: str) -> Sequence[str]:
    """The answer as it is given and, where that is another text, in Unicode form NFC, as most texts are written."""
    return tuple(dict.fromkeys((answer, unicodedata.normalize("NFC", answer))))


def item_sizes(items: Sequence[Example], template: str | Task, tokenizer: Any) -> list[int]:
    """Tokens that each item takes in a prompt as a demonstration, and one to spare."""
    if not items:
        return []
    alone = few_shot_prompt(template, [], items[0], tokenizer)
    behind = [few_shot_prompt(template, [item], items[0], tokenizer) for item in items]
    prompts = [alone, *behind]
    first, *both = map(len, _encode([prompt.text for prompt in prompts], prompts, tokenizer))
    return [size - first + 1 for size in both]


def within_context(task: Task, tokenizer: Any, room: int, n_shots: int) -> Task:
    """The task without the items that are too long for few-shot prompts of at most `room` tokens.

    An item is dropped from its split if it takes, with its answer, more than an (n_shots + 1)-th of the room; so every
    prompt fits, whichever items it shows.
    """
    splits = {split: task.split(split) for split in ("train", "valid", "test")}
    everything = [item for items in splits.values() for item in items]
    if not everything:
        return task
    sizes = item_sizes(everything, task, tokenizer)
    alone = few_shot_prompt(task, [], everything[0], tokenizer)
    around = max(0, len(_encode([alone.text], [alone], tokenizer)[0]) - sizes[0])  # what a chat template adds once
    limit = (room - around) // (n_shots + 1)
    kept = iter(size <= limit for size in sizes)
    chosen = {split: tuple(item for item in items if next(kept)) for split, items in splits.items()}
    dropped = len(everything) - sum(map(len, chosen.values()))
    if not dropped:
        return task
    note = f"{dropped} of {len(everything)} items are dropped: longer than {limit} tokens"
    return replace(task, **chosen, note="; ".join(text for text in (task.note, note) if text))


def prompt_tokens(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt, as they are before an answer.

    Many tokenizers write white space at the end of a text otherwise than before a word: "\\n\\n" as one token, but
    "\\n", "\\n" and "a". Prompts that an answer follows have the latter.
    """
    ids = _encode([prompt.text for prompt in prompts], prompts, tokenizer)
    open_ended = [i for i, prompt in enumerate(prompts) if prompt.answers and prompt.text[-1:].isspace()]
    if open_ended:
        letter = continuation("a", tokenizer)
        some = [prompts[i] for i in open_ended]
        for i, row in zip(open_ended, _encode([prompt.text + "a" for prompt in some], some, tokenizer), strict=True):
            if row[-len(letter) :] == letter and len(row) > len(letter):
                ids[i] = row[: -len(letter)]
    return ids


def answer_tokens(
    prompts: Sequence[Prompt], ids: Sequence[list[int]], pairs: Sequence[tuple[int, str]], tokenizer: Any
) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each answer behind its prompt, for pairs of a prompt's place and an answer.

    Tokenized together with the prompt, whose own tokens are `ids`; behind another text, and the second is true, where
    the two merge.
    """
    together = _encode([prompts[i].text + answer for i, answer in pairs], [prompts[i] for i, _ in pairs], tokenizer)
    for (i, answer), row in zip(pairs, together, strict=True):
        apart = row[: len(ids[i])] != ids[i]
        yield (continuation(answer, tokenizer) if apart else row[len(ids[i]) :]), apart


def _encode(texts: Sequence[str], prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts that begin as these prompts do, whose special tokens they have."""
    found: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        places = [i for i, prompt in enumerate(prompts) if prompt.special_tokens is special]
        for place, row in zip(places, encode([texts[i] for i in places], tokenizer, special), strict=True):
            found[place] = row
    return found
