"""The look of every figure: one Plotly template fit for a paper, two widths, texts shown as they are."""

from __future__ import annotations

import math
import shutil
import textwrap
import webbrowser
from collections.abc import Collection
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from sitelens.errors import SitelensError
from sitelens.files.escaping import figure_text, visible

Number = float | int
SINGLE, DOUBLE = 336, 692  # pixels: 89 and 183 mm, one and two columns of a journal at 96 pixels per inch
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")  # Okabe and Ito's
DASHES = ("solid", "dash", "dot", "dashdot")
SEQUENTIAL = "Viridis"  # perceptually uniform and safe for color-blind readers
DIVERGING = "RdBu_r"  # likewise safe
LETTER = 0.51  # mean width of a letter, as a share of the font size
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
        "colorway": COLORS, "paper_bgcolor": "white", "plot_bgcolor": "white", "xaxis": axis, "yaxis": axis,
        "legend": {"orientation": "h", "x": 0.5, "xanchor": "center", "xref": "container", "y": 0, "yanchor": "bottom",
                   "yref": "container", "tracegroupgap": 0, "font": {"size": 10}, "title": {"font": {"size": 10}}},
        "margin": {"l": 48, "r": 14, "t": 34, "b": 44},
        "annotationdefaults": {"font": {"size": 11}},
        "hoverlabel": {"font": {"size": 11}, "namelength": -1},
    })  # fmt: skip


pio.templates[TEMPLATE] = _template()


class Figure(go.Figure):
    """A Plotly figure whose `show` says what to do if there is no browser or notebook to show it in."""

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show the figure: in a notebook below its cell, otherwise in a browser.

        Raises:
            SitelensError: if there is no browser, or if a kernel lacks the nbformat package.
        """
        renderer = (args[0] if args else kwargs.get("renderer")) or pio.renderers.default
        try:
            if "browser" in str(renderer).split("+"):
                browser = webbrowser.get()
                if isinstance(browser, webbrowser.GenericBrowser) and shutil.which(browser.name) is None:
                    raise webbrowser.Error(browser.name)  # Plotly would wait for it for ever
            super().show(*args, **kwargs)
        except webbrowser.Error as error:
            raise SitelensError(
                "there is no browser to show the figure in: write it with sl.figures.save(figure, 'figure.html') and "
                "open that file, or use a notebook, which shows figures itself"
            ) from error
        except ValueError as error:
            if "Mime type rendering" not in str(error):
                raise
            raise SitelensError(
                "a notebook shows figures by way of the nbformat package: pip install nbformat"
            ) from error


def styled(figure: Figure, title: str, width: Number, plot: Number, above: Number = 0, **layout: Any) -> Figure:
    """A figure in the common look.

    Args:
        figure: changed in place.
        title: plain text; what follows a line break appears below the title, smaller.
        width: of the whole figure, in pixels.
        plot: height of the plot area, in pixels.
        above: extra pixels between title and plot.
        layout: further entries of the Plotly layout.
    """
    first, *further = [wrapped(line, width - 10, 12) for line in title.split("\n")]
    title = "<br>".join([first, *(f"<sub>{line}</sub>" for line in further)])
    more = title.count("<br>")  # Plotly lifts a title by some pixels for each line after its first
    top = above + (33 + 17 * more if title else 14)
    margin = {"l": 48, "r": 14, "b": 44} | layout.pop("margin", {}) | {"t": top}
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "pad": {"t": 9 + 6 * more}}, width=round(width),
        height=round(top + plot + margin["b"]), margin=margin, **layout,
    )  # fmt: skip
    return figure


def accuracy_label(metric: str) -> str:
    """Axis title of a metric's mean: "first_token" as "First-token accuracy"."""
    return f"{metric.replace('_', '-').capitalize()} accuracy"


def text_width(texts: Collection[Any], size: Number = 11) -> float:
    """Width in pixels of the longest of some texts."""
    return max((len(str(text)) for text in texts), default=0) * LETTER * size


def wrapped(text: str, room: Number, size: Number = 11) -> str:
    """A plain text for a figure, broken into lines at most `room` pixels wide."""
    letters = max(12, int(room / (LETTER * size)))
    lines = (line for part in text.split("\n") for line in textwrap.wrap(visible(part), letters))
    return "<br>".join(map(figure_text, lines))


def legend_height(names: Collection[Any], width: Number) -> int:
    """Height in pixels of a legend below a plot of some width; Plotly keeps it to that width."""
    in_a_line = max(1, int(width // (text_width(names, 10) + 48)))
    return 20 * math.ceil(len(names) / in_a_line)


def colorbar(label: str, **more: Any) -> dict[str, Any]:
    """A slim color bar with its title (plain text) along its side."""
    return {
        "title": {"text": figure_text(label), "side": "right", "font": {"size": 11}},
        "thickness": 10,
        "outlinewidth": 0,
    } | more
