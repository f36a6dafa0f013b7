"""What the words of a command mean: tasks and suites, templates, methods' options, and the command itself."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sitelens.errors import SitelensError
from sitelens.files.escaping import visible

if TYPE_CHECKING:
    from sitelens.tasks import Task


def template_options(options: argparse.Namespace) -> dict[str, Any]:
    """Template, instruction and template arguments, None where the tasks' own stay."""
    arguments: dict[str, Any] | None = None
    for argument in options.template_arguments or ():
        name, sign, value = argument.partition("=")
        if not sign:
            raise SitelensError(f"--template-arg takes NAME=VALUE, got {argument!r}")
        try:
            plain = json.loads(value)
        except (ValueError, RecursionError):
            plain = value  # text without quotation marks
        arguments = {**(arguments or {}), name: plain}
    return {"template": options.template, "instruction": options.instruction, "template_arguments": arguments}


def tasks_of(words: Sequence[str]) -> tuple[list[Task], dict[str, str]]:
    """Tasks by name, file or suite, and which of the suites' tasks cannot be had, and why."""
    from sitelens.tasks import SUITES, load_task, load_tasks, suite_names

    found: list[Task | str] = []
    left_out: dict[str, str] = {}
    for word in words:
        for name in suite_names(word) if word in SUITES else ():
            try:
                found.append(load_task(name))
            except SitelensError as error:
                left_out[name] = str(error)
                print(f"left out: {name} ({visible(str(error))})", file=sys.stderr)
        if word not in SUITES:
            found.append(word)
    return load_tasks(found), left_out


def method_options(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of methods' fits, checked, so that a wrong one shows before a model is loaded."""
    chosen: dict[str, dict[str, Any]] = {}
    for setting in options.settings:
        key, sign, value = setting.partition("=")
        method, dot, option = key.partition(".")
        if not (sign and dot and method and option):
            raise SitelensError(f"--set takes METHOD.OPTION=VALUE, for example LTV.steps=400, got {setting!r}")
        try:
            plain = json.loads(value)
        except (ValueError, RecursionError):
            plain = value  # text without quotation marks
        chosen.setdefault(method, {})[option] = plain
    from sitelens.methods import checked_options

    return checked_options(chosen)


def typed_command(options: argparse.Namespace) -> str:
    """What was typed, but for folders of this machine that change no number."""
    words = iter(options.words)
    kept = []
    for word in words:
        if word in ("--cache", "--data"):
            next(words, None)
        elif not word.startswith(("--cache=", "--data=")):
            kept.append(word)
    return f"sitelens {shlex.join(kept)}"


def number(text: str, option: str) -> float:
    """The number that an option was given."""
    try:
        return float(text)
    except ValueError:
        raise SitelensError(f"{option} must be a number or 'random', not {text!r}") from None
