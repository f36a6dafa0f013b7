"""Interpretation of command-line arguments: tasks and suites, templates, methods, and the command itself."""

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
    from sitelens.methods.base import Method
    from sitelens.tasks import Task


def template_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `rewritten`: template, instruction and template arguments; None keeps the task's own.

    Raises:
        SitelensError: for a --template-arg that is not NAME=VALUE.
    """
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
    """Tasks by name, file or suite, and the reasons for tasks of suites that could not be loaded, by name.

    Raises:
        SitelensError: if a task that is named itself cannot be loaded, or two tasks have the same name.
    """
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


def methods_of(options: argparse.Namespace) -> list[Method]:
    """The methods of --methods with the hyperparameters of --set.

    Raises:
        SitelensError: for an unknown method or hyperparameter, or a --set that is not METHOD.FIELD=VALUE.
    """
    from sitelens.methods.registry import ALL, load_methods, method_named

    for path in options.method_files:
        load_methods(path)
    names = dict.fromkeys(ALL if options.methods == ["all"] else options.methods)
    fields: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in options.settings:
        key, sign, value = setting.partition("=")
        name, _, field = key.rpartition(".")
        if not (sign and name and field):
            raise SitelensError(f"--set takes METHOD.FIELD=VALUE, for example LTV.n_steps=400, got {setting!r}")
        if name not in fields:
            raise SitelensError(f"--set {key} names a method that is not fitted here; there are {', '.join(names)}")
        try:
            plain = json.loads(value)
        except (ValueError, RecursionError):
            plain = value  # text without quotation marks
        fields[name][field] = plain
    return [method_named(name, values) for name, values in fields.items()]


def typed_command(options: argparse.Namespace) -> str:
    """The command as typed, without --cache and --data, which name folders of this machine and change no results."""
    words = iter(options.words)
    kept = []
    for word in words:
        if word in ("--cache", "--data"):
            next(words, None)
        elif not word.startswith(("--cache=", "--data=")):
            kept.append(word)
    return f"sitelens {shlex.join(kept)}"


def number(text: str, option: str) -> float:
    """The value of a numeric option.

    Raises:
        SitelensError: if the text is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise SitelensError(f"{option} must be a number or 'random', not {text!r}") from None
