"""Examples in docstrings run and show what they say; every public function has one, except a list that only shrinks.

An example starts from these names: `sl` (sitelens), `model` (a tiny random Llama of 2 layers and 4 heads per layer,
whose answers are nonsense: `tests/tiny.py`), `task` (the built-in task "country-capital"), `np` and `pd`. It runs in an
empty folder with an empty cache and should take milliseconds: a few prompts, shots and steps. `...` matches any text.
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sitelens as sl
from sitelens.tasks import SUITES
from tests import tiny

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Public names that have no example yet. Write one, and remove the name here.
MISSING: set[str] = {
    "compare",
    "echo",
    "embed_task",
    "evaluate",
    "figures.show_static_too",
    "fingerprint",
    "generate",
    "head_similarity",
    "heads.attention",
    "heads.attention_example",
    "heads.attention_roles",
    "heads.head_attribution",
    "heads.indirect_effects",
    "heads.induction_scores",
    "heads.written_tokens",
    "list_tasks",
    "load_model",
    "load_task",
    "load_tasks",
    "methods.checked_options",
    "run",
    "run_suite",
    "similarity_predicts_transfer",
    "studies.alpha_distribution",
    "studies.checkpoints",
    "studies.costs",
    "studies.head_counts",
    "studies.head_overlap",
    "studies.initialization_distances",
    "studies.initialization_runs",
    "studies.initializations",
    "studies.loss_path",
    "studies.mixing",
    "studies.prompt_counts",
    "studies.random_heads",
    "studies.seed_variance",
    "studies.shared_attention",
    "studies.soft_hard",
    "studies.task_agnostic",
    "studies.variance_components",
    "summarize",
    "train_selection",
    "train_selections",
    "transfer_matrix",
    "verify",
}


REGISTRIES = [SUITES]


def public() -> Iterator[tuple[str, Any]]:
    """Name and object of each public function and class, as a user writes it (`heads.attention`)."""
    for name in sl.__all__:
        value = getattr(sl, name)
        if inspect.ismodule(value):
            home = value.__name__
            listed = {key: getattr(value, key) for key in dir(value) if not key.startswith("_")}
            yield from (
                (f"{name}.{key}", item)
                for key, item in listed.items()
                if (inspect.isfunction(item) or inspect.isclass(item)) and item.__module__.startswith(home)
            )
        elif (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith("sitelens"):
            yield name, value


def docstrings(value: Any) -> Iterator[tuple[str, str]]:
    """Suffix and docstring of a function, or of a class and of each public member that it defines."""
    yield "", inspect.getdoc(value) or ""
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        if not key.startswith("_"):
            member = getattr(member, "__func__", member)
            yield f".{key}", (inspect.getdoc(member) or "") if callable(member) or isinstance(member, property) else ""


PUBLIC = dict(public())
EXAMPLES = {name + end: text for name, value in PUBLIC.items() for end, text in docstrings(value) if ">>> " in text}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_added", {})  # what an example registers is forgotten
    names = {"sl": sl, "model": tiny.model(), "task": sl.load_task("country-capital"), "np": np, "pd": pd}
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], names, name, None, None)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert not report, "".join(report)


def test_every_public_function_has_an_example() -> None:
    functions = {name for name, value in PUBLIC.items() if inspect.isfunction(value)}
    assert functions - EXAMPLES.keys() == MISSING
