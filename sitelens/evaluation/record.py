"""Records: how a result was made, as plain JSON, so that it can be reproduced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sitelens.models.model import Model
from sitelens.models.provenance import provenance
from sitelens.tasks import Task

RENDERING = ("template", "instruction", "template_arguments")  # fields of a task that decide how it is rendered


def experiment_record(
    function: str, model: Model, tasks: Sequence[Task], n_items: int | None, split: str = "test", **arguments: Any
) -> dict[str, Any]:
    """The record of an experiment, made when it ends.

    Args:
        function: the public function that was called, for example "sl.compare".
        model: the model that was used.
        tasks: the tasks that were used.
        n_items: most items of `split` used per task (None: all).
        split: the split that was evaluated.
        arguments: further arguments of the function.

    Returns:
        Plain JSON: tasks (names), the arguments, n_items, data (`task_record` of each task), and the entries of
        `provenance` (model, machine, versions), with `function` as made_by.
    """
    record = {
        "tasks": [task.name for task in tasks], **arguments, **data_facts(tasks, n_items, split),
        **provenance(function, model),
    }  # fmt: skip
    return json.loads(json.dumps(record))


def data_facts(tasks: Sequence[Task], n_items: int | None, split: str = "test") -> dict[str, Any]:
    """Entries of a record: n_items (most items used per task) and data (`task_record` and n_items of each task)."""
    used = {task.name: len(task.split(split)) if n_items is None else min(len(task.split(split)), n_items)
            for task in tasks}  # fmt: skip
    data = {task.name: {**task_record(task), "n_items": used[task.name]} for task in tasks}
    return {"n_items": max(used.values(), default=0) or None, "data": data}


def task_record(task: Task) -> dict[str, Any]:
    """A task's entry in a record, as plain JSON: source, digest, template, split sizes and note."""
    return {
        "source": Path(task.source).name if Path(task.source).is_file() else task.source, "digest": task.digest,
        **{name: getattr(task, name) for name in RENDERING},
        **{split: len(task.split(split)) for split in ("train", "valid", "test")}, "note": task.note,
    }  # fmt: skip
