"""Figures of single heads: known types of heads, and what heads attend to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sitelens.figures.charts import dots
from sitelens.figures.style import (
    COLORS,
    DOUBLE,
    SEQUENTIAL,
    SINGLE,
    Figure,
    colorbar,
    legend_height,
    styled,
    text_width,
)
from sitelens.files.escaping import figure_text


def head_overlap(frame: pd.DataFrame, title: str = "") -> Figure:
    """AUC of each known type of head for the selected heads; 0.5 is chance.

    Args:
        frame: of `sl.studies.head_overlap`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "kind": ["induction", "function vector"], "auc": [0.5, 0.6]})
        >>> [dot.name for dot in sl.figures.head_overlap(frame).data]
        ['induction', 'function vector']
    """
    return dots(frame, "auc", color="kind", labels={"auc": "AUC for alpha > 0.5"}, title=title, reference=0.5)


def shared_attention(frame: pd.DataFrame, title: str = "") -> Figure:
    """How differently heads attend on two tasks' prompts, by whether both, one or neither task selects them.

    Dots are means over heads; bars are 1.96 standard errors of these means, as if heads were independent of each other.

    Args:
        frame: of `sl.studies.shared_attention`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task_a": "antonym", "task_b": "synonym", "layer": 0, "head": range(4),
        ...                       "group": ["both", "both", "only a", "neither"], "distance": [0.1, 0.2, 0.3, 0.4]})
        >>> [dot.name for dot in sl.figures.shared_attention(frame).data]
        ['selected by both', 'selected by one', 'selected by neither']
    """
    heads = frame.drop_duplicates(["task_a", "task_b", "layer", "head"])
    pairs = heads["task_a"] + ", " + heads["task_b"]
    group = heads["group"].replace({"only a": "one", "only b": "one"})
    means = heads.assign(task=pairs, group=group).groupby(["task", "group"], sort=False)["distance"]
    summary = means.agg(["mean", "sem"]).reset_index()
    summary = summary.assign(low=summary["mean"] - 1.96 * summary["sem"], high=summary["mean"] + 1.96 * summary["sem"])
    ordered = summary.assign(place=summary["group"].map({"both": 0, "one": 1, "neither": 2}))
    ordered = ordered.sort_values("place", kind="stable").assign(group=lambda f: "selected by " + f["group"])
    return dots(ordered, color="group", share=False, title=title,
                labels={"mean": "Total variation between attention on the two tasks' prompts: mean over heads, "
                                "with 1.96 standard errors"})  # fmt: skip


def attention_roles(frame: pd.DataFrame, title: str = "") -> Figure:
    """Attention of each head by token role, as stacked shares.

    Args:
        frame: of `sl.heads.attention_roles`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"layer": 1, "head": 3, "role": ["query", "template"], "share": [0.7, 0.3]})
        >>> [bar.name for bar in sl.figures.attention_roles(frame).data]
        ['query', 'template']
    """
    heads = frame["layer"].astype(str) + "." + frame["head"].astype(str)
    figure = Figure()
    names = list(dict.fromkeys(heads))
    for color, role in zip(COLORS, dict.fromkeys(frame["role"]), strict=False):
        part = frame["role"] == role
        figure.add_trace(go.Bar(
            x=frame.loc[part, "share"], y=heads[part], name=figure_text(role), orientation="h", marker_color=color,
            hovertemplate=f"head %{{y}}<br>{figure_text(role)} %{{x:.3f}}<extra></extra>",
        ))  # fmt: skip
    pitch = min(18.0, max(9.0, 1000 / len(names)))
    figure.update_xaxes(title="Share of the last token's attention", range=[0, 1])
    figure.update_yaxes(title="Head (layer.head)", type="category", autorange="reversed",
                        tickfont={"size": min(11.0, pitch - 1)}, tickvals=names)  # fmt: skip
    margin = {"l": 60, "b": 46 + legend_height(list(dict.fromkeys(frame["role"])), SINGLE + 16)}
    return styled(figure, title, SINGLE + 90, pitch * len(names), barmode="stack", margin=margin,
                  legend_traceorder="normal")  # fmt: skip


def attention_example(frame: pd.DataFrame, title: str = "") -> Figure:
    """The tokens of one prompt, and each head's attention to them.

    Args:
        frame: of `sl.heads.attention_example`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"position": [0, 1], "token": ["Q", ":"], "role": "template", "1.3": [0.9, 0.1]})
        >>> sl.figures.attention_example(frame).data[0].z.shape
        (1, 2)
    """
    heads = [name for name in frame.columns if name not in ("position", "token", "role")]
    texts = [repr(token)[1:-1] for token in frame["token"]]
    down = 11 * len(frame) + 130 > DOUBLE  # a prompt too long for a page's width is read downwards
    weights = frame[heads].to_numpy()
    roles = zip(texts, frame["role"], strict=True)
    hover = np.array([[f"head {figure_text(h)}<br>{figure_text(f'{t} ({r})')}" for h in heads] for t, r in roles])
    figure = Figure(go.Heatmap(
        z=weights if down else weights.T, zmin=0, zmax=1, colorscale=SEQUENTIAL, text=hover if down else hover.T,
        hovertemplate="%{text}<br>attention %{z:.3f}<extra></extra>", xgap=0.5, ygap=0.5,
        colorbar=colorbar("attention", tickvals=[0, 0.5, 1]),
    ))  # fmt: skip
    tokens = {
        "tickvals": list(range(len(texts))),
        "ticktext": list(map(figure_text, texts)),
        "tickfont": {"size": 9},
        "title": "Token",
    }
    rows = {
        "tickvals": list(range(len(heads))),
        "ticktext": list(map(figure_text, heads)),
        "title": "Head (layer.head)",
    }
    figure.update_xaxes(**rows if down else tokens, tickangle=-90, showgrid=False)
    figure.update_yaxes(**tokens if down else rows, autorange="reversed", showgrid=False)
    names = text_width(texts, 9) + 36
    if down:
        margin = {"l": names, "r": 70, "b": 70}
        return styled(figure, title, max(SINGLE, 16 * len(heads) + names + 70), 11 * len(frame), margin=margin)
    margin = {"l": 56, "r": 70, "b": max(60.0, names)}
    return styled(figure, title, max(SINGLE, 11 * len(frame) + 130), max(80, 16 * len(heads)), margin=margin)
