"""Figures that compare methods, suites, and similarity with transfer."""

from __future__ import annotations

import math
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sitelens.figures.charts import SHARE, dots, lines, marker
from sitelens.figures.style import (
    COLORS,
    DOUBLE,
    SINGLE,
    Figure,
    accuracy_label,
    legend_height,
    styled,
)
from sitelens.files.escaping import figure_text

ACCURACY = accuracy_label("first_token")


def costs(frame: pd.DataFrame, title: str = "", quantity: Literal["seconds", "tokens"] = "seconds") -> Figure:
    """Seconds, or tokens through the model, against the number of prompts answered; both axes are logarithmic.

    Args:
        frame: of `sl.studies.costs`.
        title: plain text above the figure.
        quantity: "seconds" or "tokens".

    Example:
        >>> frame = pd.DataFrame({"method": ["10-shot", "SITE"], "prompts": 100, "seconds": [15.0, 66.0]})
        >>> [line.name for line in sl.figures.costs(frame).data]
        ['10-shot', 'SITE']
    """
    names = {"seconds": "Seconds", "tokens": "Tokens through the model"}
    labels = {"prompts": "Prompts answered", quantity: names[quantity]}
    return lines(frame, "prompts", quantity, color="method", labels=labels, title=title, share=False, log_x=True,
                 log_y=True)  # fmt: skip


def similarity_against_transfer(similarity: pd.DataFrame, transfer: pd.DataFrame, title: str = "") -> Figure:
    """Similarity of alphas (across) against transfer (up), one dot per ordered pair of different tasks.

    Args:
        similarity: tasks by tasks, of `HeadSimilarity.matrix`.
        transfer: sources by targets, of `TransferMatrix.normalized`.
        title: plain text above the figure.

    Example:
        >>> names = ["antonym", "synonym"]
        >>> similarity = pd.DataFrame([[1.0, 0.2], [0.2, 1.0]], names, names)
        >>> transfer = pd.DataFrame([[1.0, 0.5], [0.4, 1.0]], names, names)
        >>> sl.figures.similarity_against_transfer(similarity, transfer).data[0].y
        (0.5, 0.4)
    """
    names = list(transfer.index)
    cells = [(a, b) for a in names for b in names if a != b]
    figure = Figure(go.Scatter(
        x=[similarity.loc[cell] for cell in cells], y=[transfer.loc[cell] for cell in cells], mode="markers",
        marker={"color": COLORS[0], "size": 5, "opacity": 0.6},
        text=[f"{figure_text(a)}<br>on {figure_text(b)}" for a, b in cells],
        hovertemplate="%{text}<br>similarity %{x:.3f}<br>share of target's own gain %{y:.3f}<extra></extra>",
    ))  # fmt: skip
    figure.update_xaxes(title="Similarity of alpha (Pearson r)")
    figure.update_yaxes(title="Transfer (share of target's own gain)")
    return styled(figure, title, SINGLE, 210)


