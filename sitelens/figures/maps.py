"""Heatmaps: alpha by layer and head, transfer and similarity between tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.cluster.hierarchy import dendrogram

from sitelens.figures.style import (
    COLORS,
    DIVERGING,
    DOUBLE,
    SEQUENTIAL,
    Figure,
    Number,
    colorbar,
    legend_height,
    styled,
    text_width,
)
from sitelens.files.escaping import figure_text

CELL = 12  # pixels per cell in a heatmap of heads
TREE = 60  # height of a dendrogram in pixels


def alpha_heatmap(alpha: np.ndarray, title: str = "") -> Figure:
    """Heatmap of alpha, layers up and heads across; the color scale is fixed to [0, 1].

    Args:
        alpha: `[layer head]`, each value in [0, 1].
        title: plain text above the figure.

    Example:
        >>> figure = sl.figures.alpha_heatmap(np.array([[0.0, 0.9], [1.0, 0.1]]), "antonym")
        >>> figure.data[0].z.shape
        (2, 2)
    """
    return head_heatmap(alpha, title, "alpha", 0, 1)


def head_heatmap(
    values: np.ndarray, title: str = "", label: str = "", low: Number | None = None, high: Number | None = None
) -> Figure:
    """Heatmap of any value per head, layers up and heads across.

    Args:
        values: `[layer head]`.
        title: plain text above the figure.
        label: name of the value, on the color bar and in the hover.
        low, high: limits of the color scale. By default it spans the values, symmetric about 0 if some are negative.

    Example:
        >>> figure = sl.figures.head_heatmap(np.array([[-1.0, 0.5], [0.0, 2.0]]), label="logit")
        >>> figure.data[0].zmin, figure.data[0].zmax
        (-2.0, 2.0)
    """
    layers, heads = values.shape
    diverging = low is None and float(values.min()) < 0
    if diverging:
        high = float(np.abs(values).max())
        low = -high
    heatmap = go.Heatmap(
        z=values, zmin=low, zmax=high, colorscale=DIVERGING if diverging else SEQUENTIAL, xgap=0.5, ygap=0.5,
        colorbar=colorbar(label, **({"tickvals": [0, 0.25, 0.5, 0.75, 1]} if (low, high) == (0, 1) else {})),
        hovertemplate=f"layer %{{y}}<br>head %{{x}}<br>{figure_text(label or 'value')} %{{z:.3f}}<extra></extra>",
    )  # fmt: skip
    figure = Figure(heatmap)
    figure.update_xaxes(title="Head", **_ticks(heads))
    figure.update_yaxes(title="Layer", **_ticks(layers))
    cell = min(CELL, (DOUBLE - 130) / max(layers, heads))
    return styled(figure, title, max(heads * cell + 130, 250), max(layers * cell, 60))


def transfer_heatmap(
    values: pd.DataFrame,
    title: str = "",
    label: str = "accuracy",
    *,
    groups: Mapping[str, str] | None = None,
    tree: np.ndarray | None = None,
    hover: Mapping[str, pd.DataFrame] | None = None,
    limits: tuple[Number, Number] = (0, 1),
    axes: tuple[str, str] = ("Source of the heads", "Target task"),
    between: str = "on",
) -> Figure:
    """Heatmap of a value for each pair of tasks, sources down and targets across; the numbers are in the hover.

    Args:
        values: index: source tasks; columns: target tasks.
        title: plain text above the figure.
        label: name of the value, on the color bar and in the hover.
        groups: group of each task, shown as a colored strip on the left.
        tree: a scipy linkage, drawn above; its leaves from left to right are the columns.
        hover: further frames of the same shape, by name, for the hover.
        limits: of the color scale, which diverges if they include negative values.
        axes: titles of the axes, down and across.
        between: word between the names of the two tasks in the hover.

    Example:
        >>> accuracy = pd.DataFrame([[0.9, 0.2], [0.4, 0.8]], ["antonym", "synonym"], ["antonym", "synonym"])
        >>> figure = sl.figures.transfer_heatmap(accuracy, "Transfer")
        >>> figure.layout.xaxis4.title.text
        'Target task'
    """
    sources, targets = [str(name) for name in values.index], [str(name) for name in values.columns]
    texts = [figure_text(name) for name in sources], [figure_text(name) for name in targets]
    n = len(targets)
    font = 11 if n <= 24 else 9 if n <= 40 else 7.5
    labels = text_width([*sources, *targets], font)
    cell = min(24, max(8, (DOUBLE - labels - 120) / n))
    strip = 10 if groups else 0
    details = {name: frame.to_numpy() for name, frame in (hover or {}).items()}
    extra = "".join(f"<br>{figure_text(name)} %{{customdata[{i}]:.3f}}" for i, name in enumerate(details))
    width, height = n * cell, len(sources) * cell
    figure = Figure()
    make_subplots(
        figure=figure, rows=2, cols=2, shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=3 / (width + strip + 3), vertical_spacing=4 / (height + TREE + 4),
        column_widths=[max(strip, 1), width], row_heights=[TREE if tree is not None else 1, height],
    )  # fmt: skip
    heatmap = go.Heatmap(
        z=values.to_numpy(float), zmin=limits[0], zmax=limits[1], xgap=0.5, ygap=0.5,
        colorscale=DIVERGING if limits[0] < 0 else SEQUENTIAL, colorbar=colorbar(label, len=0.8, y=0.4),
        x=list(range(n)), y=list(range(len(sources))),
        customdata=np.stack(list(details.values()), -1) if details else None,
        text=[[f"{source}<br>{figure_text(between)} {target}" for target in texts[1]] for source in texts[0]],
        hovertemplate=f"%{{text}}<br>{figure_text(label)} %{{z:.3f}}{extra}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(heatmap, 2, 2)
    if tree is not None:
        for line in _tree_lines(tree):
            figure.add_trace(line, 1, 2)
        for column in (1, 2):  # they share their range
            figure.update_yaxes(range=[0, 1.02 * float(tree[:, 2].max())], row=1, col=column)
    kinds = sorted({(groups or {}).get(name, "other") for name in sources}) if groups else []
    for i, kind in enumerate(kinds):
        indices = [index for index, name in enumerate(sources) if (groups or {}).get(name, "other") == kind]
        figure.add_trace(go.Bar(
            y=indices, x=[1] * len(indices), width=1, orientation="h", name=figure_text(kind),
            marker_color=COLORS[i % len(COLORS)], customdata=[texts[0][index] for index in indices],
            hovertemplate=f"%{{customdata}}<extra>{figure_text(kind)}</extra>",
        ), 2, 1)  # fmt: skip
    for row, column in ((1, 1), (1, 2), (2, 1)):
        figure.update_xaxes(visible=False, row=row, col=column)
    figure.update_yaxes(visible=False)
    names: dict[str, Any] = {"showgrid": False, "ticks": "", "showline": False, "tickfont": {"size": font}}
    figure.update_xaxes(title=figure_text(axes[1]), tickvals=list(range(n)), ticktext=texts[1],
                        tickangle=-90 if n > 24 else -45, range=[-0.5, n - 0.5], **names, row=2, col=2)  # fmt: skip
    side: dict[str, Any] = {
        "title": figure_text(axes[0]), "tickvals": list(range(len(sources))), "ticktext": texts[0], "visible": True,
        "showticklabels": True, "range": [len(sources) - 0.5, -0.5], **names,
    }  # fmt: skip
    figure.update_yaxes(range=side["range"], row=2, col=2)
    figure.update_yaxes(**side, row=2, col=1 if groups else 2)
    figure.update_xaxes(range=[0, 1], row=2, col=1)
    sides = {"l": labels + 34, "r": 72}
    whole = sides["l"] + strip + 3 + width + sides["r"]
    below = labels * (1 if n > 24 else 0.75) + 30 + legend_height(kinds, strip + 3 + width)
    above = TREE if tree is not None else 1
    return styled(figure, title, whole, above + height, margin={**sides, "b": below}, bargap=0)


def _tree_lines(tree: np.ndarray) -> list[go.Scatter]:
    """Lines of a dendrogram above the columns; scipy places leaf i at 10 i + 5."""
    layout = dendrogram(tree, no_plot=True)
    return [
        go.Scatter(x=[(x - 5) / 10 for x in xs], y=ys, mode="lines", line={"color": "#666", "width": 1},
                   hoverinfo="skip", showlegend=False)
        for xs, ys in zip(layout["icoord"], layout["dcoord"], strict=True)
    ]  # fmt: skip


def _ticks(count: int) -> dict[str, Any]:
    """Integer ticks, few enough to be readable."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if count / step <= 16 or step == 100)
    return {"tickvals": list(range(0, count, step)), "range": [-0.5, count - 0.5], "showgrid": False}
