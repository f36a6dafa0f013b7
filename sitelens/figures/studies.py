"""Figures of studies: each has the name of a function in `sl.studies` and draws the frame that it returns."""

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
    accuracy_label,
    colorbar,
    legend_height,
    styled,
    text_width,
)
from sitelens.files.escaping import figure_text

ACCURACY = accuracy_label("first_token")
LOSS = "Cross-entropy (nats)"


def soft_hard(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of hard selections against the threshold, and of the soft selection (dashed).

    Args:
        frame: of `sl.studies.soft_hard`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "threshold": [0.2, 0.5], "mean": [0.8, 0.9],
        ...                       "low": 0.7, "high": 1.0, "soft": 0.85})
        >>> [line.name for line in sl.figures.soft_hard(frame).data if line.name]
        ['hard', 'soft']
    """
    hard = frame[["task", "threshold", "mean", "low", "high"]].assign(selection="hard")
    soft = frame[["task", "threshold", "soft"]].rename(columns={"soft": "mean"}).assign(selection="soft")
    labels = {"threshold": "Threshold on alpha", "mean": ACCURACY}
    return lines(pd.concat([hard, soft]), "threshold", color="selection", dash="selection", facet="task",
                 labels=labels, title=title)  # fmt: skip


def random_heads(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy against the number of heads: mean and range of the random draws, and high-alpha heads.

    Args:
        frame: of `sl.studies.random_heads`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "heads": ["random", "random", "high-alpha"], "k": 10,
        ...                       "draw": [0, 1, 0], "mean": [0.1, 0.3, 0.6]})
        >>> [line.name for line in sl.figures.random_heads(frame).data if line.name]
        ['random (mean and range of 2 draws)', 'high-alpha']
    """
    ranged = frame.groupby(["task", "heads", "k"], sort=False)["mean"].agg(["mean", "min", "max"]).reset_index()
    ranged = ranged.rename(columns={"min": "low", "max": "high"})
    draws = frame.groupby("heads")["draw"].nunique().max()
    named = {"random": f"random (mean and range of {draws} draws)", "high-alpha": "high-alpha"}
    labels = {"k": "Number of heads patched", "mean": ACCURACY}
    return lines(ranged.assign(heads=ranged["heads"].map(named)), "k", color="heads", facet="task", labels=labels,
                 title=title, interval="range")  # fmt: skip


def head_counts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy against the number of heads added or removed, from the highest alpha down or from the lowest up.

    Args:
        frame: of `sl.studies.head_counts`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "order": "high-alpha", "change": "added", "k": [0, 10],
        ...                       "mean": [0.0, 0.4]})
        >>> sl.figures.head_counts(frame).data[0].name
        'high-alpha first, added'
    """
    named = frame.assign(order=frame["order"] + " first")
    labels = {"k": "Number of heads added or removed", "mean": ACCURACY}
    return lines(named, "k", color="order", dash="change", facet="task", labels=labels, title=title, markers=False)


def task_agnostic(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of each task under its own, the shared and the mean alpha, and under prompting.

    Args:
        frame: of `sl.studies.task_agnostic`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "condition": ["own alpha", "shared alpha"], "mean": [0.9, 0.8]})
        >>> [dot.name for dot in sl.figures.task_agnostic(frame).data]
        ['own alpha', 'shared alpha']
    """
    return dots(frame, labels={"mean": ACCURACY}, title=title)


def mixing(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy under convex and additive mixing, soft and hard.

    Args:
        frame: of `sl.studies.mixing`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "mixing": "convex", "hard": [False, True], "mean": [0.8, 0.9]})
        >>> [dot.name for dot in sl.figures.mixing(frame).data]
        ['convex, soft', 'convex, hard']
    """
    kind = frame["mixing"] + frame["hard"].map({True: ", hard", False: ", soft"})
    return dots(frame.assign(kind=kind), color="kind", labels={"mean": ACCURACY}, title=title)


def prompt_counts(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of SITE against the number of prompts in the embedding, one line per number of shots.

    Args:
        frame: of `sl.studies.prompt_counts`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "n_prompts": [1, 5], "n_shots": 10, "mean": [0.8, 0.9]})
        >>> sl.figures.prompt_counts(frame).data[0].name
        '10 shots'
    """
    named = frame.assign(shots=[f"{n} {'shot' if n == 1 else 'shots'}" for n in frame["n_shots"]])
    labels = {"n_prompts": "Number of prompts in the embedding (M)", "mean": ACCURACY}
    return lines(named, "n_prompts", color="shots", facet="task", labels=labels, title=title, log_x=True)


