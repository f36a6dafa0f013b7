"""Loading of tasks, by name or from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from sitelens.checks.values import SplitSeed, converted
from sitelens.errors import SitelensError
from sitelens.suggestions import did_you_mean
from sitelens.tasks.files import ENDINGS, SPLIT_SEED, Columns, read_file
from sitelens.tasks.suite import Suite
from sitelens.tasks.suites import suite_of, task_names
from sitelens.tasks.task import Task, task_from_items
from sitelens.tasks.templates import QA_TEMPLATE, checked_arguments


def load_task(
    name: str | Path | Task,
    *,
    input: str = "input",
    output: str = "output",
    also: str | None = "also",
    split: str | None = "split",
    sep: str | None = None,
    seed: int | None = None,
) -> Task:
    """A task by name ("antonym", "fv/antonym", "bbh/navigate") or from a file. A Task is returned unchanged.

    Files are tables (.csv, .tsv), JSON Lines (.jsonl) or JSON (.json). A JSON file holds a list of items, or an object
    with lists of items under "examples" or under "train", "valid" and "test", and optionally "name", "metric" (the
    published metric) and other fields of Task.

    Args:
        name: a name, a path or a Task; all other arguments apply to files only.
        input, output: columns (or keys) of the input and its preferred answer.
        also: optional column of further accepted answers.
        split: optional column with train, valid or test; without it (or with split=None) the items are split at random,
            as by `Task.from_pairs`.
        sep: separator of a table (default: detected).
        seed: seed of the random split (default: 32, that of the Function Vectors tasks).

    Raises:
        SitelensError: for an unknown name, suggesting similar ones, or for a file that cannot be used, naming the item
            and the reason.

    Example:
        >>> task = sl.load_task("antonym")
        >>> task.train[0].input, task.train[0].answers
        ('clockwise', ('counterclockwise', 'anticlockwise'))
    """
    input, output = converted("input", input, str), converted("output", output, str)
    also, split = converted("also", also, str | None), converted("split", split, str | None)
    seed = converted("seed", seed, SplitSeed | None)
    options = (input, output, also, split, sep, seed)
    given = options != ("input", "output", "also", "split", None, None)
    if isinstance(name, Task):
        if given:
            raise SitelensError(f"columns, sep and seed are for files; {name.name!r} is a task already")
        return name
    if not isinstance(name, str | Path):
        raise SitelensError(f"a task is a name, a file or a Task, not {type(name).__name__}{_hint(name)}")
    text = str(name)
    if text.lower().endswith(ENDINGS):
        path = Path(text).expanduser()
        content = read_file(path, Columns(input, output, also, split), sep)
        return _from_file(path, content, SPLIT_SEED if seed is None else seed)
    if given:
        raise SitelensError(f"columns, sep and seed are for files ({', '.join(ENDINGS)}); {text!r} is none")
    if (suite := suite_of(text)) is not None:
        return task_of(suite, text)
    hint = did_you_mean(text, task_names(), n=4) or "sl.list_tasks() lists them all"
    raise SitelensError(f"unknown task {text!r}: {hint} (a file must end in {', '.join(ENDINGS)})")


def task_of(suite: Suite, name: str) -> Task:
    """The task of this name in a suite.

    Raises:
        SitelensError: if its data are not available, or the suite returns anything else.
    """
    task = suite.load(name)
    if not isinstance(task, Task) or task.name != name:
        given = f"the task {task.name!r}" if isinstance(task, Task) else repr(task)
        raise SitelensError(f"the suite {suite.name!r} was asked for the task {name!r} and gave {given}")
    return task


def load_tasks(names: Iterable[str | Path | Task] | str | Path | Task) -> list[Task]:
    """Several tasks, as `load_task`, in the order given.

    Raises:
        SitelensError: as `load_task`, and if two different tasks have the same name.

    Example:
        >>> [task.name for task in sl.load_tasks(["antonym", "synonym"])]
        ['antonym', 'synonym']
    """
    tasks = [load_task(name) for name in ([names] if isinstance(names, str | Path | Task) else names)]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise SitelensError(f"the task {name!r} is given {count} times; names must differ")
    return tasks


def _hint(value: object) -> str:
    if isinstance(value, pd.DataFrame):
        return ": use Task.from_frame(name, frame)"
    return ": use load_tasks for several, Task.from_pairs(name, pairs) for items" if isinstance(value, Iterable) else ""


def _from_file(path: Path, content: dict[str, Any], seed: int) -> Task:
    content = {"published_metric" if key == "metric" else key: value for key, value in content.items()}
    fields = ("published_metric", "template", "instruction", "note", "case_sensitive")
    options = {key: content[key] for key in fields if key in content}
    name = content.get("name", path.stem)
    for key, value in {**options, "name": name}.items():
        if not isinstance(value, str) and key != "case_sensitive":
            raise SitelensError(f"{path}: {key} must be text, not {value!r}")
    if "template_arguments" in content:
        options["template_arguments"] = checked_arguments(
            content["template_arguments"], content.get("template", QA_TEMPLATE), str(path)
        )
    return task_from_items(name, content, str(path), seed, {"source": str(path), **options})
