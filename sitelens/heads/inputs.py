"""Prompts for heads to be looked at on: those of a task, or one's own."""

from __future__ import annotations

from collections.abc import Sequence

from sitelens.engine.batches import PromptBatch, batch_of
from sitelens.engine.prompts import Prompt
from sitelens.errors import SitelensError
from sitelens.models.model import Model
from sitelens.tasks import ENDINGS, Task, load_task


def task_or_texts(given: Task | str | Sequence[str]) -> Task | list[str]:
    """The task, or prompts of one's own in its place: a list of texts, or one text with white space.

    No name of a task has white space, and the name of a task's file ends in .json, .csv or the like.

    Raises:
        SitelensError: as `load_task`.
    """
    if isinstance(given, str):
        own = any(map(str.isspace, given)) and not given.lower().endswith(ENDINGS)
        return [given] if own else load_task(given)
    if isinstance(given, Task):
        return given
    if not given or not all(isinstance(text, str) for text in given):
        raise SitelensError(f"expected a task or a list of prompts, not {given!r}")
    return list(given)


def text_batch(texts: Sequence[str], model: Model, answer: str | Sequence[str] | None = None) -> PromptBatch:
    """Prompts as they stand, with one answer for all or one for each, as it continues them (" cold").

    Raises:
        SitelensError: if a text is empty or too long, or the number of answers is another.
    """
    answers = [answer] * len(texts) if answer is None or isinstance(answer, str) else list(answer)
    if len(answers) != len(texts):
        raise SitelensError(
            f"there are {len(texts)} prompts and {len(answers)} answers: give one for all, or one for each"
        )
    prompts = [Prompt(text, () if one is None else (one,)) for text, one in zip(texts, answers, strict=True)]
    return batch_of(prompts, model)
