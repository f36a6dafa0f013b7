"""The `sitelens` command: the library's verbs from a shell. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitelens import __version__
from sitelens.defaults import SitelensError, SitelensWarning, settings

if TYPE_CHECKING:
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
    from sitelens.config import TrainConfig
    from sitelens.report import RunConfig

    if options.again is not None:
        usual = vars(_parser().parse_args(["run"]))
        changed = [name for name, value in usual.items() if name not in _NOT_RECORDED and value != vars(options)[name]]
        if changed:
            raise SitelensError(f"give tasks and options or --again run.json, not both: {', '.join(changed)}")
        return RunConfig.load(options.again)
    if not options.tasks:
        raise SitelensError("name at least one task; `sitelens tasks` lists them")
    train = TrainConfig(
        steps=options.steps, lr=options.lr, batch_size=options.batch_size, eval_every=options.eval_every,
        n_valid=options.n_valid, checkpoint=options.checkpoint, mixing=options.mixing, seed=options.train_seed,
        init=options.init if options.init == "random" else _number(options.init, "--init"),
    )  # fmt: skip
    return RunConfig(
        tasks=tuple(options.tasks), template=options.template, model=options.model, n_prompts=options.n_prompts,
        n_shots=options.n_shots, train=train, k=options.k, draws=options.draws, n_items=options.n_items or None,
        metrics=tuple(dict.fromkeys(options.metrics)), seed=options.seed,
    )  # fmt: skip


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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that are no values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False and "default" not in (action.help or "")
        return super()._get_help_string(action) if shown else action.help


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
            formatter_class=_Help,
        )  # fmt: skip
        added.set_defaults(command=act)
        return added

    _run_options(command(
        "run", _run, "train head selections and compare them with prompting",
        "For each task: accuracy under zero-shot and few-shot prompting, SITE (soft selection), and hard, high-alpha, "
        "low-alpha and random heads. Everything computed is cached.",
    ))  # fmt: skip
    tasks = command("tasks", _tasks, "list the tasks", "With a word: those whose name contains it.")
    tasks.add_argument("pattern", nargs="?", help="part of a name")
    tasks.add_argument("--built-in", action="store_true", help="only those that need no download")
    tasks.add_argument("--names", action="store_true", help="only the names, a line each")
    command("models", _models, "list the packaged models")
    cache = command("cache", _cache, "show or clear the cache")
    cache.add_argument("--clear", metavar="KIND", nargs="?", const="all",
                       choices=["all", "embedding", "selection", "scores", "models", "damaged"],
                       help="remove all, or one of: embedding, selection, scores, models, damaged")  # fmt: skip
    cache.add_argument("--verbose", action="store_true", help="a line for each artifact")
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help="a name (see `sitelens tasks`), or a .json or .csv file")
    add("--out", metavar="DIR", type=Path, help="write heatmaps (HTML), selections, scores and run.json there")
    add("--formats", nargs="+", choices=["html", "png", "svg", "pdf"], default=["html"],
        help="of the heatmaps (default: html)")  # fmt: skip
    add("--again", metavar="RUN.JSON", type=Path, help="make the run again that a run.json records")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2-135m", help="packaged model, hub id, folder or .gguf file")
    group.add_argument("--dtype", help="for example float32 or bfloat16 (default: the checkpoint's)")
    group.add_argument("--device", help="for example cpu or cuda (default: a GPU where there is one)")
    group.add_argument("--memory-budget", metavar="SIZE", help="extra memory beside the weights (default: 2GiB)")
    group = parser.add_argument_group("prompts and task embedding")
    group.add_argument("--n-prompts", metavar="M", type=int, default=50, help="prompts averaged over")
    group.add_argument("--n-shots", metavar="N", type=int, default=10, help="demonstrations a prompt")
    group.add_argument("--template", help="text with {input} and {output}, or 'chat' (default: the task's own)")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=400, help="Adam steps")
    group.add_argument("--lr", type=float, default=0.2, help="learning rate")
    group.add_argument("--batch-size", type=int, default=1, help="training items a step")
    group.add_argument("--eval-every", metavar="STEPS", type=int, default=50, help="steps between validations")
    group.add_argument("--n-valid", metavar="ITEMS", type=int, default=100, help="validation items at most")
    group.add_argument("--checkpoint", choices=["best", "last"], default="best", help="which alpha is kept")
    group.add_argument("--init", metavar="ALPHA", default="0.5", help="alpha at the start, or 'random'")
    group.add_argument("--mixing", choices=["convex", "additive"], default="convex", help="(1 - a) z + a v, or z + a v")
    group.add_argument("--train-seed", metavar="SEED", type=int, default=0, help="decides which items are drawn")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--n-items", metavar="ITEMS", type=int, default=100, help="test items a task at most; 0: all")
    group.add_argument("--metrics", nargs="+", choices=["first_token", "exact_match", "prefix_match"],
                       default=["first_token"],
                       help="how answers are scored (default: first_token)")  # fmt: skip
    group.add_argument("--k", type=int, help="heads in high-alpha, low-alpha and random (default: a quarter of all)")
    group.add_argument("--draws", type=int, default=5, help="random selections")
    group.add_argument("--seed", type=int, default=0, help="decides prompts, demonstrations and test items")


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


if __name__ == "__main__":
    sys.exit(main())
