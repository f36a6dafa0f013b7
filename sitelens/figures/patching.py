"""Figures of the studies of patching (`sitelens.studies.patching`), each named like its study."""

from __future__ import annotations

import pandas as pd

from sitelens.figures.charts import dots, lines
from sitelens.figures.style import (
    Figure,
    accuracy_label,
)

ACCURACY = accuracy_label("first_token")


def soft_hard(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of hard selections against the threshold, and of the soft selection (dashed).

    Args:
        frame: of `sl.studies.soft_hard`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "threshold": [0.2, 0.5], "mean": [0.8, 0.9],
        ...                       "low": 0.7, "high": 1.0, "soft": 0.85})
        >>> [line.name for line in sl.figures.soft_hard(frame).data if line.name]
        ['hard', 'soft']
    """
    hard = frame[["task", "threshold", "mean", "low", "high"]].assign(selection="hard")
    soft = frame[["task", "threshold", "soft"]].rename(columns={"soft": "mean"}).assign(selection="soft")
    labels = {"threshold": "Threshold on alpha", "mean": ACCURACY}
    return lines(pd.concat([hard, soft]), "threshold", color="selection", dash="selection", facet="task",
                 labels=labels, title=title)  # fmt: skip


def random_heads(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy against the number of heads: mean and range of the random draws, and high-alpha heads.

    Args:
        frame: of `sl.studies.random_heads`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "heads": ["random", "random", "high-alpha"], "k": 10,
        ...                       "draw": [0, 1, 0], "mean": [0.1, 0.3, 0.6]})
        >>> [line.name for line in sl.figures.random_heads(frame).data if line.name]
        ['random (mean and range of 2 draws)', 'high-alpha']
    """
    ranged = frame.groupby(["task", "heads", "k"], sort=False)["mean"].agg(["mean", "min", "max"]).reset_index()
    ranged = ranged.rename(columns={"min": "low", "max": "high"})
    draws = frame.groupby("heads")["draw"].nunique().max()
    named = {"random": f"random (mean and range of {draws} draws)", "high-alpha": "high-alpha"}
    labels = {"k": "Number of heads patched", "mean": ACCURACY}
    return lines(ranged.assign(heads=ranged["heads"].map(named)), "k", color="heads", facet="task", labels=labels,
                 title=title, interval="range")  # fmt: skip


def head_counts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy against the number of heads added or removed, from the highest alpha down or from the lowest up.

    Args:
        frame: of `sl.studies.head_counts`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "order": "high-alpha", "change": "added", "k": [0, 10],
        ...                       "mean": [0.0, 0.4]})
        >>> sl.figures.head_counts(frame).data[0].name
        'high-alpha first, added'
    """
    named = frame.assign(order=frame["order"] + " first")
    labels = {"k": "Number of heads added or removed", "mean": ACCURACY}
    return lines(named, "k", color="order", dash="change", facet="task", labels=labels, title=title, markers=False)


def task_agnostic(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of each task under its own, the shared and the mean alpha, and under prompting.

    Args:
        frame: of `sl.studies.task_agnostic`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "condition": ["own alpha", "shared alpha"], "mean": [0.9, 0.8]})
        >>> [dot.name for dot in sl.figures.task_agnostic(frame).data]
        ['own alpha', 'shared alpha']
    """
    return dots(frame, labels={"mean": ACCURACY}, title=title)


def mixing(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy under convex and additive mixing, soft and hard.

    Args:
        frame: of `sl.studies.mixing`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "mixing": "convex", "hard": [False, True], "mean": [0.8, 0.9]})
        >>> [dot.name for dot in sl.figures.mixing(frame).data]
        ['convex, soft', 'convex, hard']
    """
    kind = frame["mixing"] + frame["hard"].map({True: ", hard", False: ", soft"})
    return dots(frame.assign(kind=kind), color="kind", labels={"mean": ACCURACY}, title=title)
