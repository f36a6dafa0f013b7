"""Examples in docstrings run and give the output they show; every public function has an example.

An example starts from these names: `sl` (sitelens), `model` (a tiny random Llama of 2 layers and 4 heads per layer,
whose answers are meaningless: `tests/tiny.py`), `task` (the built-in task "country-capital"), `embedding` and `alpha`
(its task embedding and head selection), `config` (a TrainConfig of 4 steps), `np` and `pd`. It runs in an empty folder;
all examples share one cache. It should take milliseconds: a few prompts, shots and steps. `...` matches any text.
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
# Public functions without an example; this must stay empty.
MISSING: set[str] = set()


REGISTRIES = [SUITES, sl.METRICS, sl.STUDIES]


def public() -> Iterator[tuple[str, Any]]:
    """Name and object of each public function and class, with the name as users write it (`heads.attention`)."""
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
    """Suffix and docstring of a function, or of a class and each of its public members."""
    yield "", inspect.getdoc(value) or ""
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        if not key.startswith("_"):
            member = getattr(member, "__func__", member)
            yield f".{key}", (inspect.getdoc(member) or "") if callable(member) or isinstance(member, property) else ""


PUBLIC = dict(public())
EXAMPLES = {name + end: text for name, value in PUBLIC.items() for end, text in docstrings(value) if ">>> " in text}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache shared by all examples."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def names(cache: Path) -> dict[str, Any]:
    """The names that every example starts from."""
    model, task, config = tiny.model(), sl.load_task("country-capital"), tiny.CONFIG
    with sl.settings.using(cache_dir=cache, progress=False):
        embedding = sl.embed_task(task, model, n_prompts=4, n_shots=2)
        alpha = sl.train_selection(task, model, embedding=embedding, config=config).selection
    return {"sl": sl, "np": np, "pd": pd, "model": model, "task": task, "config": config, "embedding": embedding,
            "alpha": alpha}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_shows(
    name: str, names: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_added", {})  # what an example registers is forgotten
    report: list[str] = []
    with sl.settings.using(cache_dir=cache):
        example = doctest.DocTestParser().get_doctest(EXAMPLES[name], dict(names), name, None, None)
        doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert not report, "".join(report)


def test_every_public_function_has_an_example() -> None:
    functions = {name for name, value in PUBLIC.items() if inspect.isfunction(value)}
    assert functions - EXAMPLES.keys() == MISSING
