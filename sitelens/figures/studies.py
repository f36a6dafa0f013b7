"""A figure for each study: it has the study's name and takes the frame that the study returns."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sitelens.figures.charts import SHARE, dots, histogram, lines, marker
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

ACCURACY = "First-token accuracy"
LOSS = "Cross-entropy (nats)"


def soft_hard(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of hard selections over the threshold, and of the soft one (dashed)."""
    hard = frame[["task", "threshold", "mean", "low", "high"]].assign(selection="hard")
    soft = frame[["task", "threshold", "soft"]].rename(columns={"soft": "mean"}).assign(selection="soft")
    labels = {"threshold": "Threshold on alpha", "mean": ACCURACY}
    return lines(pd.concat([hard, soft]), "threshold", color="selection", dash="selection", facet="task",
                 labels=labels, title=title)  # fmt: skip


def random_heads(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy over the number of heads: the mean of the random draws with their whole range, and high-alpha heads."""
    ranged = frame.groupby(["task", "heads", "k"], sort=False)["mean"].agg(["mean", "min", "max"]).reset_index()
    ranged = ranged.rename(columns={"min": "low", "max": "high"})
    draws = frame.groupby("heads")["draw"].nunique().max()
    named = {"random": f"random (mean and range of {draws} draws)", "high-alpha": "high-alpha"}
    labels = {"k": "Heads patched", "mean": ACCURACY}
    return lines(ranged.assign(heads=ranged["heads"].map(named)), "k", color="heads", facet="task", labels=labels,
                 title=title, interval="range")  # fmt: skip


def head_counts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy over the number of heads added or removed, from the highest alpha down and from the lowest up."""
    named = frame.assign(order=frame["order"] + " first")
    labels = {"k": "Heads added, or removed", "mean": ACCURACY}
    return lines(named, "k", color="order", dash="change", facet="task", labels=labels, title=title, markers=False)


def task_agnostic(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of each task under its own, the shared and the mean alpha, beside prompting."""
    return dots(frame, labels={"mean": ACCURACY}, title=title)


def mixing(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy under convex and additive mixing, soft and hard."""
    kind = frame["mixing"] + frame["hard"].map({True: ", hard", False: ", soft"})
    return dots(frame.assign(kind=kind), color="kind", labels={"mean": ACCURACY}, title=title)


def prompt_counts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of SITE over the number of prompts, a line for each number of shots."""
    named = frame.assign(shots=[f"{n} {'shot' if n == 1 else 'shots'}" for n in frame["n_shots"]])
    labels = {"n_prompts": "Prompts averaged over (M)", "mean": ACCURACY}
    return lines(named, "n_prompts", color="shots", facet="task", labels=labels, title=title, log_x=True)


def seed_variance(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy under every prompt and training seed, a dot a run."""
    plain = frame.drop(columns=["low", "high"]).assign(seed="prompt seed " + frame["prompt_seed"].astype(str))
    return dots(plain, color="seed", labels={"mean": f"{ACCURACY} (a dot for each training seed)"}, title=title)


def initializations(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy after training from each initialization, a dot a seed."""
    return dots(frame.assign(init="init " + frame["init"]), color="init",
                labels={"mean": f"{ACCURACY} (a dot for each seed)"}, title=title)  # fmt: skip


def initialization_distances(frame: pd.DataFrame, title: str = "") -> Figure:
    """Mean absolute distance of the alphas found, for pairs of runs that share the init, the seed, or neither."""
    return dots(frame, "distance", color="pair", share=False, labels={"distance": "Mean |difference| of alpha"},
                title=title)  # fmt: skip


def loss_path(frame: pd.DataFrame, title: str = "") -> Figure:
    """Cross-entropy along the straight line between two alphas."""
    labels = {"position": "Position between the two alphas", "loss": LOSS}
    return lines(frame.drop(columns=["low", "high"]), "position", "loss",
                 color="path" if "path" in frame else None, labels=labels, title=title, share=False)  # fmt: skip


def checkpoints(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of the best and of the last checkpoint."""
    return dots(frame, color="checkpoint", labels={"mean": ACCURACY}, title=title)


def alpha_distribution(frame: pd.DataFrame, title: str = "") -> Figure:
    """Histograms of alpha by task, lines over training, or the share of heads that are on in each layer."""
    if "layer" in frame:
        labels = {"layer": "Layer", "on": "Share of heads with alpha > 0.5"}
        return lines(frame, "layer", "on", facet="task", labels=labels, title=title)
    if "step" in frame:
        named = frame.assign(step="step " + frame["step"].astype(str))
        labels = {"alpha": "alpha", "share": "Share of heads"}
        figure = lines(named, "alpha", "share", color="step", facet="task", labels=labels, title=title, share=False,
                       markers=False)  # fmt: skip
        figure.update_xaxes(range=[0, 1], tickvals=[0, 0.5, 1])
        return figure
    return histogram(frame, "alpha", "share", facet="task", labels={"share": "Share of heads"}, title=title)


def training_curves(histories: pd.DataFrame, title: str = "") -> Figure:
    """Validation loss over training: frames of `TrainResult.history` with a column `task`."""
    measured = histories.dropna(subset="valid_loss")
    labels = {"step": "Step", "valid_loss": f"Validation {LOSS.lower()}"}
    few = measured["task"].nunique() <= len(COLORS)
    return lines(measured, "step", "valid_loss", color="task" if few else None, facet=None if few else "task",
                 labels=labels, title=title, share=False)  # fmt: skip


def costs(frame: pd.DataFrame, title: str = "", quantity: Literal["seconds", "tokens"] = "seconds") -> Figure:
    """Seconds, or tokens, over the number of prompts answered; both axes logarithmic."""
    names = {"seconds": "Seconds", "tokens": "Tokens through the model"}
    labels = {"prompts": "Prompts answered", quantity: names[quantity]}
    return lines(frame, "prompts", quantity, color="method", labels=labels, title=title, share=False, log_x=True,
                 log_y=True)  # fmt: skip


def head_overlap(frame: pd.DataFrame, title: str = "") -> Figure:
    """AUC of each known kind of head for the selected ones; 0.5 is chance."""
    return dots(frame, "auc", color="kind", labels={"auc": "AUC for alpha > 0.5"}, title=title, reference=0.5)


def shared_attention(frame: pd.DataFrame, title: str = "") -> Figure:
    """How differently heads attend on the two tasks' prompts, by whether one or both tasks select them.

    Means over heads; the bars are 1.96 standard errors of these means, as if heads were independent of each other.
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
    """On what heads attend, as stacked shares; the frame of `sl.heads.attention_roles`."""
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
    """One prompt's tokens, and how much each head attends to them; the frame of `sl.heads.attention_example`."""
    heads = [name for name in frame.columns if name not in ("position", "token", "role")]
    texts = [repr(token)[1:-1] for token in frame["token"]]
    down = 11 * len(frame) + 130 > DOUBLE  # a prompt too long for a page's width is read downwards
    weights = frame[heads].to_numpy()
    roles = zip(texts, frame["role"], strict=True)
    told = np.array([[f"head {figure_text(h)}<br>{figure_text(f'{t} ({r})')}" for h in heads] for t, r in roles])
    figure = Figure(go.Heatmap(
        z=weights if down else weights.T, zmin=0, zmax=1, colorscale=SEQUENTIAL, text=told if down else told.T,
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


def similarity_against_transfer(similarity: pd.DataFrame, transfer: pd.DataFrame, title: str = "") -> Figure:
    """Every pair of tasks off the diagonal: similarity of heads across, normalized transfer up."""
    names = list(transfer.index)
    cells = [(a, b) for a in names for b in names if a != b]
    figure = Figure(go.Scatter(
        x=[similarity.loc[cell] for cell in cells], y=[transfer.loc[cell] for cell in cells], mode="markers",
        marker={"color": COLORS[0], "size": 5, "opacity": 0.6},
        text=[f"{figure_text(a)}<br>on {figure_text(b)}" for a, b in cells],
        hovertemplate="%{text}<br>similarity %{x:.3f}<br>share of the own gain %{y:.3f}<extra></extra>",
    ))  # fmt: skip
    figure.update_xaxes(title="Similarity of alpha (Pearson r)")
    figure.update_yaxes(title="Transfer (share of the own gain)")
    return styled(figure, title, SINGLE, 210)


def comparison(frame: pd.DataFrame, title: str = "") -> Figure:
    """Mean accuracy of each method over the numbers it trains, and over the tokens that fitting it takes.

    Tokens are forward ones and backward ones, which cost twice as much. Bars are the range over tasks of the middle
    half; methods that train nothing, or need no fitting, stand at the left edge.
    """
    grouped = frame.assign(work=frame["forward_tokens"] + 2 * frame["backward_tokens"]).groupby("method", sort=False)
    means = grouped[["accuracy", "trained", "work"]].mean()
    means = means.assign(low=grouped["accuracy"].quantile(0.25), high=grouped["accuracy"].quantile(0.75))
    figure = Figure()
    make_subplots(figure=figure, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for place, column in enumerate(("trained", "work"), start=1):
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
                legendgroup=figure_text(name), showlegend=place == 1,
                marker={"color": COLORS[i % len(COLORS)], "size": 8, "symbol": marker(i)},
                error_y={"type": "data", "symmetric": False, "array": [max(above, 0)], "arrayminus": [max(below, 0)],
                         "thickness": 1, "width": 0},
                hovertemplate=f"{figure_text(name)}<br>accuracy %{{y:.3f}}<br>{column} {row[column]:,.0f}"
                "<extra></extra>",
            ), 1, place)  # fmt: skip
        powers = range(first, math.ceil(math.log10(most)) + 1)
        figure.update_xaxes(type="log", tickvals=[10.0**p for p in powers], col=place,
                            ticktext=["none", *(f"10<sup>{p}</sup>" for p in powers[1:])])  # fmt: skip
    figure.update_xaxes(title="Trained parameters", col=1)
    figure.update_xaxes(title="Tokens of fitting (forward + 2 backward)", col=2)
    figure.update_yaxes(title=ACCURACY, col=1)
    figure.update_yaxes(**SHARE)
    names = [str(name) for name in means.index]
    return styled(figure, title, DOUBLE, 230, margin={"l": 60, "b": 62 + legend_height(names, DOUBLE - 74)})


def suite(frame: pd.DataFrame, title: str = "") -> Figure:
    """A suite's tasks, by group and best under the last condition first: a dot for each condition's mean.

    Columns: task, group, condition, metric, mean, low, high.
    """
    label = f"{str(frame['metric'].iloc[0]).replace('_', ' ').capitalize()} accuracy"
    last = frame["condition"].iloc[-1]
    order = frame[frame["condition"] == last].sort_values(["group", "mean"], ascending=[True, False])
    place = {task: i for i, task in enumerate(order["task"])}
    conditions = list(dict.fromkeys(frame["condition"]))
    key = {"task": place.__getitem__, "condition": conditions.index}
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
