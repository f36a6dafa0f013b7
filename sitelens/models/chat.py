"""Chat templates: a conversation as the tokenizer writes it, and where in it the answer begins.

A conversation is rendered with its answer, as in the model's training. The prompt is the text before the answer; the
answer is the rendered answer without the end of the turn. So white space, an empty think block, or anything else that a
template writes before each answer is where the model expects it.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sitelens.errors import SitelensError
from sitelens.models.tokenizers import first_line
from sitelens.tasks import CLOCK, Arguments, Example

TODAY = "2024-07-26"  # for templates that write the date: results must not depend on the day
MARK = "SitelensAnswer"  # placeholder for an answer, to find where the template puts it


@dataclass(frozen=True)
class Chat:
    """A rendered conversation with its answers.

    Attributes:
        text: everything before the answer.
        answers: each answer as it continues the text, without the end of its turn.
        note: a remark on something unusual in the template, for a warning.
    """

    text: str
    answers: tuple[str, ...]
    note: str = ""


def chat_prompt(
    demonstrations: Sequence[Example], query: Example, tokenizer: Any, instruction: str = "", arguments: Arguments = ()
) -> Chat:
    """A conversation in which the demonstrations are earlier turns and the query is the last question.

    Args:
        demonstrations: solved examples, in order.
        query: the example that is asked.
        tokenizer: a tokenizer with a chat template.
        instruction: the system message; put before the first question if the template takes no system message.
        arguments: variables for the template. A template that asks for today's date gets 26 July 2024, or the date in
            the argument `strftime_now`.

    Raises:
        SitelensError: if the tokenizer has no chat template, or its template cannot write the conversation.
    """
    template = _Template(tokenizer, arguments)
    turns: list[dict[str, str]] = []
    for example in demonstrations:
        turns += [_turn("user", example.input), _turn("assistant", example.output)]
    turns.append(_turn("user", query.input))
    if instruction:
        turns = template.instructed(turns, instruction)
    asking = template.write(turns, asking=True)
    template.check_question(turns, asking)
    try:
        frame = template.write([*turns, _turn("assistant", MARK)])
        texts = [template.write([*turns, _turn("assistant", answer)]) for answer in query.answers]
    except SitelensError as error:
        return Chat(asking, query.answers, note=f"{error}: answers are taken as they are, directly behind the prompt")
    start = frame.rfind(MARK)
    if start < 0:
        raise SitelensError(f"{template.name} does not write what the assistant says: {frame[-60:]!r}")
    end = frame[start + len(MARK) :]
    prompt = frame[:start].rstrip(" ")  # a space before the answer belongs to the answer
    notes = [f"{template.name} reads no {name}, given as a template argument" for name in template.unread]
    if not frame.startswith(asking):
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asking, prompt, strict=False))
        same = max(0, len(list(alike)) - 20)
        notes.append(f"{template.name} asks for an answer with {asking[same:]!r} but writes one behind "
                     f"{prompt[same:]!r}: prompts end in the latter")  # fmt: skip
    answers = []
    for text, answer in zip(texts, query.answers, strict=True):
        if not text.startswith(prompt):
            notes.append(f"{template.name} writes the answer {answer!r} in a way of its own: it is taken as it is")
            text = frame[:start] + answer
        answers.append(text[len(prompt) :].removesuffix(end))
    return Chat(prompt, tuple(answers), "; ".join(notes))


class _Template:
    """The chat template of a tokenizer, with a task's template arguments."""

    def __init__(self, tokenizer: Any, arguments: Arguments) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise SitelensError("the template 'chat' needs a tokenizer with a chat template; this model's has none")
        self.tokenizer, self.arguments = tokenizer, dict(arguments)
        self.name = f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'this model'}"
        try:
            text = tokenizer.get_chat_template(self.arguments.pop("chat_template", None))
        except Exception as error:  # several named templates, none of them "default"
            raise SitelensError(f"{self.name} cannot be used: {_reason(error)}") from error
        self.unread = [name for name in self.arguments if not re.search(rf"\b{name}\b", text)]
        day = self.arguments.pop(CLOCK, TODAY)
        self.text = _dated(text, datetime.date.fromisoformat(str(day))) if CLOCK in text else text

    def write(self, turns: Sequence[dict[str, str]], asking: bool = False) -> str:
        """The conversation as text; with `asking`, including the beginning of the next answer.

        Raises:
            SitelensError: if the template cannot write it; the message gives the template's own reason.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), chat_template=self.text, tokenize=False, add_generation_prompt=asking, **self.arguments
            )
        except Exception as error:  # a template is a program and may raise anything
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
            raise SitelensError(
                f"{self.name} cannot write a conversation of the roles {roles}: {_reason(error)} (an instruction "
                "becomes the system message, template arguments are the template's variables)"
            ) from error

    def instructed(self, turns: list[dict[str, str]], instruction: str) -> list[dict[str, str]]:
        """The turns with an instruction, as a system message or else at the beginning of the first question."""
        system = _turn("system", instruction.strip())
        try:
            if instruction.strip() in self.write([system, _turn("user", MARK)], asking=True):
                return [system, *turns]
        except SitelensError:
            pass  # many templates reject the system role; others omit it silently
        return [_turn("user", f"{instruction.strip()}\n\n{turns[0]['content']}"), *turns[1:]]

    def check_question(self, turns: list[dict[str, str]], text: str) -> None:
        """Raise SitelensError if the template omits the user's messages."""
        question = turns[-1]["content"]
        if question.strip() not in text and self.write([*turns[:-1], _turn("user", MARK)], asking=True) == text:
            raise SitelensError(f"{self.name} does not write what the user says: {text[-60:]!r}")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _dated(template: str, day: datetime.date) -> str:
    """A chat template with a fixed date: strftime_now becomes a macro for the date formats that the template uses."""
    formats = set(re.findall(r"strftime_now\s*\(\s*(?:format\s*=\s*)?(\"[^\"]*\"|'[^']*')", template))
    days = ", ".join(f"{form}: {_quoted(day.strftime(form[1:-1]))}" for form in sorted(formats))
    # On a line of its own, whose newline Jinja trims after a block: the template's first line remains the first line.
    date = f"{{{{ {{{days}}}.get(format, {_quoted(day.isoformat())}) }}}}"
    return f"{{%- macro {CLOCK}(format) -%}}{date}{{%- endmacro %}}\n{template}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
