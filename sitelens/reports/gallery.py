"""The figures of `figures/`: each made by a study on the default model, its data and its origin beside it."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sitelens import figures, studies
from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, Seed
from sitelens.errors import SitelensError
from sitelens.evaluation.record import data_facts
from sitelens.files.writing import Outputs, check_file_name, check_folder, write_csv, write_text
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.models.loading import load_model
from sitelens.models.model import Model, model_name
from sitelens.models.provenance import provenance
from sitelens.models.sources import DEFAULT_MODEL
from sitelens.progress import Job
from sitelens.reports.records import train_options
from sitelens.studies import Options
from sitelens.studies.similarity import head_similarity, similarity_predicts_transfer
from sitelens.studies.transfer import transfer_matrix
from sitelens.studies.transfer_result import TransferMatrix
from sitelens.tasks import Task, load_tasks

if TYPE_CHECKING:
    import plotly.graph_objects as go

FOUR = ("antonym", "country-capital", "capitalize", "choose_first_of_3")
TWO = FOUR[:2]
SIXTEEN = (
    *FOUR, "synonym", "present-past", "singular-plural", "english-french", "english-german", "english-spanish",
    "landmark-country", "person-occupation", "person-sport", "lowercase_first_letter", "choose_last_of_3",
    "concept_v_object_3",
)  # fmt: skip
MATRIX_ITEMS = 50  # of each task in a transfer matrix: its cells are many
FORMATS = ("html", "png", "svg")
Made = tuple[pd.DataFrame, "go.Figure"]


@dataclass(frozen=True)
class Picture:
    """One figure: what it shows, on which tasks, and how it is made of them."""

    caption: str
    tasks: tuple[str, ...]
    make: Callable[[Sequence[Task], Model, TrainConfig, Options], Made]
    most_items: int | None = None  # test items per task, whatever is asked for


@checked
def make_figures(
    names: Iterable[str] | None = None,
    folder: str | Path = "figures",
    model: Model | str = DEFAULT_MODEL,
    *,
    tasks: Sequence[str] | None = None,
    n_items: Count = 100,
    seed: Seed = 0,
    formats: Sequence[str] = FORMATS,
    config: TrainConfig | None = None,
) -> list[Path]:
    """Make figures by name (default: all), each with NAME.csv and NAME.json beside it; returns what was written.

    What was computed before is taken from the cache, so an interrupted call goes on where it stopped. `tasks` stand
    in for each figure's own, `config` for the paper's training.

    A figure that cannot be made, or a file that cannot be written, does not keep the others from it: a
    `MissingOutputWarning` names it at the end.

    Raises:
        SitelensError: for an unknown name or format, bad tasks, a folder that cannot be written to, or if nothing could
            be made.
    """
    formats = figures.check_formats(formats)
    check_folder(folder)
    chosen = list(PICTURES if names is None else names)
    unknown = [name for name in chosen if name not in PICTURES]
    if unknown:
        raise SitelensError(f"unknown figure {unknown[0]!r}; there are: {', '.join(PICTURES)}")
    given, config = load_tasks(tasks or ()), config or TrainConfig()  # a wrong name shows before a model is loaded
    with Outputs(folder) as outputs, Job("figures", ["load the model", *chosen]) as job:
        with job.stage("load the model"):
            loaded = load_model(model)
        asked = model if isinstance(model, str) else model_name(loaded)
        job.plan(dict.fromkeys(chosen, 1.0))
        options: Options = {"n_items": n_items, "seed": seed}
        for name in chosen:
            with job.stage(name):
                picture = PICTURES[name]
                on = given or load_tasks(picture.tasks)
                try:
                    frame, figure = picture.make(on, loaded, config, options)
                except SitelensError as error:
                    if len(chosen) == 1:
                        raise
                    outputs.missing[name] = f"could not be made: {error}"
                    continue
                command = _command(name, asked, tasks, n_items, seed, config)
                most = n_items if picture.most_items is None else min(n_items, picture.most_items)
                facts = {"caption": picture.caption, "tasks": [task.name for task in on], "seed": seed,
                         "train": asdict(config), **data_facts(on, most)}  # fmt: skip
                write_figure(outputs, figure, frame, name, formats, command, loaded, facts)
    return outputs.paths


def _command(name: str, model: str, tasks: Sequence[str] | None, n_items: int, seed: int, config: TrainConfig) -> str:
    """The command that makes a figure."""
    words = [name, "--n-items", n_items, "--seed", seed, "--model", model, *(["--tasks", *tasks] if tasks else [])]
    return f"sitelens figures {shlex.join([*map(str, words), *train_options(config)])}"


def write_figure(
    outputs: Outputs,
    figure: go.Figure,
    data: pd.DataFrame,
    name: str,
    formats: Sequence[str],
    command: str,
    model: Model,
    facts: Mapping[str, Any],
) -> None:
    """Write a figure, its data as NAME.csv, and NAME.json: the facts, the command, the model and all versions.

    Raises:
        SitelensError: for a name that is no file name, or an unknown format.
    """
    name, formats = check_file_name(name, "name"), figures.check_formats(formats)
    record = json.dumps({"figure": name, **facts, **provenance(command, model)}, indent=1) + "\n"
    outputs.write(f"{name}.csv", lambda path: write_csv(path, data, float_format="%.6g"))
    outputs.write(f"{name}.json", lambda path: write_text(path, record))
    for ending in formats:
        outputs.write(f"{name}.{ending}", functools.partial(figures.save, figure))


def study(
    caption: str,
    function: Callable[..., pd.DataFrame],
    draw: Callable[..., go.Figure],
    tasks: tuple[str, ...] = FOUR,
    **more: Any,
) -> Picture:
    """A picture of a study that takes tasks."""

    def make(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
        frame = function(on, model, config=config, **more, **options)
        return frame, draw(frame)

    return Picture(caption, tasks, make)


def _grid(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> TransferMatrix:
    n_items = min(MATRIX_ITEMS, options.get("n_items") or MATRIX_ITEMS)
    return transfer_matrix(on, model, n_items=n_items, seed=options.get("seed", 0), config=config)


def _transfer(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    grid = _grid(on, model, config, options)
    return grid.clustered().frame, grid.heatmap("")


def _similarity(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    similarity = head_similarity(on, model, config=config)
    return similarity.frame, similarity.heatmap("pearson", "")


def _similarity_summary(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    similarity, grid = head_similarity(on, model, config=config), _grid(on, model, config, options)
    found = similarity_predicts_transfer(similarity, grid)
    frame = similarity.summary().merge(found, on="measure")
    r, p = float(found["r"].iloc[0]), float(found["p"].iloc[0])
    title = f"r = {r:.2f}, QAP p {'<' if p < 0.001 else '='} {max(p, 0.001):.3f}"
    return frame, figures.similarity_against_transfer(similarity.matrix(), grid.normalized(), title)


def _loss_path(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    frames = []
    for task in on:
        runs = studies.initialization_runs([task], model, inits=(0.5, "random"), seeds=(0, 1), config=config, **options)
        first, other, drawn = (runs[task.name, init, seed] for init, seed in ((0.5, 0), (0.5, 1), ("random", 0)))
        for label, end in (("another seed", other), ("a random start", drawn)):
            ends = first[1].selection, end[1].selection
            path = studies.loss_path(task, *ends, first[0], model, mixing=config.mixing, **options)
            frames.append(path.assign(path=f"{task.name}, to {label}"))
    frame = pd.concat(frames, ignore_index=True)
    return frame, figures.loss_path(frame)


def _curves(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    runs = train_selections(on, model, config=config)
    frame = pd.concat([result.history.assign(task=name) for (name, _), result in runs.items()], ignore_index=True)
    return frame, figures.training_curves(frame)


def _costs(on: Sequence[Task], model: Model, config: TrainConfig, options: Options) -> Made:
    frame = studies.costs(on[0], model, config=config, **options)
    return frame, figures.costs(frame)


PICTURES: dict[str, Picture] = {
    "transfer": Picture("Heads of every task on every task.", SIXTEEN, _transfer, MATRIX_ITEMS),
    "similarity": Picture("Similarity of alphas; a task with itself is under another seed.", SIXTEEN, _similarity),
    "similarity-transfer": Picture("Whether similar heads transfer.", SIXTEEN, _similarity_summary, MATRIX_ITEMS),
    "soft-hard": study("Hard selection over its threshold.", studies.soft_hard, figures.soft_hard),
    "random-heads": study("Heads drawn at random.", studies.random_heads, figures.random_heads),
    "head-counts": study("Heads added and removed by alpha.", studies.head_counts, figures.head_counts),
    "task-agnostic": study("One alpha for all tasks.", studies.task_agnostic, figures.task_agnostic),
    "mixing": study("Convex against additive mixing.", studies.mixing, figures.mixing),
    "prompt-counts": study("Prompts and shots of the embedding.", studies.prompt_counts, figures.prompt_counts, TWO),
    "seed-variance": study("Prompt seeds and training seeds.", studies.seed_variance, figures.seed_variance, TWO),
    "initializations": study("Where alpha starts.", studies.initializations, figures.initializations, TWO),
    "initialization-distances": study(
        "Distances between the alphas found.", studies.initialization_distances, figures.initialization_distances, TWO
    ),
    "loss-path": Picture("Loss on the line between two alphas.", TWO, _loss_path),
    "checkpoints": study("Best against last checkpoint.", studies.checkpoints, figures.checkpoints),
    "alpha-histogram": study("Alpha after training.", studies.alpha_distribution, figures.alpha_distribution),
    "alpha-layers": study(
        "Selected heads by layer.", studies.alpha_distribution, figures.alpha_distribution, by="layer"
    ),
    "alpha-training": study("Alpha over training.", studies.alpha_distribution, figures.alpha_distribution, by="step"),
    "training-curves": Picture("Validation loss over training.", FOUR, _curves),
    "costs": Picture("Seconds over the number of prompts.", FOUR[:1], _costs),
    "head-overlap": study("Known kinds of heads among the selected.", studies.head_overlap, figures.head_overlap),
    "shared-attention": study("Attention of shared heads.", studies.shared_attention, figures.shared_attention),
}
