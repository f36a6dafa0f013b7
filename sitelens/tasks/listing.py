"""Which tasks there are: names, suites, kinds and groups, without reading any items that would be downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pandas as pd

from sitelens.errors import SitelensError
from sitelens.suggestions import did_you_mean
from sitelens.tasks import benchmarks, builtin, function_vectors

SUITES: dict[str, Callable[[], list[str]]] = {
    "builtin": builtin.names,
    "fv57": function_vectors.names,
    **{suite: partial(benchmarks.names, suite) for suite in benchmarks.BENCHMARKS},
}


def task_names() -> list[str]:
    """All names that `load_task` knows."""
    return [name for names in SUITES.values() for name in names()]


def suite_names(suite: str) -> list[str]:
    """The names of a suite's tasks: "builtin", "fv57" (Todd et al.), "anli", "mmlu-pro" or "bbh".

    Raises:
        SitelensError: for another suite, with the known ones and the nearest of them.
    """
    if suite not in SUITES:
        hint = did_you_mean(suite, SUITES, n=1)
        raise SitelensError(f"unknown suite {suite!r}{hint and f' ({hint})'}; there are: {', '.join(SUITES)}")
    return SUITES[suite]()


def list_tasks() -> pd.DataFrame:
    """One row a task: name, kind (as `group_of`), items (missing if not known beforehand), source, description."""
    frame = pd.DataFrame(map(_row, task_names()), columns=["name", "kind", "items", "source", "description"])
    return frame.astype({"items": "Int64"})


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """ "extractive" or "abstractive" for every named task of which that is known."""
    registry = function_vectors.registry()
    kinds = {name: builtin.kind(name) for name in names if name in builtin.names()}
    upstream = {name: name.removeprefix("fv/") for name in names if name.startswith("fv/")}
    return kinds | {name: registry[own]["category"] for name, own in upstream.items() if own in registry}


def group_of(name: str) -> str:
    """What a table of results counts a task to.

    The kind of a built-in or Function Vectors task ("extractive", "abstractive"), else the benchmark ("ANLI",
    "MMLU-Pro", "BBH"); "own" for a task that is none of this library's.
    """
    found = benchmarks.find(name)
    return found[0].title if found else kinds_of([name]).get(name, "own")


def _row(name: str) -> tuple[str, str, int | None, str, str]:
    kind = group_of(name)
    if found := benchmarks.find(name):
        benchmark, own = found
        return name, kind, benchmark.tasks()[own], benchmark.source, benchmark.description
    if name.startswith("fv/"):
        items = function_vectors.registry()[name.removeprefix("fv/")]["examples"]
        return name, kind, items, function_vectors.FILES.source, "Todd et al. 2024"
    return name, kind, len(builtin.pairs(name)), "built in", builtin.describe(name)
