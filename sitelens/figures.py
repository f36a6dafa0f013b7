"""Figures: arrays and DataFrames in, Plotly figures out, fit for a paper. Imports nothing of ours but the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sitelens.defaults import SitelensError

ALPHA_SCALE = "Viridis"  # perceptually uniform and colour-blind safe
FONT = {"family": "Arial, Helvetica, sans-serif", "size": 13, "color": "#222"}
STATIC = (".png", ".svg", ".pdf")
CELL = 17  # pixels of a heatmap cell at most


def alpha_heatmap(alpha: np.ndarray, title: str = "") -> go.Figure:
    """Head selection as layer (up) by head (across), the colour scale fixed to [0, 1].

    alpha: `[layer head]`. The hover shows layer, head and alpha.
    """
    layers, heads = alpha.shape
    heatmap = go.Heatmap(
        z=alpha, zmin=0, zmax=1, colorscale=ALPHA_SCALE, xgap=1, ygap=1,
        colorbar=_colorbar("alpha"),
        hovertemplate="layer %{y}<br>head %{x}<br>alpha %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heatmap)
    figure.update_xaxes(title="Head", **_ticks(heads))
    figure.update_yaxes(title="Layer", **_ticks(layers))
    cell = min(CELL, 900 / max(layers, heads))
    return _styled(figure, title, int(heads * cell), int(layers * cell))


def transfer_heatmap(values: pd.DataFrame, title: str = "", label: str = "Accuracy") -> go.Figure:
    """Sources (down) by targets (across), the colour scale fixed to [0, 1]; the hover shows the numbers.

    values: a frame of shares, its index the source tasks, its columns the target tasks.
    """
    sources, targets = [str(name) for name in values.index], [str(name) for name in values.columns]
    heatmap = go.Heatmap(
        z=values.to_numpy(float), x=targets, y=sources, zmin=0, zmax=1, colorscale=ALPHA_SCALE, xgap=1, ygap=1,
        colorbar=_colorbar(label),
        hovertemplate=f"heads of %{{y}}<br>on %{{x}}<br>{label.lower()} %{{z:.3f}}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heatmap)
    figure.update_xaxes(title="Target task", tickangle=-45, automargin=True, showgrid=False, tickmode="linear")
    figure.update_yaxes(title="Source task", autorange="reversed", automargin=True, showgrid=False, tickmode="linear")
    cell = min(36, max(14, 900 / max(len(sources), len(targets))))
    return _styled(figure, title, max(120, int(len(targets) * cell)), max(120, int(len(sources) * cell)))


def save(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as .html (plotly.js once per directory), .png, .svg or .pdf. Returns the path.

    Raises:
        SitelensError: for another ending, or when Chrome, which draws the static formats, is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        figure.write_html(path, include_plotlyjs="directory")
        return path
    if path.suffix not in STATIC:
        raise SitelensError(f"cannot write {path.name}: end it in .html, {', '.join(STATIC)}")
    try:
        figure.write_image(path, scale=2 if path.suffix == ".png" else 1)
    except Exception as error:  # kaleido and choreographer each raise their own kinds
        if "chrome" not in f"{type(error).__name__} {error}".lower():
            raise
        raise SitelensError(
            f"{path.name} needs Chrome or Chromium, which was not found: install it (for example `apt-get install "
            "chromium`, or `plotly_get_chrome`), or write .html instead"
        ) from error
    return path


def _ticks(count: int) -> dict[str, Any]:
    """Whole numbers only, few enough to be read."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if count / step <= 16 or step == 100)
    return {"tickvals": list(range(0, count, step)), "range": [-0.5, count - 0.5], "showgrid": False, "zeroline": False}


def _colorbar(label: str) -> dict[str, Any]:
    return {"title": {"text": label}, "thickness": 14, "tickvals": [0, 0.25, 0.5, 0.75, 1]}


def _styled(figure: go.Figure, title: str, width: int, height: int) -> go.Figure:
    """The common look; `width` and `height` are those of the plot without margins, in pixels."""
    margin = {"l": 70, "r": 110, "t": 70, "b": 60}
    figure.update_layout(
        template="plotly_white", font=FONT, margin=margin,
        width=width + margin["l"] + margin["r"], height=height + margin["t"] + margin["b"],
        title={"text": title, "x": 0.5, "xanchor": "center", "font": {"size": 15}},
    )  # fmt: skip
    return figure
