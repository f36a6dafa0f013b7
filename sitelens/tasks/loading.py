"""Tasks by name or from a file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sitelens.checks.values import SplitSeed, converted
from sitelens.errors import SitelensError
from sitelens.suggestions import did_you_mean
from sitelens.tasks import benchmarks, builtin, function_vectors
from sitelens.tasks.examples import Example
from sitelens.tasks.files import ENDINGS, SPLIT_SEED, Columns, read_file
from sitelens.tasks.files import function_vectors_split as function_vectors_split
from sitelens.tasks.listing import SUITES as SUITES
from sitelens.tasks.listing import group_of as group_of
from sitelens.tasks.listing import kinds_of as kinds_of
from sitelens.tasks.listing import list_tasks as list_tasks
from sitelens.tasks.listing import suite_names as suite_names
from sitelens.tasks.listing import task_names as task_names
from sitelens.tasks.task import Task, _check_number, _from_items, _split
from sitelens.tasks.templates import CLOCK as CLOCK
from sitelens.tasks.templates import QA_TEMPLATE as QA_TEMPLATE
from sitelens.tasks.templates import Arguments as Arguments
from sitelens.tasks.templates import check_template as check_template
from sitelens.tasks.templates import checked_arguments as checked_arguments
from sitelens.tasks.templates import rewritten as rewritten


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
    """A task by name ("antonym", "fv/antonym", "bbh/navigate") or from a file. A Task is returned as is.

    Files are tables (.csv, .tsv; the separator is recognized, or given as `sep`), JSON Lines (.jsonl) or .json: a list
    of items, or an object with "examples" (such a list) or with "train", "valid" and "test" (three of them), and
    optionally "name", "metric" (the published one) and other fields of Task. Further options are for files, too:

    input, output, also, split: names of the columns or keys. `also` and `split` (train, valid, test) may be missing;
    without `split` the items are split as `Task.from_pairs` does, by `seed`. split=None ignores that column.

    Raises:
        SitelensError: for an unknown name (with the nearest ones) or a file that cannot be used (which item, why).
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
    if text in builtin.names():
        return _builtin(text)
    if text.startswith("fv/") and text[3:] in function_vectors.registry():
        return _function_vectors(text[3:])
    if found := benchmarks.find(text):
        return _benchmark(text, *found)
    hint = did_you_mean(text, task_names(), n=4) or "sl.list_tasks() lists them all"
    raise SitelensError(f"unknown task {text!r}: {hint} (a file must end in {', '.join(ENDINGS)})")


def load_tasks(names: Iterable[str | Path | Task] | str | Path | Task) -> list[Task]:
    """Several tasks, as `load_task`, in the order given.

    Raises:
        SitelensError: as `load_task`, and if two different tasks have the same name.
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


def _builtin(name: str) -> Task:
    examples = [Example(*pair) for pair in builtin.pairs(name)]
    random.Random(f"sitelens/split/{name}").shuffle(examples)
    n_train, n_valid, _ = builtin.split_sizes(name, len(examples))
    parts = examples[:n_train], examples[n_train : n_train + n_valid], examples[n_train + n_valid :]
    train, valid, test = (tuple(part) for part in parts)
    return Task(name, "built in", train, valid, test, case_sensitive=function_vectors.about_case(name))


def _function_vectors(name: str) -> Task:
    examples = [Example(item["input"], item["output"]) for item in function_vectors.items(name)]
    train, valid, test = _split(examples)
    shared = _shared(train, test)
    note = f"{shared} (as upstream)" if shared else ""
    facts: dict[str, Any] = {"published_metric": "prefix_match", "case_sensitive": function_vectors.about_case(name)}
    return Task(f"fv/{name}", function_vectors.FILES.source, train, valid, test, note=note, **facts)


def _benchmark(name: str, benchmark: benchmarks.Benchmark, own: str) -> Task:
    parts = benchmark.read(own)
    if len(parts) == 3:
        train, valid, test = parts.values()
        notes = [f"the official splits {', '.join(parts)}"]
    else:
        [(split, examples)] = parts.items()
        _check_number(name, examples)
        train, valid, test = _split(examples)
        notes = [f"70/9/21 of {split} (seed 32)"]
    note = "; ".join(filter(None, [*notes, benchmark.shared_context(train, test), _shared(train, test)]))
    return Task(name, benchmark.source, train, valid, test, published_metric="exact_match", note=note)


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
    return _from_items(name, content, str(path), seed, {"source": str(path), **options})


def _shared(train: Sequence[Example], test: Sequence[Example]) -> str:
    """How many inputs stand in both; no text for none."""
    shared = len({example.input for example in train} & {example.input for example in test})
    return f"{shared} inputs of train also stand in test" if shared else ""
