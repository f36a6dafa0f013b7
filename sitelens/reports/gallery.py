"""make_figures: the figures of studies, each written with its data (CSV) and provenance (JSON)."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sitelens import figures
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.errors import SitelensError
from sitelens.evaluation.record import data_facts
from sitelens.files.writing import Outputs, check_file_name, check_folder, write_csv, write_text
from sitelens.methods.site.config import TrainConfig
from sitelens.models.loading import load_model
from sitelens.models.model import Model, ModelLike
from sitelens.models.provenance import provenance
from sitelens.models.sources import DEFAULT_MODEL
from sitelens.progress import Job
from sitelens.reports.records import train_options
from sitelens.studies import STUDIES
from sitelens.suggestions import did_you_mean
from sitelens.tasks import load_tasks

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMATS = ("html", "png", "svg")


@checked
def make_figures(
    names: Iterable[str] | None = None,
    folder: str | Path = "figures",
    model: ModelLike | str = DEFAULT_MODEL,
    *,
    tasks: Sequence[str] | None = None,
    n_items: Count = 100,
    seed: Seed = 0,
    formats: Sequence[str] = FORMATS,
    config: TrainConfig | None = None,
) -> list[Path]:
    """Run studies and write their figures; returns the paths of the written files.

    Each figure is written with its data (NAME.csv) and its provenance (NAME.json). Results are cached; if a call is
    interrupted, the same call resumes it. If a figure cannot be made or a file cannot be written, the others still are,
    and a `MissingOutputWarning` at the end names what is missing.

    Args:
        names: names of studies: sitelens's own, those made with `sl.study`, and those of installed packages; None for
            all.
        folder: where the files are written.
        model: a model or its name.
        tasks: names of the tasks to use; None for each study's own tasks.
        n_items: maximum number of test items per task.
        seed: decides prompts and test items.
        formats: file formats of the figures: "html", "png", "svg", "pdf".
        config: training of head selections; None for the paper's.

    Raises:
        SitelensError: for an unknown name or format, invalid tasks, a folder that cannot be written to, or if nothing
            could be made.

    Example:
        >>> paths = sl.make_figures(["alpha-histogram"], "figures", model, tasks=["antonym"], formats=["html"],
        ...                         config=config)
        >>> [path.name for path in paths]
        ['alpha-histogram.csv', 'alpha-histogram.json', 'alpha-histogram.html']
    """
    formats = figures.check_formats(formats)
    check_folder(folder)
    chosen = list(STUDIES if names is None else names)
    for name in chosen:
        if name not in STUDIES:
            hint = did_you_mean(name, STUDIES)
            raise SitelensError(f"unknown figure {name!r}{hint and f' ({hint})'}; there are: {', '.join(STUDIES)}")
    given, config = load_tasks(tasks or ()), config or TrainConfig()  # reports a wrong name before the model is loaded
    with Outputs(folder) as outputs, Job("figures", ["load the model", *chosen]) as job:
        with job.stage("load the model"):
            loaded = Model.of(load_model(model.bridge if isinstance(model, Model) else model))
        asked = model if isinstance(model, str) else loaded.name
        job.plan(dict.fromkeys(chosen, 1.0))
        for name in chosen:
            with job.stage(name):
                study = STUDIES[name]
                on = given or load_tasks(study.tasks)
                try:
                    frame, figure = study.make(on, loaded, n_items=n_items, seed=seed, config=config)
                except SitelensError as error:
                    if len(chosen) == 1:
                        raise
                    outputs.missing[name] = f"could not be made: {error}"
                    continue
                command = _command(name, asked, tasks, n_items, seed, config)
                facts = {"caption": study.caption, "tasks": [task.name for task in on], "seed": seed,
                         "train": asdict(config), **data_facts(on, study.items(n_items))}  # fmt: skip
                write_figure(outputs, figure, frame, name, formats, command, loaded, facts)
    return outputs.paths


def _command(name: str, model: str, tasks: Sequence[str] | None, n_items: int, seed: int, config: TrainConfig) -> str:
    """The `sitelens figures` command that makes one figure."""
    words = [name, "--n-items", n_items, "--seed", seed, "--model", model, *(["--tasks", *tasks] if tasks else [])]
    return f"sitelens figures {shlex.join([*map(str, words), *train_options(config)])}"


def write_figure(
    outputs: Outputs,
    figure: go.Figure,
    data: pd.DataFrame,
    name: str,
    formats: Sequence[str],
    command: str,
    model: ModelLike,
    facts: Mapping[str, Any],
) -> None:
    """Write a figure, its data (NAME.csv) and its provenance (NAME.json).

    Args:
        outputs: collects the paths of written files and the files that could not be written.
        figure: the figure.
        data: the data it shows.
        name: file name without suffix.
        formats: file formats of the figure.
        command: the command that makes the figure.
        model: the model that produced the data.
        facts: further entries of NAME.json, plain JSON.

    Raises:
        SitelensError: for an invalid file name or an unknown format.
    """
    name, formats = check_file_name(name, "name"), figures.check_formats(formats)
    record = json.dumps({"figure": name, **facts, **provenance(command, model)}, indent=1) + "\n"
    outputs.write(f"{name}.csv", lambda path: write_csv(path, data, float_format="%.6g"))
    outputs.write(f"{name}.json", lambda path: write_text(path, record))
    for ending in formats:
        outputs.write(f"{name}.{ending}", functools.partial(figures.save, figure))
