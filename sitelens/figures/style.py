"""The look of every figure: one Plotly template fit for a paper, two widths, and how figures are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from sitelens.defaults import SitelensError

SINGLE, DOUBLE = 336, 692  # pixels: 89 and 183 mm, a journal's one and two columns at 96 pixels an inch
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")  # Okabe and Ito's
DASHES = ("solid", "dash", "dot", "dashdot")
SEQUENTIAL = "Viridis"  # perceptually uniform, and safe for the colour-blind
DIVERGING = "RdBu_r"  # likewise safe
STATIC = (".png", ".svg", ".pdf")
PNG_SCALE = 3  # 288 pixels an inch
TEMPLATE = "sitelens"


def _template() -> go.layout.Template:
    axis: dict[str, Any] = {
        "showline": True, "linecolor": "#444", "linewidth": 1, "ticks": "outside", "ticklen": 3, "tickcolor": "#444",
        "gridcolor": "#e8e8e8", "zeroline": False, "automargin": True, "title": {"standoff": 6, "font": {"size": 11}},
    }  # fmt: skip
    return go.layout.Template(layout={
        "font": {"family": "Arial, Helvetica, sans-serif", "size": 11, "color": "#222"},
        "title": {"x": 0.5, "xanchor": "center", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 9},
                  "font": {"size": 12}},
        "colorway": COLOURS, "paper_bgcolor": "white", "plot_bgcolor": "white", "xaxis": axis, "yaxis": axis,
        "legend": {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0, "yanchor": "bottom", "yref": "container",
                   "font": {"size": 10}, "title": {"font": {"size": 10}}},
        "margin": {"l": 48, "r": 14, "t": 34, "b": 44},
        "annotationdefaults": {"font": {"size": 11}},
        "hoverlabel": {"font": {"size": 11}},
    })  # fmt: skip


pio.templates[TEMPLATE] = _template()


def styled(figure: go.Figure, title: str, width: float, height: float, **layout: Any) -> go.Figure:
    """The common look at a size in pixels; a title takes room above the plot, and none does not."""
    top = 16 + 17 * (title.count("<br>") + 1) if title else 14
    layout = {"margin": {"l": 48, "r": 14, "t": top, "b": 44}} | layout
    figure.update_layout(template=TEMPLATE, title={"text": title}, width=round(width), height=round(height), **layout)
    return figure


def colourbar(label: str, **more: Any) -> dict[str, Any]:
    """A slim colour bar, its title along its side."""
    return {"title": {"text": label, "side": "right", "font": {"size": 11}}, "thickness": 10, "outlinewidth": 0} | more


def save(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as .html (plotly.js once per directory), .png (288 dpi), .svg or .pdf. Returns the path.

    Raises:
        SitelensError: for another ending, or when Chrome, which draws the static formats, is not there.
    """
    path = Path(path)
    if path.suffix not in (".html", *STATIC):
        raise SitelensError(f"cannot write {path.name}: end it in .html, {', '.join(STATIC)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        figure.write_html(path, include_plotlyjs="directory", div_id=path.stem)
        return path
    try:
        figure.write_image(path, scale=PNG_SCALE if path.suffix == ".png" else 1)
    except Exception as error:  # kaleido and choreographer each raise their own kinds
        if "chrome" not in f"{type(error).__name__} {error}".lower():
            raise
        raise SitelensError(
            f"{path.name} needs Chrome or Chromium, which was not found: install it (for example `apt-get install "
            "chromium`, or `plotly_get_chrome`), or write .html instead"
        ) from error
    return path
