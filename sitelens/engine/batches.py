"""Batches: tokenized, left-padded prompts, with the first token of every accepted answer."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sitelens.engine.prompts import Prompt, few_shot_prompt
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.model import Model
from sitelens.models.tokenizers import continuation, encode
from sitelens.tasks import Example, Task


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Tokenized prompts, left-padded so that every prompt ends at position -1.

    Attributes:
        tokens: token ids, `[batch pos]`.
        mask: True at real tokens, False at padding.
        answer: first token of each prompt's preferred answer (-1 if the prompt has no answer).
        accepted: first tokens of every accepted answer, as given and in Unicode form NFC.
        texts: the prompts that were tokenized.
        answers: their accepted answers.
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
    def ids(self) -> list[list[int]]:
        """The token ids of each row, without padding."""
        return [tokens[mask].tolist() for tokens, mask in zip(self.tokens, self.mask, strict=True)]

    @cached_property
    def lengths(self) -> list[int]:
        """The number of real tokens in each row."""
        return self.mask.sum(-1).tolist()

    def rows(self, index: Sequence[int]) -> PromptBatch:
        """The rows at these indices, without the padding that none of them needs."""
        keep = torch.as_tensor(list(index), dtype=torch.long, device=self.tokens.device)
        mask = self.mask[keep]
        start = mask.shape[1] - int(mask.sum(-1).max()) if len(index) else 0
        return PromptBatch(
            self.tokens[keep, start:], mask[:, start:], self.answer[keep],
            tuple(self.accepted[i] for i in index), tuple(self.texts[i] for i in index),
            tuple(self.answers[i] for i in index),
        )  # fmt: skip


def batch_of(prompts: Sequence[Prompt], model: Model, where: str = "") -> PromptBatch:
    """Prompts, tokenized by the model's tokenizer and checked against its context length.

    Args:
        prompts: the prompts to tokenize.
        model: the model whose tokenizer and context length are used.
        where: a name for the prompts in messages.

    Raises:
        SitelensError: as `tokenize`.
    """
    return tokenize(prompts, model.tokenizer, model.context_length, where)


def task_batch(task: Task, prompts: Sequence[Prompt], model: Model) -> PromptBatch:
    """`batch_of` for prompts of a task, whose name appears in messages."""
    return batch_of(prompts, model, f"task {task.name!r}")


def zero_shot_batch(items: Sequence[tuple[Task, Example]], model: Model, where: str) -> PromptBatch:
    """`batch_of` for one prompt without demonstrations per item, each with its task."""
    tokenizer = model.tokenizer
    return batch_of([few_shot_prompt(task, [], item, tokenizer) for task, item in items], model, where)


def tokenize(
    prompts: Sequence[Prompt], tokenizer: Any, context: int | None = None, where: str = "", new_tokens: int = 0
) -> PromptBatch:
    """Prompts as a padded batch; a beginning-of-sequence token is added only if the tokenizer itself adds one.

    An answer's first token is the one that follows the prompt when both are tokenized together. Where the two merge
    across the boundary, it is the first token of the answer after another text, and a warning says how often.

    Args:
        prompts: the prompts to tokenize.
        tokenizer: the model's tokenizer (`Model.tokenizer`).
        context: context length of the model in tokens (None: not checked).
        where: a name for the prompts in messages.
        new_tokens: number of tokens to be generated after each prompt, which must fit as well (except the last, which
            is never an input).

    Raises:
        SitelensError: if a prompt is empty or too long for the context, or an answer has no token of its own.
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
    """The answer as given and, if that differs, in Unicode form NFC, which most texts use."""
    return tuple(dict.fromkeys((answer, unicodedata.normalize("NFC", answer))))


def prompt_tokens(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt as they are when an answer follows.

    Many tokenizers treat white space at the end of a text differently from white space before a word: "\\n\\n" is one
    token, "\\n\\na" is "\\n", "\\n" and "a". For prompts with answers, the latter form is used.
    """
    ids = encode_prompts([prompt.text for prompt in prompts], prompts, tokenizer)
    open_ended = [i for i, prompt in enumerate(prompts) if prompt.answers and prompt.text[-1:].isspace()]
    if open_ended:
        letter = continuation("a", tokenizer)
        some = [prompts[i] for i in open_ended]
        for i, row in zip(
            open_ended, encode_prompts([prompt.text + "a" for prompt in some], some, tokenizer), strict=True
        ):
            if row[-len(letter) :] == letter and len(row) > len(letter):
                ids[i] = row[: -len(letter)]
    return ids


def answer_tokens(
    prompts: Sequence[Prompt], ids: Sequence[list[int]], pairs: Sequence[tuple[int, str]], tokenizer: Any
) -> Iterator[tuple[list[int], bool]]:
    """For each pair (index of a prompt, answer): the answer's tokens, and whether it merges with the prompt.

    The answer is tokenized together with the prompt, whose own tokens are `ids`; if the two merge, after another text
    instead (`continuation`).
    """
    together = encode_prompts(
        [prompts[i].text + answer for i, answer in pairs], [prompts[i] for i, _ in pairs], tokenizer
    )
    for (i, answer), row in zip(pairs, together, strict=True):
        apart = row[: len(ids[i])] != ids[i]
        yield (continuation(answer, tokenizer) if apart else row[len(ids[i]) :]), apart


def encode_prompts(texts: Sequence[str], prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts, one per prompt; special tokens are added as for that prompt."""
    found: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        places = [i for i, prompt in enumerate(prompts) if prompt.special_tokens is special]
        for place, row in zip(places, encode([texts[i] for i in places], tokenizer, special), strict=True):
            found[place] = row
    return found
