"""Charts of tidy frames: lines with intervals, dots with intervals, histograms; optionally one panel per facet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sitelens.figures.style import COLORS, DASHES, DOUBLE, SINGLE, Figure, legend_height, styled, text_width, wrapped
from sitelens.files.escaping import figure_text

SHARE: dict[str, Any] = {"range": [-0.03, 1.03], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
GAP = 26  # pixels between rows of panels
TALL = 900  # height in pixels that many dots may take together: a page
INTERVAL = "95% interval"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str = "mean",
    *,
    color: str | None = None,
    dash: str | None = None,
    facet: str | None = None,
    labels: Mapping[str, str] | None = None,
    title: str = "",
    share: bool = True,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
    interval: str = INTERVAL,
) -> Figure:
    """Lines of y against x with intervals: one line per value of `color` and `dash`, one panel per value of `facet`.

    Args:
        frame: one row per point. Columns `low` and `high`, if present, are drawn as a band.
        x, y: columns of the axes.
        color, dash, facet: columns that tell lines and panels apart.
        labels: names of columns for axes and hover.
        title: plain text above the figure.
        share: whether y is a share, with the axis fixed to [0, 1].
        log_x, log_y: logarithmic axes.
        markers: whether points are marked.
        interval: name of the interval in the hover.

    Example:
        >>> frame = pd.DataFrame({"k": [10, 20], "mean": [0.4, 0.6], "low": [0.3, 0.5], "high": [0.5, 0.7]})
        >>> figure = sl.figures.lines(frame, "k", labels={"k": "Number of heads", "mean": "Accuracy"})
        >>> [trace.mode for trace in figure.data]
        ['lines', 'lines+markers']
    """
    names = {x: x, y: y, **(labels or {})}
    panels = _panels(frame, facet)
    figure, columns = _grid(panels, facet, names[x], names[y])
    hover = {column: figure_text(name) for column, name in names.items()}
    colors, dashes = _values(frame, color), _values(frame, dash)
    in_legend: set[str] = {""}
    for index, panel in enumerate(panels.values()):
        row, column = divmod(index, columns)
        for c, d, part in _series(panel, color, dash):
            part = part.sort_values(x)
            i, name = colors.index(c), figure_text(_name(c, d))
            across = _texts(part[x])
            ink = COLORS[i % len(COLORS)]
            has_band = {"low", "high"} <= set(part.columns) and bool(part["low"].notna().any())
            if has_band:
                band = go.Scatter(
                    x=[*across, *across[::-1]], y=[*part["high"], *part["low"][::-1]], fill="toself", mode="lines",
                    line={"width": 0}, fillcolor=_faint(ink), hoverinfo="skip", showlegend=False, legendgroup=name,
                )  # fmt: skip
                figure.add_trace(band, row + 1, column + 1)
            line = go.Scatter(
                x=across, y=part[y], mode="lines+markers" if markers else "lines", name=name, legendgroup=name,
                showlegend=name not in in_legend,
                line={"color": ink, "width": 1.5, "dash": DASHES[dashes.index(d) % len(DASHES)]},
                marker={"size": 5, "symbol": marker(i)},
                customdata=part[["low", "high"]] if has_band else None,
                hovertemplate=f"{name}<br>{hover[x]} %{{x}}<br>{hover[y]} %{{y:.3f}}"
                + (_between(interval, 0) if has_band else "") + "<extra></extra>",
            )  # fmt: skip
            figure.add_trace(line, row + 1, column + 1)
            in_legend.add(name)
    if log_x:
        values = sorted(value for value in set(frame[x]) if value > 0)
        ticks = values[:: math.ceil(len(values) / 8)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{value:g}" for value in ticks])
    axis: dict[str, Any] = SHARE if share else {"type": "log", "dtick": 1} if log_y else {}
    figure.update_yaxes(**axis)
    return _finished(figure, title, len(panels), columns)


def dots(
    frame: pd.DataFrame,
    x: str = "mean",
    *,
    y: str = "task",
    color: str = "condition",
    labels: Mapping[str, str] | None = None,
    title: str = "",
    share: bool = True,
    reference: float | None = None,
) -> Figure:
    """Dots at x with their intervals: one row per value of y, from the top, and one dot per value of `color`.

    Args:
        frame: one row per dot. Columns `low` and `high`, if present, are the interval.
        x, y, color: columns of the value, the row and the color.
        labels: names of columns for axes and hover.
        title: plain text above the figure.
        share: whether x is a share, with the axis fixed to [0, 1].
        reference: x of a dashed vertical line.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "condition": ["10-shot", "SITE"], "mean": [0.4, 0.6]})
        >>> [dot.name for dot in sl.figures.dots(frame).data]
        ['10-shot', 'SITE']
    """
    label_of = {x: x, **(labels or {})}
    names, colors = _values(frame, y), _values(frame, color)
    dots_a_line = len(colors) + 0.6
    room = max(2.0, min(11.0, 120 / len(colors), TALL / len(names) / dots_a_line))  # pixels between a line's dots
    pitch = max(14.0, room * dots_a_line)
    figure = Figure()
    for i, value in enumerate(colors):
        part = frame[frame[color] == value]
        offset = (i - (len(colors) - 1) / 2) * room / pitch
        ends = ["low", "high"] if {"low", "high"} <= set(part.columns) else []
        figure.add_trace(go.Scatter(
            x=part[x], y=[names.index(name) + offset for name in part[y]], mode="markers", name=figure_text(value),
            marker={"color": COLORS[i % len(COLORS)], "size": min(6.0, room + 2), "symbol": marker(i)},
            error_x={"type": "data", "symmetric": False, "array": part["high"] - part[x], "thickness": 1, "width": 0,
                     "arrayminus": part[x] - part["low"]} if ends else None,
            customdata=part[[y, *ends]].assign(**{y: list(map(figure_text, part[y]))}),
            hovertemplate=f"%{{customdata[0]}}, {figure_text(value)}<br>{figure_text(label_of[x])} %{{x:.3f}}"
            + (_between(INTERVAL, 1) if ends else "") + "<extra></extra>",
        ))  # fmt: skip
    if reference is not None:
        figure.add_vline(reference, line={"color": "#888", "width": 1, "dash": "dash"})
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=list(map(figure_text, names)),
                        range=[len(names) - 0.5, -0.5], gridcolor="#f2f2f2",
                        tickfont={"size": 11 if pitch >= 16 else 9})  # fmt: skip
    left = text_width(names, 11.5) + 14
    width = max(SINGLE + 60, left + 250)
    label = wrapped(label_of[x], width - left - 24)
    figure.update_xaxes(title=label, **SHARE if share else {})
    legend = legend_height(colors, width - left - 14) if len(colors) > 1 else 0
    figure.update_layout(showlegend=len(colors) > 1)
    margin = {"l": left, "b": 46 + 14 * label.count("<br>") + legend}
    return styled(figure, title, width, len(names) * pitch, margin=margin)


def histogram(
    frame: pd.DataFrame, x: str, y: str, *, facet: str | None = None, labels: Mapping[str, str] | None = None,
    title: str = "",
) -> Figure:  # fmt: skip
    """Bars of y at the bin centers x, one panel per value of `facet`.

    Args:
        frame: one row per bin.
        x, y: columns of the bin center and the height.
        facet: column that tells panels apart.
        labels: names of columns for axes and hover.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"alpha": [0.25, 0.75], "share": [0.6, 0.4]})
        >>> sl.figures.histogram(frame, "alpha", "share").data[0].y
        array([0.6, 0.4])
    """
    label_of = {x: x, y: y, **(labels or {})}
    panels = _panels(frame, facet)
    figure, columns = _grid(panels, facet, label_of[x], label_of[y])
    for index, panel in enumerate(panels.values()):
        row, column = divmod(index, columns)
        bar = go.Bar(x=_texts(panel[x]), y=panel[y], marker_color=COLORS[0], showlegend=False,
                     hovertemplate=f"{figure_text(label_of[x])} %{{x:.2f}}<br>{figure_text(label_of[y])} %{{y:.3f}}"
                     "<extra></extra>")  # fmt: skip
        figure.add_trace(bar, row + 1, column + 1)
    figure.update_layout(bargap=0.05)
    return _finished(figure, title, len(panels), columns)


def _values(frame: pd.DataFrame, column: str | None) -> list[Any]:
    return [None] if column is None else list(dict.fromkeys(frame[column]))


def _texts(column: pd.Series) -> list[Any]:
    """The values of an axis; texts are escaped."""
    return [figure_text(value) if isinstance(value, str) else value for value in column]


def _panels(frame: pd.DataFrame, facet: str | None) -> dict[str, pd.DataFrame]:
    if facet is None:
        return {"": frame}
    return {str(value): frame[frame[facet] == value] for value in dict.fromkeys(frame[facet])}


def _series(panel: pd.DataFrame, color: str | None, dash: str | None) -> list[tuple[Any, Any, pd.DataFrame]]:
    keys = list(dict.fromkeys(name for name in (color, dash) if name))
    if not keys:
        return [(None, None, panel)]
    series = []
    for key, part in panel.groupby(keys, sort=False):
        values = dict(zip(keys, key, strict=True))
        series.append((values.get(color or ""), values.get(dash or ""), part))
    return series


def _name(*values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def marker(i: int) -> str:
    """A distinct marker per color; once the palette repeats, shifted and hollow markers keep series distinct."""
    turn = i // len(COLORS)
    return SYMBOLS[(i + turn) % len(SYMBOLS)] + ("-open" if turn % 2 else "")


def _between(interval: str, place: int) -> str:
    """The hover's line of an interval whose ends are in customdata, from index `place` on."""
    return f"<br>{figure_text(interval)} %{{customdata[{place}]:.3f}} to %{{customdata[{place + 1}]:.3f}}"


