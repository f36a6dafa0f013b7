"""Records: how a result was made, as plain JSON, so that it can be made again."""

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
    """What is known of an experiment when it ends.

    Args:
        function: the public function that was called, for example "sl.compare".
        n_items: items of `split` that were used per task at most (None: all).
        arguments: further arguments of the function.

    Returns:
        Plain JSON: tasks (names), the arguments, n_items, data (`task_record` of each task), and everything that
        `provenance` says of the model, the machine and the versions, with `function` as made_by.
    """
    record = {
        "tasks": [task.name for task in tasks], **arguments, **data_facts(tasks, n_items, split),
        **provenance(function, model),
    }  # fmt: skip
    return json.loads(json.dumps(record))


def data_facts(tasks: Sequence[Task], n_items: int | None, split: str = "test") -> dict[str, Any]:
    """For a record: how many items per task were used at most, and each task's digest, note and number of items."""
    used = {task.name: len(task.split(split)) if n_items is None else min(len(task.split(split)), n_items)
            for task in tasks}  # fmt: skip
    data = {task.name: {**task_record(task), "n_items": used[task.name]} for task in tasks}
    return {"n_items": max(used.values(), default=0) or None, "data": data}


def task_record(task: Task) -> dict[str, Any]:
    """What a record says of a task, as plain JSON."""
    return {
        "source": Path(task.source).name if Path(task.source).is_file() else task.source, "digest": task.digest,
        **{name: getattr(task, name) for name in RENDERING},
        **{split: len(task.split(split)) for split in ("train", "valid", "test")}, "note": task.note,
    }  # fmt: skip
