"""Summaries of the scores of `evaluate`: means with 95% intervals, and paired differences."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.evaluation.intervals import (
    Strata,
    difference_over_items,
    difference_over_tasks,
    mean_over_items,
    mean_over_tasks,
)

ECHO = "echo"
REPEATS = ("seed", "prompt_seed", "training_seed", "draw")  # columns that distinguish repeated answers to an item


def summarize(
    scores: pd.DataFrame, *, by: Sequence[str] = ("task", "condition", "metric"), against: str | None = None
) -> pd.DataFrame:
    """Mean score with 95% intervals, one row per group. Tasks have equal weight, and so have items within a task.

    `sitelens.evaluation.intervals` documents how the intervals are computed, and their simulated coverage.

    Args:
        scores: rows of `evaluate`. Repeated answers to an item are distinguished by the columns seed, prompt_seed,
            training_seed and draw, else by their order.
        by: columns that define the groups.
        against: name of a condition to compare every other condition with, on the same items.

    Returns:
        A frame with the columns of `by`; mean, low and high (shares from 0 to 1); n (number of rows); and interval,
        which says what low and high range over:

        - "wilson": items of one task, each answered once (Wilson's interval);
        - "items": items of these tasks;
        - "items and seeds" (or draws, training seeds, repeats): items of these tasks, and seeds. With a single seed, an
          interval does not cover differences between seeds.

        Groups of several tasks also have tasks_low and tasks_high: over tasks like these, with their items and seeds.
        With `against` there are also difference, difference_low and difference_high (and difference_tasks_low,
        difference_tasks_high), over the items answered under both conditions; they are empty for `against` itself and
        for the echo.

    Raises:
        SitelensError: if there are no rows, a column is missing or given twice, a score is missing or outside [0, 1],
            rows of several metrics or models would be mixed, there is no condition `against`, or no items are shared
            with it.

    Warns:
        SitelensWarning: for rows that are exact copies (counted once), and for items left out of a difference.

    Example:
        >>> scores = sl.evaluate(task, {"zero-shot": sl.ZeroShot(), "2-shot": sl.FewShot(2)}, model, n_items=4)
        >>> sl.summarize(scores)[["condition", "n", "interval"]].values.tolist()
        [['zero-shot', 4, 'wilson'], ['2-shot', 4, 'wilson']]
    """
    columns = _checked_columns(scores, by, against)
    answers = _without_copies(scores.assign(score=_checked_scores(scores)))
    groups = {_key(key): group for key, group in answers.groupby(columns, sort=False, dropna=False, observed=True)}
    for column in {"metric", "model"} & set(answers.columns) - set(columns):
        for group in groups.values():
            if group[column].nunique() > 1:
                names = ", ".join(map(str, group[column].unique()))
                raise SitelensError(f"rows of several {column}s ({names}) have no mean in common: add {column!r} to "
                                    f"by, or choose the rows of one {column}")  # fmt: skip
    tables = {key: _Answers.of(group) for key, group in groups.items()}
    rows = []
    for key, table in tables.items():
        values = dict(zip(columns, key, strict=True))
        row = values | _mean(table) | {"n": len(groups[key]), "interval": table.interval}
        row |= {name: row.pop(name) for name in ("tasks_low", "tasks_high") if name in row}
        if against is not None and values["condition"] not in (against, ECHO):
            other = tables.get(tuple(against if name == "condition" else value for name, value in values.items()))
            if other is not None:
                row |= _difference(table, other, f"{values['condition']} against {against}")
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Answers:
    """A group's scores: items (index: task, item) by repeats (columns), NaN if an item has no answer.

    names: what distinguishes repeats of an item, in the plural ("seeds").
    """

    scores: pd.DataFrame
    names: tuple[str, ...]

    @staticmethod
    def of(group: pd.DataFrame) -> _Answers:
        names = [name for name in REPEATS if name in group and group[name].nunique(dropna=False) > 1]
        rows = group[["task", "item", "score"]].assign(repeat="")
        for name in names:
            rows["repeat"] += group[name].map(_label) + "/"
        order = rows.groupby(["task", "item", "repeat"], observed=True).cumcount()
        if order.any():
            names.append("repeat")
            rows["repeat"] += order.astype(str)
        table = rows.set_index(["task", "item", "repeat"])["score"].unstack("repeat")
        return _Answers(table, tuple(f"{name.replace('_', ' ')}s" for name in names))

    @property
    def tasks(self) -> int:
        return self.scores.index.get_level_values("task").nunique()

    @property
    def interval(self) -> str:
        """What the interval over items ranges over, in words."""
        if self.scores.shape[1] == 1:
            return "wilson" if self.tasks == 1 else "items"
        several = self.scores.notna().groupby(level="task", observed=True).any().sum(axis=1) > 1
        if not several.any():
            return "items"
        return " and ".join(filter(None, [", ".join(["items", *self.names[:-1]]), self.names[-1]]))

    @property
    def strata(self) -> Strata:
        index, values = self.scores.index, self.scores.to_numpy(float)
        task, _ = pd.factorize(index.get_level_values("task"))
        place = pd.Series(task).groupby(task).cumcount().to_numpy()
        table = np.full((task.max() + 1, place.max() + 1, values.shape[1]), np.nan)
        table[task, place] = values
        return Strata.of(table)


def _mean(answers: _Answers) -> dict[str, float]:
    strata = answers.strata
    mean, low, high = map(float, mean_over_items(strata))
    row = {"mean": mean, "low": low, "high": high}
    if answers.tasks > 1:
        _, row["tasks_low"], row["tasks_high"] = map(float, mean_over_tasks(strata))
    return row


def _difference(a: _Answers, b: _Answers, what: str) -> dict[str, float]:
    """The mean of a - b over the items that both have, with its intervals; `what` names the comparison in warnings."""
    index = a.scores.index.intersection(b.scores.index)
    alone = len(a.scores) + len(b.scores) - 2 * len(index)
    if index.empty:
        raise SitelensError("the conditions to compare were not evaluated on the same items")
    if alone:
        warnings.warn(f"{what}: {alone} items were answered under one of the two conditions only, and are left out of "
                      f"the difference; {len(index)} are in it", SitelensWarning, stacklevel=3)  # fmt: skip
    left, right = a.scores.loc[index], b.scores.loc[index]
    if set(left.columns) == set(right.columns):
        both = left.notna() & right[left.columns].notna()
        paired = bool((both.any(axis=1)).all())
        values = left - right[left.columns]
    else:
        paired = left.shape[1] == 1 or right.shape[1] == 1
        values = left.sub(right.iloc[:, 0], axis=0) if right.shape[1] == 1 else -right.sub(left.iloc[:, 0], axis=0)
    if paired:
        strata = _Answers(values, a.names).strata
    else:  # different seeds on the two sides
        means = (left.mean(axis=1) - right.mean(axis=1)).to_frame()
        sides = _Answers(left, a.names).strata, _Answers(right, b.names).strata
        strata = _Answers(means, ()).strata.with_repeats_of(*sides)
    mean, low, high = map(float, difference_over_items(strata))
    row = {"difference": mean, "difference_low": low, "difference_high": high}
    if index.get_level_values("task").nunique() > 1:
        _, row["difference_tasks_low"], row["difference_tasks_high"] = map(float, difference_over_tasks(strata))
    return row


def _checked_columns(scores: pd.DataFrame, by: Sequence[str], against: str | None) -> list[str]:
    if not isinstance(scores, pd.DataFrame):
        raise SitelensError(f"scores must be a DataFrame as evaluate returns it, not {type(scores).__name__}")
    if isinstance(by, str):
        raise SitelensError(f"by must be a list of column names: write ({by!r},)")
    columns = list(by)
    twice = [name for name in dict.fromkeys(columns) if columns.count(name) > 1]
    twice += [name for name in dict.fromkeys(scores.columns) if list(scores.columns).count(name) > 1]
    if twice:
        raise SitelensError(f"the column {twice[0]!r} is given twice")
    if not columns:
        raise SitelensError("by must name a column at least, for example ('task', 'condition')")
    missing = {*columns, "score", "item", "task"} - set(scores.columns)
    if missing or scores.empty:
        named = f"no column {', '.join(sorted(map(str, missing)))}; there are: {', '.join(map(str, scores.columns))}"
        raise SitelensError(f"nothing to summarize: {named if missing else 'no rows'}")
    if against is not None and ("condition" not in columns or against not in set(scores["condition"])):
        there = scores["condition"].unique() if "condition" in scores else []
        raise SitelensError(f"no condition {against!r} to compare with, or 'condition' is not in by; "
                            f"there are: {', '.join(map(str, there))}")  # fmt: skip
    return columns


def _checked_scores(scores: pd.DataFrame) -> pd.Series:
    values = pd.to_numeric(scores["score"], errors="coerce").astype(float)
    wrong = ~values.between(0, 1) | scores["task"].isna() | scores["item"].isna()
    if wrong.any():
        row = scores[wrong].iloc[0]
        raise SitelensError(f"every row needs a task, an item and a score from 0 to 1; {wrong.sum()} lack one; first "
                            f"task {row['task']!r}, item {row['item']}, score {row['score']}")  # fmt: skip
    return values


def _without_copies(scores: pd.DataFrame) -> pd.DataFrame:
    """Each row once. Without the column logprob, rows of an item can be equal by chance, so all are kept."""
    if "logprob" not in scores:
        return scores
    copies = scores.astype({name: str for name in scores.columns if scores[name].dtype == object}).duplicated()
    if copies.any():
        warnings.warn(f"{copies.sum()} rows are exact copies of others (the same scores twice in one table?), and are "
                      "counted once", SitelensWarning, stacklevel=3)  # fmt: skip
    return scores[~copies]


def _key(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A group's key with None for NaN, which would not equal itself."""
    return tuple(None if pd.isna(value) else value for value in key)


def _label(value: Any) -> str:
    """A seed as text, independent of the number type of its column."""
    if pd.isna(value):
        return "-"
    return f"{value:g}" if isinstance(value, int | float | np.number) and abs(value) < 1e6 else str(value)
