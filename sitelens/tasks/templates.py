"""Templates: what they must contain, and the arguments that a chat template accepts."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

from sitelens.errors import SitelensError

QA_TEMPLATE = "Q: {input}\nA: {output}\n\n"
CLOCK = "strftime_now"  # the variable that gives chat templates the current date
# Parameters of apply_chat_template itself.
_RESERVED = frozenset({
    "self", "messages", "conversation", "conversations", "tools", "documents", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
Arguments = tuple[tuple[str, Any], ...]  # names and values: text, numbers, True, False or None


def check_template(template: str) -> None:
    """Raise SitelensError unless `template` is "chat" or contains {input} before {output}, once each."""
    if not isinstance(template, str):
        raise SitelensError(f"a template must be text, not {template!r}; the default is {QA_TEMPLATE!r}")
    if template == "chat":
        return
    at_input, at_output = template.find("{input}"), template.find("{output}")
    if template.count("{input}") != 1 or template.count("{output}") != 1 or at_output < at_input:
        raise SitelensError(
            f"the template {template!r} must contain {{input}} and after it {{output}}, each once, or be 'chat'; "
            f"the default is {QA_TEMPLATE!r}"
        )
    if template[:at_output].endswith("{input}"):
        raise SitelensError(f"the template {template!r} must have some text between {{input}} and {{output}}")


def running_together(template: str) -> str:
    """A warning text if a template has no separator between an answer and the next demonstration; otherwise ""."""
    between = template.partition("{output}")[2] + template.partition("{input}")[0]
    if between and not between[0].isalnum():
        return ""
    sample = "".join(template.replace("{input}", "hot").replace("{output}", "cold") for _ in range(2))
    return (
        f"the template {template!r} puts nothing between an answer and the next demonstration, which run together "
        f"({sample!r}): end it with a separator, for example {template + chr(10)!r}"
    )


def rewritten(
    task: Any, template: str | None = None, instruction: str | None = None, template_arguments: Any = None
) -> Any:
    """The task with another template, instruction or template arguments; None keeps the task's own.

    Raises:
        SitelensError: for a template or arguments that cannot be used.
    """
    changes: dict[str, Any] = {"template": template, "instruction": instruction}
    if template_arguments is not None or template not in (None, "chat"):  # only "chat" takes arguments
        new_template = template if template is not None else task.template
        changes["template_arguments"] = checked_arguments(template_arguments or (), new_template, f"task {task.name!r}")
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(task, **changes) if changes else task


def checked_arguments(arguments: Any, template: str, where: str) -> Arguments:
    """Arguments of a chat template, from a mapping or pairs, as sorted pairs.

    Args:
        arguments: names and values: text, numbers, True, False or None.
        template: the task's template, which must be "chat" if there are arguments.
        where: beginning of messages.

    Raises:
        SitelensError: for another template, a name that is no identifier or is reserved, a value of another type, or a
            `strftime_now` that is no date.
    """
    try:
        pairs = dict(arguments).items()
    except (TypeError, ValueError):
        raise SitelensError(
            f"{where}: template_arguments must be like {{'enable_thinking': False}}, not {arguments!r}"
        ) from None
    for name, value in pairs:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise SitelensError(f"{where}: {name!r} cannot be a template argument")
        if value is not None and not isinstance(value, str | int | float):
            raise SitelensError(f"{where}: the template argument {name} must be text, a number, True or False, not "
                                f"{value!r}")  # fmt: skip
    values = dict(pairs)
    try:
        datetime.date.fromisoformat(str(values.get(CLOCK, "2024-07-26")))
    except ValueError:
        raise SitelensError(
            f"{where}: the template argument {CLOCK} must be a date such as '2024-07-26', not {values[CLOCK]!r}"
        ) from None
    if values and template != "chat":
        raise SitelensError(f"{where}: template arguments are for the template 'chat'; the template is {template!r}")
    return tuple(sorted(values.items()))
