"""Figures of how alpha is trained (`sitelens.studies.training`, `seeds`), each named like its study."""

from __future__ import annotations

import pandas as pd

from sitelens.figures.charts import dots, histogram, lines
from sitelens.figures.style import (
    COLORS,
    Figure,
    accuracy_label,
)

ACCURACY = accuracy_label("first_token")
LOSS = "Cross-entropy (nats)"


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