def comparison(frame: pd.DataFrame, title: str = "") -> Figure:
    """Mean accuracy of each method against the numbers it trains and against the tokens of fitting.

    Tokens are forward ones plus twice the backward ones. Error bars: interquartile range over tasks. Methods that train
    nothing, or need no fitting, are at the left edge; equal methods are placed side by side.

    Args:
        frame: of `sl.compare`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "method": ["10-shot", "SITE"], "accuracy": [0.7, 0.8],
        ...                       "trained": [0, 270], "forward_tokens": [0, 10_000], "backward_tokens": [0, 400]})
        >>> [dot.name for dot in sl.figures.comparison(frame).data if dot.showlegend]
        ['10-shot', 'SITE']
    """
    grouped = frame.assign(work=frame["forward_tokens"] + 2 * frame["backward_tokens"]).groupby("method", sort=False)
    means = grouped[["accuracy", "trained", "work"]].mean()
    means = means.assign(low=grouped["accuracy"].quantile(0.25), high=grouped["accuracy"].quantile(0.75))
    figure = Figure()
    make_subplots(figure=figure, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for panel, column in enumerate(("trained", "work"), start=1):
        known = means[column][means[column] > 0]
        least, most = (known.min(), known.max()) if len(known) else (1.0, 1.0)
        first = math.floor(math.log10(least)) - 1  # where nothing is shown
        at = {}
        for value in set(means[column].astype(float)):  # side by side where they are equal
            alike = list(means.index[means[column] == value])
            middle = math.log10(value) if value > 0 else first
            at |= {name: 10 ** (middle + 0.16 * (i - (len(alike) - 1) / 2)) for i, name in enumerate(alike)}
        for i, (name, row) in enumerate(means.iterrows()):
            below, above = row["accuracy"] - row["low"], row["high"] - row["accuracy"]
            figure.add_trace(go.Scatter(
                x=[at[name]], y=[row["accuracy"]], mode="markers", name=figure_text(name),
                legendgroup=figure_text(name), showlegend=panel == 1,
                marker={"color": COLORS[i % len(COLORS)], "size": 8, "symbol": marker(i)},
                error_y={"type": "data", "symmetric": False, "array": [max(above, 0)], "arrayminus": [max(below, 0)],
                         "thickness": 1, "width": 0},
                hovertemplate=f"{figure_text(name)}<br>accuracy %{{y:.3f}}<br>{column} {row[column]:,.0f}"
                "<extra></extra>",
            ), 1, panel)  # fmt: skip
        powers = range(first, math.ceil(math.log10(most)) + 1)
        figure.update_xaxes(type="log", tickvals=[10.0**p for p in powers], col=panel,
                            ticktext=["none", *(f"10<sup>{p}</sup>" for p in powers[1:])])  # fmt: skip
    figure.update_xaxes(title="Trained parameters", col=1)
    figure.update_xaxes(title="Tokens of fitting (forward + 2 backward)", col=2)
    figure.update_yaxes(title=ACCURACY, col=1)
    figure.update_yaxes(**SHARE)
    names = [str(name) for name in means.index]
    return styled(figure, title, DOUBLE, 230, margin={"l": 60, "b": 62 + legend_height(names, DOUBLE - 74)})


def suite(frame: pd.DataFrame, title: str = "") -> Figure:
    """Mean of each condition on each task of a suite, by group; tasks are sorted by the last condition.

    Args:
        frame: columns task, group, condition, metric, mean, low, high.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "fv/antonym", "group": "abstractive", "condition": ["10-shot", "SITE"],
        ...                       "metric": "first_token", "mean": [0.7, 0.8], "low": 0.6, "high": 0.9})
        >>> sl.figures.suite(frame).layout.xaxis.title.text
        'First-token accuracy'
    """
    label = accuracy_label(str(frame["metric"].iloc[0]))
    conditions = list(dict.fromkeys(frame["condition"]))
    last = frame[frame["condition"] == conditions[-1]].set_index("task")["mean"]  # it may have failed on some tasks
    tasks = frame[["task", "group"]].drop_duplicates()
    order = tasks.assign(mean=tasks["task"].map(last)).sort_values(["group", "mean"], ascending=[True, False])
    position = {task: i for i, task in enumerate(order["task"])}
    key = {"task": position.__getitem__, "condition": conditions.index}
    ordered = frame.sort_values(["task", "condition"], key=lambda column: column.map(key[str(column.name)]))
    figure = dots(ordered, labels={"mean": label}, title=title)
    starts = order["group"].ne(order["group"].shift()).to_numpy().nonzero()[0]
    if len(starts) > 1:
        for start in starts:
            figure.add_hline(start - 0.5, line={"color": "#888", "width": 1})
            figure.add_annotation(
                x=1, xref="paper", xanchor="left", xshift=4, y=start - 0.4, yanchor="top", textangle=90,
                text=figure_text(order["group"].iloc[start]), showarrow=False, font={"size": 10, "color": "#555"},
            )  # fmt: skip
    return figure
