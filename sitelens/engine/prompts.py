"""Prompts as texts: templates, demonstrations, few-shot prompts and their answers.

The default template is the paper's: `Q: {input}\\nA: {output}\\n\\n` per demonstration, then `Q: {input}\\nA:`.
The space before the answer belongs to the answer; an all-digit answer has none. The template "chat" means the
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
    """A prompt as text, with its accepted answers.

    Attributes:
        text: everything before the answer.
        answers: every accepted answer, as it continues the text.
        special_tokens: whether the tokenizer adds its special tokens (a chat template writes them itself).
        note: a remark on something unusual in the template, which `tokenize` issues as a warning.
    """

    text: str
    answers: tuple[str, ...]
    special_tokens: bool = True
    note: str = ""


def few_shot_prompt(template: str | Task, demonstrations: Sequence[Example], query: Example, tokenizer: Any) -> Prompt:
    """The prompt with these demonstrations and this query; without demonstrations, a zero-shot prompt.

    Args:
        template: a template, or a task, whose template, instruction and template arguments are used.
        demonstrations: solved examples, in the order in which they appear.
        query: the example whose input comes last, and whose answers are accepted.
        tokenizer: the model's tokenizer, needed for chat templates.

    Raises:
        SitelensError: if the template is invalid, or it is "chat" and the tokenizer has no chat template or one that
            fails.
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
    """The pieces of a few-shot prompt in order, as (role, text); joined, they are the prompt's text.

    Raises:
        SitelensError: for an invalid template, or "chat", which has no pieces: its tokenizer writes the prompt.
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
    """The template's text after an answer, and before the next input: "\\n\\n" and "Q: " for the default template.

    For a chat template, the text from the end of an answer to the next user input, and "".
    """
    if task.template != "chat":
        head, tail = task.template.split("{output}")
        return tail, head.split("{input}")[0]
    shown, query = Example("first input", "first answer"), Example("second input", "second answer")
    text = few_shot_prompt(task, [shown], query, tokenizer).text
    return text.split(shown.output)[-1].split(query.input)[0] if shown.output in text else "", ""


def _answer(text: str, spaced: bool) -> str:
    """An answer as it continues a prompt: after a space, unless it consists of digits only."""
    return " " + text if spaced and not (text.isascii() and text.isdigit()) else text


def draw_demonstrations(task: Task, n_shots: int, query: Example | None, *key: object) -> list[Example]:
    """`n_shots` different training items in random order, none of them with the query's input.

    The draw depends only on the task's name, its training items, the query and `key` (for example, a seed, a purpose
    and an item's index).

    Raises:
        SitelensError: if train has too few items.
    """
    if n_shots == 0:
        return []
    pool = task.train
    rng = random.Random("/".join(map(str, ("sitelens/demonstrations", task.name, *key))))
    # Draw more than needed: training items with the query's input are removed.
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
    """One prompt per query. Demonstrations are drawn with a seed made of seed, task, split and item index.

    Args:
        task: the task whose template and training items are used.
        queries: the items to ask.
        n_shots: number of demonstrations per prompt.
        tokenizer: the model's tokenizer, needed for chat templates.
        seed: seed of the demonstrations.
        split: the split that the queries belong to.
        places: the queries' indices in the split (default: 0, 1, 2, ...).
    """
    return [
        few_shot_prompt(task, draw_demonstrations(task, n_shots, query, seed, split, place), query, tokenizer)
        for query, place in zip(queries, places or range(len(queries)), strict=True)
    ]
