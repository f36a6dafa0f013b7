"""The `sitelens` command: the library's verbs from a shell. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitelens import __version__
from sitelens.cli.options import Help, compare_options, figures_options, run_options, transfer_options
from sitelens.defaults import SitelensError, SitelensWarning, settings

if TYPE_CHECKING:
    from sitelens.config import TrainConfig
    from sitelens.report import RunConfig


# Options of `run` that a run.json does not record, so that they may stand beside --again.
_NOT_RECORDED = ("again", "out", "formats", "dtype", "device", "memory_budget", "cache", "data", "progress", "command")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 1 for input that cannot be used (2: a wrong command line)."""
    options = _parser().parse_args(arguments)
    settings.progress = options.progress
    if options.cache is not None:
        settings.cache_dir = options.cache
    if options.data is not None:
        settings.data_dir = options.data
    command: Callable[[argparse.Namespace], None] = options.command
    with warnings.catch_warnings():
        warnings.simplefilter("always", SitelensWarning)
        warnings.showwarning = _show_warning
        try:
            command(options)
            sys.stdout.flush()
        except SitelensError as error:
            print(f"sitelens: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("sitelens: interrupted; what was finished is cached, run the same command to go on", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has left, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails too
            return 0
    return 0


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    from sitelens.tasks import load_tasks

    with warnings.catch_warnings():  # the run itself says them
        warnings.simplefilter("ignore", SitelensWarning)
        load_tasks(config.tasks)  # a wrong name shows before a model is loaded
    from sitelens.models import load_model
    from sitelens.report import run

    model = load_model(config.model, dtype=options.dtype, device=options.device)
    report = run(config, model, memory_budget=options.memory_budget)
    for metric in config.metrics:
        print(f"{metric.replace('_', ' ')}, per cent, 95% intervals, {config.n_items or 'all'} test items at most "
              f"a task, model {config.model}\n")  # fmt: skip
        print(report.table(metric) + "\n")
    print(f"random: mean of {config.draws} draws, ± their standard deviation; echo: answering with the query itself")
    if options.out is not None:
        report.save(options.out, options.formats)
        print(f"heatmaps, selections, embeddings, scores and run.json are in {options.out}")


def _config(options: argparse.Namespace) -> RunConfig:
    from sitelens.report import RunConfig

    if options.again is not None:
        usual = vars(_parser().parse_args(["run"]))
        changed = [name for name, value in usual.items() if name not in _NOT_RECORDED and value != vars(options)[name]]
        if changed:
            raise SitelensError(f"give tasks and options or --again run.json, not both: {', '.join(changed)}")
        return RunConfig.load(options.again)
    if not options.tasks:
        raise SitelensError("name at least one task; `sitelens tasks` lists them")
    return RunConfig(
        tasks=tuple(options.tasks), template=options.template, model=options.model, n_prompts=options.n_prompts,
        n_shots=options.n_shots, train=_train_config(options), k=options.k, draws=options.draws,
        n_items=options.n_items or None, metrics=tuple(dict.fromkeys(options.metrics)), seed=options.seed,
    )  # fmt: skip


def _train_config(options: argparse.Namespace) -> TrainConfig:
    from sitelens.config import TrainConfig

    return TrainConfig(
        steps=options.steps, lr=options.lr, batch_size=options.batch_size, eval_every=options.eval_every,
        n_valid=options.n_valid, checkpoint=options.checkpoint, mixing=options.mixing, seed=options.train_seed,
        init=options.init if options.init == "random" else _number(options.init, "--init"),
    )  # fmt: skip


def _transfer(options: argparse.Namespace) -> None:
    train = _train_config(options)
    from sitelens.tasks import load_tasks

    tasks = load_tasks(options.tasks)  # a wrong name shows before a model is loaded
    from sitelens.gallery import save_figure
    from sitelens.models import load_model
    from sitelens.transfer import transfer_matrix

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    grid = transfer_matrix(
        tasks, model, swap=options.swap, n_items=options.n_items or None, metric=options.metric,
        n_prompts=options.n_prompts, n_shots=options.n_shots, config=train, seed=options.seed,
        memory_budget=options.memory_budget,
    )  # fmt: skip
    print(f"{options.metric.replace('_', ' ')} accuracy in per cent, model {options.model}: sources down, targets "
          f"across, {options.swap} of the source\n")  # fmt: skip
    print((100 * grid.frame).round().astype(int).to_string() + "\n")
    print((100 * grid.zero_shot).round().astype(int).rename("zero-shot").to_frame().T.to_string())
    if options.out is not None:
        command = f"sitelens transfer {' '.join(options.tasks)} --swap {options.swap} --model {options.model}"
        facts = {"n_items": options.n_items, "seed": options.seed, "train": asdict(train)}
        save_figure(grid.heatmap(), grid.long(), "transfer", options.out, options.formats, command, model, facts)
        grid.save(options.out / "transfer.safetensors")
        print(f"\nheatmap, transfer.csv, transfer.json and transfer.safetensors are in {options.out}")


def _compare(options: argparse.Namespace) -> None:
    import json

    from sitelens.tasks import load_tasks

    tasks = load_tasks(options.tasks)  # a wrong name shows before a model is loaded
    from sitelens import figures
    from sitelens.comparison import by_method, checked_methods, compare
    from sitelens.gallery import save_figure
    from sitelens.models import load_model

    methods: Any = "all" if options.methods == ["all"] else checked_methods(options.methods)
    chosen: dict[str, dict[str, Any]] = {}
    for setting in options.settings:
        key, _, value = setting.partition("=")
        method, _, option = key.partition(".")
        try:
            chosen.setdefault(method, {})[option] = json.loads(value)
        except json.JSONDecodeError as error:
            raise SitelensError(f"--set takes METHOD.OPTION=VALUE with a JSON value, got {setting!r}") from error
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    n_items = options.n_items or None
    frame = compare(tasks, methods, model, n_items=n_items, seed=options.seed, options=chosen)
    wide = frame.pivot(index="method", columns="task", values="accuracy").reindex(frame["method"].unique())
    print(f"first-token accuracy in per cent, at most {n_items or 'all'} test items a task, model {options.model}\n")
    print((100 * wide).round().astype(int).to_string() + "\n")
    print(by_method(frame).round(3).to_string(index=False))
    if options.out is not None:
        words = [*options.tasks, "--methods", *options.methods, *(["--set", *options.settings] if chosen else [])]
        command = f"sitelens compare {' '.join(words)} --n-items {options.n_items} --model {options.model}"
        facts = {"n_items": options.n_items, "seed": options.seed, "options": chosen}
        save_figure(figures.comparison(frame), frame, "comparison", options.out, options.formats, command, model, facts)
        print(f"\nfigure, comparison.csv and comparison.json are in {options.out}")


def _figures(options: argparse.Namespace) -> None:
    from sitelens.gallery import PICTURES, make_figures

    if options.list:
        print("\n".join(f"{name:<26}{picture.caption}" for name, picture in PICTURES.items()))
        return
    written = make_figures(
        options.names or None, options.out, options.model, tasks=options.tasks, n_items=options.n_items,
        seed=options.seed, formats=options.formats, memory_budget=options.memory_budget,
    )  # fmt: skip
    print("\n".join(map(str, written)))


def _tasks(options: argparse.Namespace) -> None:
    from sitelens.tasks import list_tasks

    frame = list_tasks()
    if options.pattern:
        frame = frame[frame["name"].str.contains(options.pattern, regex=False)]
    if options.built_in:
        frame = frame[frame["source"] == "built in"]
    if frame.empty:
        raise SitelensError(f"no task has {options.pattern!r} in its name")
    if options.names:
        print("\n".join(frame["name"]))
        return
    shown = frame.drop(columns="source").assign(items=frame["items"].astype("string").fillna("?"))
    print(shown.to_string(index=False))
    print("\nOwn tasks: a .json file (a list of {input, output}) or a .csv file with these columns.")


def _models(options: argparse.Namespace) -> None:
    from sitelens.conversion import list_models

    print(list_models().to_string(index=False))
    print("\nAlso a hub id (owner/name), a folder with a transformers model, or a .gguf file.")


def _cache(options: argparse.Namespace) -> None:
    import shutil

    from sitelens.store import default_store

    store, models = default_store(), settings.cache() / "models"
    entries = store.entries()
    if options.clear is not None:
        kind = None if options.clear == "all" else options.clear
        print(f"removed {store.clear(kind)} artifacts")
        if options.clear in ("all", "models") and models.exists():
            shutil.rmtree(models)
            print("removed the converted models")
        return
    print(f"artifacts in {store.root}\n")
    if options.verbose and len(entries):
        print(
            entries.assign(model=entries["model"].str[:12]).drop(columns="path").fillna("-").to_string(index=False)
            + "\n"
        )
    for kind, group in entries.groupby("kind"):
        print(f"{kind:<12} {len(group):>6} files  {_size(int(group['bytes'].sum()))}")
    for folder in sorted(models.glob("gguf-*/")):
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"model        {folder.name}  {_size(size)}")
    if entries.empty and not models.exists():
        print("nothing yet")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sitelens",
        description="Find the attention heads in which a language model keeps a task, and inject the task there.",
        epilog="Start with: sitelens run antonym --out figures/antonym",
    )
    parser.add_argument("--version", action="version", version=f"sitelens {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("everywhere")
    group.add_argument(
        "--cache", metavar="DIR", type=Path, help="cache folder (default: SITELENS_CACHE, or the user's)"
    )
    group.add_argument(
        "--data", metavar="DIR", type=Path, help="folder with data sets (default: SITELENS_DATA, or download)"
    )
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bars (default: in a terminal only)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, act: Callable[[argparse.Namespace], None], text: str, more: str = "") -> Any:
        added = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}", parents=[common],
            formatter_class=Help,
        )  # fmt: skip
        added.set_defaults(command=act)
        return added

    run_options(command(
        "run", _run, "train head selections and compare them with prompting",
        "For each task: accuracy under zero-shot and few-shot prompting, SITE (soft selection), and hard, high-alpha, "
        "low-alpha and random heads. Everything computed is cached.",
    ))  # fmt: skip
    transfer_options(command(
        "transfer", _transfer, "how well each task's heads serve every other task",
        "Embeddings and selections are made where they are missing. Everything computed is cached.",
    ))  # fmt: skip
    compare_options(command(
        "compare", _compare, "compare ways of adapting the model to tasks, and what they cost",
        "Function vectors, task vectors, LoRA and others, fitted alike. Everything computed is cached.",
    ))  # fmt: skip
    figures_options(command(
        "figures", _figures, "make the figures of the paper's analyses",
        "Each with its data (.csv) and where it came from (.json) beside it.",
    ))  # fmt: skip
    tasks = command("tasks", _tasks, "list the tasks", "With a word: those whose name contains it.")
    tasks.add_argument("pattern", nargs="?", help="part of a name")
    tasks.add_argument("--built-in", action="store_true", help="only those that need no download")
    tasks.add_argument("--names", action="store_true", help="only the names, a line each")
    command("models", _models, "list the packaged models")
    cache = command("cache", _cache, "show or clear the cache")
    cache.add_argument("--clear", metavar="KIND", nargs="?", const="all",
                       choices=["all", "embedding", "selection", "scores", "method", "comparison", "models", "damaged"],
                       help="remove all, or one kind")  # fmt: skip
    cache.add_argument("--verbose", action="store_true", help="a line for each artifact")
    return parser


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SitelensError(f"{option} must be a number or 'random', not {text!r}") from None


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, SitelensWarning):
        print(f"sitelens: note: {message}", file=sys.stderr)
