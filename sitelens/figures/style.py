"""The look of every figure: one Plotly template fit for a paper, two widths, and how figures are written."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from sitelens.defaults import SitelensError

Number = float | int
SINGLE, DOUBLE = 336, 692  # pixels: 89 and 183 mm, a journal's one and two columns at 96 pixels an inch
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")  # Okabe and Ito's
DASHES = ("solid", "dash", "dot", "dashdot")
SEQUENTIAL = "Viridis"  # perceptually uniform, and safe for the colour-blind
DIVERGING = "RdBu_r"  # likewise safe
STATIC = (".png", ".svg", ".pdf")
LETTER = 0.51  # of the font size: the mean width of a letter
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
        "legend": {"orientation": "h", "x": 0.5, "xanchor": "center", "xref": "container", "y": 0, "yanchor": "bottom",
                   "yref": "container", "tracegroupgap": 0, "font": {"size": 10}, "title": {"font": {"size": 10}}},
        "margin": {"l": 48, "r": 14, "t": 34, "b": 44},
        "annotationdefaults": {"font": {"size": 11}},
        "hoverlabel": {"font": {"size": 11}},
    })  # fmt: skip


pio.templates[TEMPLATE] = _template()


def styled(figure: go.Figure, title: str, width: Number, plot: Number, above: Number = 0, **layout: Any) -> go.Figure:
    """The common look; pixels of the whole width, of the plot's height, and above the plot beside the title's own."""
    title = wrapped(title, width - 10, 12)
    more = title.count("<br>")  # Plotly lifts a title by some pixels for each line after its first
    top = above + (33 + 17 * more if title else 14)
    margin = {"l": 48, "r": 14, "b": 44} | layout.pop("margin", {}) | {"t": top}
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "pad": {"t": 9 + 6 * more}}, width=round(width),
        height=round(top + plot + margin["b"]), margin=margin, **layout,
    )  # fmt: skip
    return figure


def text_width(texts: Collection[Any], size: Number = 11) -> float:
    """Pixels of the longest of some texts."""
    return max((len(str(text)) for text in texts), default=0) * LETTER * size


def wrapped(text: str, room: Number, size: Number = 11) -> str:
    """A text broken into lines that are at most `room` pixels wide."""
    letters = max(12, int(room / (LETTER * size)))
    return "<br>".join(line for part in text.split("<br>") for line in textwrap.wrap(part, letters))


def legend_height(names: Collection[Any], width: Number) -> int:
    """Pixels that a legend takes below a plot of some width, which Plotly keeps it to."""
    in_a_line = max(1, int(width // (text_width(names, 10) + 48)))
    return 20 * math.ceil(len(names) / in_a_line)


def colourbar(label: str, **more: Any) -> dict[str, Any]:
    """A slim colour bar, its title along its side."""
    return {"title": {"text": label, "side": "right", "font": {"size": 11}}, "thickness": 10, "outlinewidth": 0} | more


def show_static_too() -> bool:
    """In a notebook, show a PNG with every figure from here on, so that it is seen where no script runs.

    Returns whether Chrome is there to draw them; without it figures stay interactive only.
    """
    pio.renderers["png"].scale = 2  # type: ignore[index]
    try:
        go.Figure().to_image("png", width=10, height=10)
    except Exception:  # whatever kaleido and choreographer raise: there is nothing to draw with
        pio.renderers.default = "plotly_mimetype"
        return False
    pio.renderers.default = "plotly_mimetype+png"
    return True


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