def seed_variance(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy under every prompt seed and training seed, one dot per run.

    Args:
        frame: of `sl.studies.seed_variance`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "prompt_seed": [0, 1], "training_seed": 0, "mean": [0.8, 0.9],
        ...                       "low": 0.7, "high": 1.0})
        >>> [dot.name for dot in sl.figures.seed_variance(frame).data]
        ['prompt seed 0', 'prompt seed 1']
    """
    plain = frame.drop(columns=["low", "high"]).assign(seed="prompt seed " + frame["prompt_seed"].astype(str))
    return dots(plain, color="seed", labels={"mean": f"{ACCURACY} (one dot per training seed)"}, title=title)


def initializations(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy after training from each initialization of alpha, one dot per seed.

    Args:
        frame: of `sl.studies.initializations`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "init": ["0.5", "random"], "seed": 0, "mean": [0.8, 0.9]})
        >>> [dot.name for dot in sl.figures.initializations(frame).data]
        ['init 0.5', 'init random']
    """
    return dots(frame.assign(init="init " + frame["init"]), color="init",
                labels={"mean": f"{ACCURACY} (one dot per seed)"}, title=title)  # fmt: skip


def initialization_distances(frame: pd.DataFrame, title: str = "") -> Figure:
    """Mean absolute difference of the trained alphas, for pairs of runs with the same init, the same seed, or neither.

    Args:
        frame: of `sl.studies.initialization_distances`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "pair": ["same init", "same seed"], "distance": [0.1, 0.2]})
        >>> sl.figures.initialization_distances(frame).data[0].x
        array([0.1])
    """
    return dots(frame, "distance", color="pair", share=False, labels={"distance": "Mean absolute difference of alpha"},
                title=title)  # fmt: skip


def loss_path(frame: pd.DataFrame, title: str = "") -> Figure:
    """Cross-entropy along the straight line between two alphas.

    Args:
        frame: of `sl.studies.loss_path`, optionally with a column `path` that tells several apart.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"position": [0.0, 1.0], "loss": [0.8, 0.7], "low": 0.5, "high": 0.9})
        >>> sl.figures.loss_path(frame).data[0].y
        array([0.8, 0.7])
    """
    labels = {"position": "Interpolation between the two solutions", "loss": LOSS}
    return lines(frame.drop(columns=["low", "high"]), "position", "loss",
                 color="path" if "path" in frame else None, labels=labels, title=title, share=False)  # fmt: skip


def checkpoints(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of the best and of the last checkpoint.

    Args:
        frame: of `sl.studies.checkpoints`.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "checkpoint": ["best", "last"], "mean": [0.8, 0.9]})
        >>> [dot.name for dot in sl.figures.checkpoints(frame).data]
        ['best', 'last']
    """
    return dots(frame, color="checkpoint", labels={"mean": ACCURACY}, title=title)


def alpha_distribution(frame: pd.DataFrame, title: str = "") -> Figure:
    """Histograms of alpha by task, lines over training steps, or the share of selected heads per layer.

    Args:
        frame: of `sl.studies.alpha_distribution`, which decides among the three by its columns.
        title: plain text above the figure.

    Example:
        >>> frame = pd.DataFrame({"task": "antonym", "alpha": [0.25, 0.75], "share": [0.6, 0.4]})
        >>> sl.figures.alpha_distribution(frame).data[0].type
        'bar'
    """
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
    """Validation loss over training steps.

    Args:
        histories: frames of `TrainResult.history`, concatenated, with a column `task`.
        title: plain text above the figure.

    Example:
        >>> history = pd.DataFrame({"task": "antonym", "step": [25, 50], "valid_loss": [1.2, 0.9]})
        >>> sl.figures.training_curves(history).data[0].name
        'antonym'
    """
    measured = histories.dropna(subset="valid_loss")
    labels = {"step": "Step", "valid_loss": f"Validation {LOSS.lower()}"}
    few = measured["task"].nunique() <= len(COLORS)
    return lines(measured, "step", "valid_loss", color="task" if few else None, facet=None if few else "task",
                 labels=labels, title=title, share=False)  # fmt: skip


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


def similarity_against_transfer(similarity: pd.DataFrame, transfer: pd.DataFrame, title: str = "") -> Figure:
    """Similarity of alphas (across) against transfer (up), one dot per ordered pair of different tasks.

    Args:
        similarity: tasks by tasks, of `HeadSimilarity.frame`.
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