def _grid(panels: Mapping[str, Any], facet: str | None, x: str, y: str) -> tuple[Figure, int]:
    """Empty panels that share axes and axis titles, and the number of panels per row."""
    columns = min(len(panels), 4 if len(panels) <= 24 else 6)
    rows = math.ceil(len(panels) / columns)
    figure = Figure()
    make_subplots(
        rows=rows, cols=columns, shared_yaxes=True, shared_xaxes=True, figure=figure,
        subplot_titles=list(map(figure_text, panels)) if facet else None, horizontal_spacing=0.025,
        vertical_spacing=GAP / _plot(rows, columns), x_title=figure_text(x), y_title=figure_text(y),
    )  # fmt: skip
    for index in range(len(panels)):  # the last row may leave columns empty
        row, column = divmod(index, columns)
        figure.update_xaxes(showticklabels=index + columns >= len(panels), row=row + 1, col=column + 1)
    titles: Any = figure.layout["annotations"]
    room = (DOUBLE - 74) / columns - 12
    for annotation in titles[:-2]:  # the last two are the axes'
        annotation.update(font={"size": max(7, min(11, int(11 * room / max(1, text_width(panels)))))})
    for annotation in titles[-2:]:
        annotation.update(font={"size": 11})
    return figure, columns


def _plot(rows: int, columns: int) -> int:
    """Height of all panels in pixels."""
    panel = 210 if columns == 1 else 150 if columns <= 4 else 80
    return rows * panel + (rows - 1) * GAP


def _finished(figure: Figure, title: str, panels: int, columns: int) -> Figure:
    width = SINGLE if columns == 1 else DOUBLE
    names = [trace["name"] for trace in figure.data if trace["showlegend"]]
    titles: Any = figure.layout["annotations"]
    above = 18 if len(titles) > 2 else 0
    margin = {"l": 60, "b": 50 + (legend_height(names, width - 74) if len(names) > 1 else 0)}
    if columns > 4:
        figure.update_yaxes(tickfont={"size": 8})
        figure.update_xaxes(tickfont={"size": 8})
    figure.update_layout(showlegend=len(names) > 1)
    return styled(figure, title, width, _plot(math.ceil(panels / columns), columns), above, margin=margin)


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
