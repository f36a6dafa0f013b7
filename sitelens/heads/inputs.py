"""Prompts on which heads are examined: those of a task, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

from sitelens.engine.batches import PromptBatch, batch_of
from sitelens.engine.prompts import Prompt
from sitelens.errors import SitelensError
from sitelens.models.model import Model
from sitelens.tasks import ENDINGS, Task, load_task


def task_or_texts(given: Task | str | Sequence[str]) -> Task | list[str]:
    """The task, or a list of prompts if the user gives prompts instead.

    A single text counts as a prompt if it contains white space and does not end like a task file: names of tasks have
    no white space.

    Raises:
        SitelensError: as `load_task`, or if this is neither a task nor a list of prompts.
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
    """The texts, unchanged, as one batch.

    Args:
        texts: the prompts.
        model: the model.
        answer: one for all or one per prompt, as it continues the text (" cold"); None for no answers.

    Raises:
        SitelensError: if a text is empty or too long, or the number of answers differs from that of the prompts.
    """
    answers = [answer] * len(texts) if answer is None or isinstance(answer, str) else list(answer)
    if len(answers) != len(texts):
        raise SitelensError(
            f"there are {len(texts)} prompts and {len(answers)} answers: give one for all, or one for each"
        )
    prompts = [Prompt(text, () if one is None else (one,)) for text, one in zip(texts, answers, strict=True)]
    return batch_of(prompts, model)
