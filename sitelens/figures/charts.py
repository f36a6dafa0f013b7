"""Charts of tidy frames: lines with intervals, dots with intervals, histograms; one panel a facet where wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sitelens.figures.style import COLOURS, DASHES, DOUBLE, SINGLE, styled

SHARE: dict[str, Any] = {"range": [-0.03, 1.03], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
PANEL = 150  # pixels of a panel's height
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str = "mean",
    *,
    colour: str | None = None,
    dash: str | None = None,
    facet: str | None = None,
    labels: Mapping[str, str] | None = None,
    title: str = "",
    share: bool = True,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
) -> go.Figure:
    """y against x, a line for each value of `colour` and `dash`, a panel for each of `facet`.

    Columns `low` and `high`, where the frame has them, are drawn as a band. `share` fixes y to [0, 1]. `labels`
    names columns on axes and in the legend.
    """
    named = {x: x, y: y, **(labels or {})}
    panels = _panels(frame, facet)
    figure, columns, rows = _grid(list(panels), facet, named[x], named[y])
    colours = _values(frame, colour)
    dashes = _values(frame, dash)
    for place, panel in enumerate(panels.values()):
        row, column = divmod(place, columns)
        for c, d, part in _series(panel, colour, dash):
            part = part.sort_values(x)
            ink, name = COLOURS[colours.index(c) % len(COLOURS)], _name(c, d)
            if {"low", "high"} <= set(part.columns) and part["low"].notna().any():
                band = go.Scatter(
                    x=[*part[x], *part[x][::-1]], y=[*part["high"], *part["low"][::-1]], fill="toself", mode="lines",
                    line={"width": 0}, fillcolor=_faint(ink), hoverinfo="skip", showlegend=False, legendgroup=name,
                )  # fmt: skip
                figure.add_trace(band, row + 1, column + 1)
            interval = "<br>95% interval %{customdata[0]:.3f} to %{customdata[1]:.3f}"
            has_band = {"low", "high"} <= set(part.columns)
            line = go.Scatter(
                x=part[x], y=part[y], mode="lines+markers" if markers else "lines", name=name, legendgroup=name,
                showlegend=place == 0 and bool(name),
                line={"color": ink, "width": 1.5, "dash": DASHES[dashes.index(d) % len(DASHES)]},
                marker={"size": 5, "symbol": SYMBOLS[colours.index(c) % len(SYMBOLS)]},
                customdata=part[["low", "high"]] if has_band else None,
                hovertemplate=f"{name}<br>{named[x]} %{{x}}<br>{named[y]} %{{y:.3f}}"
                + (interval if has_band else "") + "<extra></extra>",
            )  # fmt: skip
            figure.add_trace(line, row + 1, column + 1)
    if log_x:
        values = sorted(set(frame[x]))
        shown = [value for value in values if value > 0][:: max(1, math.ceil(len(values) / 8))]
        figure.update_xaxes(type="log", tickvals=shown, ticktext=[f"{value:g}" for value in shown])
    axis: dict[str, Any] = SHARE if share else {"type": "log"} if log_y else {}
    figure.update_yaxes(**axis)
    keys = len(colours) * len(dashes) if colour or dash else 0
    return _finished(figure, title, rows, columns, keys, max(map(len, map(str, colours)), default=0))


def dots(
    frame: pd.DataFrame,
    x: str = "mean",
    *,
    y: str = "task",
    colour: str = "condition",
    labels: Mapping[str, str] | None = None,
    title: str = "",
    share: bool = True,
    reference: float | None = None,
) -> go.Figure:
    """x for each y (one a line, from the top), a dot for each value of `colour`, with its interval.

    Columns `low` and `high`, where the frame has them, are the interval; `reference` is a dashed line across.
    """
    named = {x: x, **(labels or {})}
    names, colours = _values(frame, y), _values(frame, colour)
    room = min(11.0, 120 / len(colours))  # pixels between the dots of one line
    pitch = max(16.0, room * (len(colours) + 0.6))
    figure = go.Figure()
    for i, value in enumerate(colours):
        part = frame[frame[colour] == value]
        offset = (i - (len(colours) - 1) / 2) * room / pitch
        known = {"low", "high"} <= set(part.columns)
        figure.add_trace(go.Scatter(
            x=part[x], y=[names.index(name) + offset for name in part[y]], mode="markers", name=str(value),
            marker={"color": COLOURS[i % len(COLOURS)], "size": 6, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            error_x={"type": "data", "symmetric": False, "array": part["high"] - part[x], "thickness": 1, "width": 0,
                     "arrayminus": part[x] - part["low"]} if known else None,
            customdata=part[[y, *(["low", "high"] if known else [])]],
            hovertemplate=f"%{{customdata[0]}}, {value}<br>{named[x]} %{{x:.3f}}"
            + ("<br>95% interval %{customdata[1]:.3f} to %{customdata[2]:.3f}" if known else "") + "<extra></extra>",
        ))  # fmt: skip
    if reference is not None:
        figure.add_vline(reference, line={"color": "#888", "width": 1, "dash": "dash"})
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5],
                        gridcolor="#f2f2f2")  # fmt: skip
    figure.update_xaxes(title=named[x], **SHARE if share else {})
    labels_width = max(len(str(name)) for name in names) * 5.8 + 16
    legend = _legend(len(colours), max(len(str(c)) for c in colours), SINGLE + 60) if len(colours) > 1 else 0
    figure.update_layout(showlegend=len(colours) > 1)
    top = 14 + 17 * (title.count("<br>") + 1) if title else 14
    margin = {"l": labels_width, "r": 14, "t": top, "b": 46 + legend}
    height = len(names) * pitch + margin["t"] + margin["b"]
    return styled(figure, title, SINGLE + 60, height, margin=margin)


def histogram(
    frame: pd.DataFrame, x: str, y: str, *, facet: str | None = None, labels: Mapping[str, str] | None = None,
    title: str = "",
) -> go.Figure:  # fmt: skip
    """Bars of y at the bin centres x, a panel for each value of `facet`."""
    named = {x: x, y: y, **(labels or {})}
    panels = _panels(frame, facet)
    figure, columns, rows = _grid(list(panels), facet, named[x], named[y])
    for place, panel in enumerate(panels.values()):
        row, column = divmod(place, columns)
        bar = go.Bar(x=panel[x], y=panel[y], marker_color=COLOURS[0], showlegend=False,
                     hovertemplate=f"{named[x]} %{{x:.2f}}<br>{named[y]} %{{y:.3f}}<extra></extra>")  # fmt: skip
        figure.add_trace(bar, row + 1, column + 1)
    figure.update_layout(bargap=0.05)
    return _finished(figure, title, rows, columns, 0, 0)


def _values(frame: pd.DataFrame, column: str | None) -> list[Any]:
    return [None] if column is None else list(dict.fromkeys(frame[column]))


def _panels(frame: pd.DataFrame, facet: str | None) -> dict[str, pd.DataFrame]:
    if facet is None:
        return {"": frame}
    return {str(value): frame[frame[facet] == value] for value in dict.fromkeys(frame[facet])}


def _series(panel: pd.DataFrame, colour: str | None, dash: str | None) -> list[tuple[Any, Any, pd.DataFrame]]:
    keys = [name for name in (colour, dash) if name]
    if not keys:
        return [(None, None, panel)]
    found = []
    for key, part in panel.groupby(keys, sort=False):
        values = dict(zip(keys, key, strict=True))
        found.append((values.get(colour or ""), values.get(dash or ""), part))
    return found


def _name(*values: Any) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def _grid(panels: Sequence[str], facet: str | None, x: str, y: str) -> tuple[go.Figure, int, int]:
    """Empty panels, four a row at most, that share their axes and the axes' titles."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=True, shared_xaxes=True, subplot_titles=list(panels) if facet else None,
        horizontal_spacing=0.025, vertical_spacing=min(0.9 / rows, 26 / (PANEL * rows)), x_title=x, y_title=y,
    )  # fmt: skip
    return figure, columns, rows


def _legend(keys: int, longest: int, width: float) -> float:
    """Pixels that a legend below the plot takes."""
    a_line = max(1, int(width // (longest * 5.6 + 46)))
    return 20 * math.ceil(keys / a_line)


def _finished(figure: go.Figure, title: str, rows: int, columns: int, keys: int, longest: int) -> go.Figure:
    width = SINGLE if columns == 1 else DOUBLE
    panel = 210 if columns == 1 else PANEL
    titles: Any = figure.layout["annotations"]
    named = 18 if len(titles) > 2 else 0  # two of them are the axes'
    legend = _legend(keys, longest, width) if keys > 1 else 0
    top = (14 + 17 * (title.count("<br>") + 1) if title else 12) + named
    margin = {"l": 60, "r": 14, "t": top, "b": 50 + legend}
    height = rows * panel + (rows - 1) * 26 + margin["t"] + margin["b"]
    for annotation in titles:
        annotation.update(font={"size": 11})
    figure.update_layout(showlegend=keys > 1)
    return styled(figure, title, width, height, margin=margin)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
