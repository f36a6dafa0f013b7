"""Prompts as texts: the template, demonstrations, few-shot prompts and their answers.

The default template is the paper's: `Q: {input}\\nA: {output}\\n\\n` for each demonstration, then `Q: {input}\\nA:`.
The space before the answer belongs to the answer, and an all-digit answer gets none. The template "chat" is the
tokenizer's chat template (`sitelens.models.chat`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sitelens.errors import SitelensError
from sitelens.models.chat import chat_prompt
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
