"""Summaries: scores of `evaluate` in, means with 95% intervals and paired differences out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sitelens.defaults import SitelensError
from sitelens.escaping import markdown_text

ECHO = "echo"
RESAMPLES = 2000  # of every bootstrap


def summarize(
    scores: pd.DataFrame, *, by: Sequence[str] = ("task", "condition", "metric"), against: str | None = None
) -> pd.DataFrame:
    """Mean score and 95% interval of every group of `evaluate`'s rows.

    Columns: those of `by`, mean, low, high (shares), n (rows), interval. "wilson": one task, each item once.
    "items": one task, items repeated over seeds or draws; bootstrap by item. "tasks": several tasks; their means'
    mean, stratified bootstrap (items within each task). With `against`, the name of a condition: also difference,
    difference_low and difference_high, from a bootstrap of the same items under both.

    Raises:
        SitelensError: if there are no rows, a column is missing, or no condition is called `against`.
    """
    missing = {*by, "score", "item", "task"} - set(scores.columns)
    if missing or scores.empty:
        raise SitelensError(
            f"nothing to summarize: {'no column ' + ', '.join(sorted(missing)) if missing else 'no rows'}"
        )
    if against is not None and ("condition" not in by or against not in set(scores["condition"])):
        raise SitelensError(f"no condition {against!r} to compare with, or 'condition' is not in by; "
                            f"there are: {', '.join(map(str, scores['condition'].unique()))}")  # fmt: skip
    rows = []
    groups = dict(list(scores.groupby(list(by), sort=False)))
    for key, group in groups.items():
        values = dict(zip(by, key, strict=True))
        mean, low, high, kind = _interval(group)
        row: dict[str, Any] = values | {"mean": mean, "low": low, "high": high, "n": len(group), "interval": kind}
        if against is not None:
            other = groups.get(tuple(against if name == "condition" else values[name] for name in by))
            if other is not None and values["condition"] not in (against, ECHO):
                row |= dict(
                    zip(("difference", "difference_low", "difference_high"), _difference(group, other), strict=True)
                )
        rows.append(row)
    return pd.DataFrame(rows)


def markdown_table(cells: pd.DataFrame) -> str:
    """Texts as a Markdown table, rows named by the index, whose name stands in the corner; missing ones are empty.

    Texts are shown as they are, whatever Markdown or HTML they hold.
    """
    lines: list[list[Any]] = [[cells.index.name or "", *cells.columns]]
    lines += [[name, *row.fillna("")] for name, row in cells.iterrows()]
    first, *rest = [f"| {' | '.join(map(markdown_text, line))} |" for line in lines]
    return "\n".join([first, f"| {' | '.join(['---'] * len(lines[0]))} |", *rest])


def _interval(group: pd.DataFrame) -> tuple[float, float, float, str]:
    tasks = [part for _, part in group.groupby("task", sort=True)]
    if len(tasks) == 1 and not tasks[0]["item"].duplicated().any():
        hits = int(group["score"].sum())
        interval = binomtest(hits, len(group)).proportion_ci(method="wilson")
        return hits / len(group), float(interval.low), float(interval.high), "wilson"
    strata = [part.groupby("item")["score"].mean().to_numpy(float) for part in tasks]
    low, high = _bootstrap(strata)
    return float(np.mean([items.mean() for items in strata])), low, high, "items" if len(tasks) == 1 else "tasks"


def _difference(group: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float]:
    """Mean difference over the (task, item)s that both have, with its interval."""
    means = [part.groupby(["task", "item"])["score"].mean() for part in (group, other)]
    paired = (means[0] - means[1]).dropna()
    if paired.empty:
        raise SitelensError("the conditions to compare were not evaluated on the same items")
    strata = [part.to_numpy(float) for _, part in paired.groupby(level="task", sort=True)]
    return float(np.mean([items.mean() for items in strata])), *_bootstrap(strata)


def _bootstrap(strata: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95% percentile interval of the mean of the strata's means, items resampled within each."""
    rng = np.random.default_rng(zlib.crc32(b"sitelens/bootstrap"))
    means = np.mean([items[rng.integers(len(items), size=(RESAMPLES, len(items)))].mean(1) for items in strata], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
