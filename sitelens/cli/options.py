"""Options of the commands, by group. Nothing slow is imported here, so that --help responds at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitelens.metrics import METRICS

METRIC_HELP = "; ".join(f"{metric.name}: {metric.definition}" for metric in METRICS.own.values())


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that shows defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False and "default" not in (action.help or "")
        return super()._get_help_string(action) if shown else action.help


def run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help="a name (see `sitelens tasks`), or a .json or .csv file")
    add("--out", metavar="DIR", type=Path, help="write heatmaps (HTML), selections, scores and run.json there")
    _formats(parser, ["html"])
    add("--again", metavar="RUN.JSON", type=Path, help="repeat the run that a run.json records")
    _model_options(parser)
    _prompt_options(parser)
    template_options(parser)
    _training_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--n-items", metavar="ITEMS", type=int, default=100, help="maximum number of test items per task; 0: all"
    )
    group.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC",
                       default=["first_token"],
                       help=f"metric (default: first_token); {METRIC_HELP}")  # fmt: skip
    group.add_argument("--k", type=int, help="heads in high-alpha, low-alpha and random (default: a quarter of all)")
    group.add_argument("--draws", type=int, default=5, help="random selections")
    group.add_argument("--seed", type=int, default=0, help="decides prompts, demonstrations and test items")


def transfer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK",
        help="at least two names (see `sitelens tasks`), suites such as fv57, or .json or .csv files")  # fmt: skip
    add("--out", metavar="DIR", type=Path, help="write the heatmap, its numbers and the matrix there")
    _formats(parser, ["html"])
    add("--name", default="transfer", help="name of the files")
    add("--swap", choices=["heads", "embedding", "both"], default="heads", help="what comes from the source")
    _model_options(parser)
    _prompt_options(parser)
    template_options(parser)
    _training_options(parser)
    _evaluation_options(parser, metric=True)


def compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help="names (see `sitelens tasks`), suites, or .json or .csv files")
    add("--methods", nargs="+", metavar="METHOD", default=["all"],
        help="any of zero-shot, 10-shot, many-shot, FV, TV, ICV, MTV, I2CL, LTV, LoFiT, LoRA, SITE")  # fmt: skip
    _settings(parser)
    add("--out", metavar="DIR", type=Path, help="write the figure, its numbers and their origin there")
    _formats(parser, ["html"])
    _model_options(parser)
    template_options(parser)
    _evaluation_options(parser)


def suite_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("suite", metavar="SUITE", help="fv57, anli, mmlu-pro, bbh, builtin, or one from an installed package")
    add("--tasks", nargs="+", metavar="TASK", help="only these of its tasks")
    add("--methods", nargs="+", metavar="METHOD", default=["SITE"],
        help="in addition to prompting: any of many-shot, FV, TV, ICV, MTV, I2CL, LTV, LoFiT, LoRA, SITE")  # fmt: skip
    _settings(parser)
    add("--out", metavar="DIR", type=Path, help="write the table, the figure, their numbers and their origin there")
    add("--name", help="name of the files (default: suite-SUITE)")
    _formats(parser, ["html"])
    _model_options(parser)
    add("--n-shots", metavar="N", type=int, default=10, help="demonstrations of few-shot prompting")
    _evaluation_options(parser, metric=True)


def figures_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="FIGURE", help="names of figures (default: all; --list shows them)")
    add("--list", action="store_true", help="list the figures")
    add("--out", metavar="DIR", type=Path, default=Path("figures"), help="where they are written")
    _formats(parser, ["html", "png", "svg"])
    add("--tasks", nargs="+", metavar="TASK", help="instead of each figure's own tasks")
    add("--n-items", metavar="ITEMS", type=int, default=100, help="maximum number of test items per task")
    add("--seed", type=int, default=0, help="decides prompts and test items")
    add("--model", default="smollm2-135m", help="packaged model, hub id, folder or .gguf file")
    add("--memory-budget", metavar="SIZE", help="memory for computation, in addition to the weights (default: 2GiB)")
    _training_options(parser)


def _formats(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument("--formats", nargs="+", choices=["html", "png", "svg", "pdf"], default=default,
                        help=f"of figures (default: {' '.join(default)})")  # fmt: skip


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", nargs="+", metavar="METHOD.FIELD=VALUE", default=[], dest="settings",
                        help="hyperparameters of a method, for example LTV.n_steps=400")  # fmt: skip
    parser.add_argument("--method-file", nargs="+", metavar="FILE", default=[], dest="method_files",
                        help="Python files that define methods of your own, for --methods to name")  # fmt: skip


def verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", default="smollm2-135m",
                        help="packaged model, hub id, folder or .gguf file")  # fmt: skip
    parser.add_argument("--task", default="antonym", help="task whose prompts are used")
    _loading_options(parser.add_argument_group("model"))


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2-135m", help="packaged model, hub id, folder or .gguf file")
    _loading_options(group)


def _loading_options(group: Any) -> None:
    group.add_argument("--dtype", help="for example float32 or bfloat16 (default: the checkpoint's)")
    group.add_argument("--device", help="for example cpu or cuda (default: a GPU if available)")
    group.add_argument("--device-map", help="'auto' spreads the layers over all GPUs")
    group.add_argument("--quantize", metavar="nf4", help="4-bit weights, as the paper loads its large models")
    group.add_argument(
        "--memory-budget", metavar="SIZE", help="memory for computation, in addition to the weights (default: 2GiB)"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that ships with the model")


def _prompt_options(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("prompts and task embedding")
    group.add_argument("--n-prompts", metavar="M", type=int, default=50, help="number of prompts in the embedding")
    group.add_argument("--n-shots", metavar="N", type=int, default=10, help="demonstrations per prompt")
    return group


def template_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that replace each task's own template, instruction and template arguments."""
    group = parser.add_argument_group("template")
    group.add_argument("--template", help="text with {input} and {output}, or 'chat' (default: the task's own)")
    group.add_argument("--instruction", metavar="TEXT", help="text before the demonstrations (default: the task's)")
    group.add_argument("--template-arg", nargs="+", metavar="NAME=VALUE", dest="template_arguments",
                       help="variables for the chat template, for example enable_thinking=false")  # fmt: skip


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--n-steps", type=int, default=400, help="optimizer steps")
    group.add_argument("--lr", type=float, default=0.2, help="learning rate")
    group.add_argument("--batch-size", type=int, default=1, help="training items per step")
    group.add_argument("--eval-every", metavar="STEPS", type=int, default=50, help="steps between validations")
    group.add_argument("--n-valid", metavar="ITEMS", type=int, default=100, help="validation items at most")
    group.add_argument("--checkpoint", choices=["best", "last"], default="best", help="which alpha is used")
    group.add_argument("--init", metavar="ALPHA", default="0.5", help="alpha at the start, or 'random'")
    group.add_argument("--mixing", choices=["convex", "additive"], default="convex", help="(1 - a) z + a v, or z + a v")
    group.add_argument("--train-seed", metavar="SEED", type=int, default=0, help="decides which items are drawn")


def _evaluation_options(parser: argparse.ArgumentParser, metric: bool = False) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--n-items", metavar="ITEMS", type=int, default=100, help="maximum number of test items per task; 0: all"
    )
    if metric:
        group.add_argument("--metric", choices=METRICS, metavar="METRIC", default="first_token",
                           help=f"metric; {METRIC_HELP}")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="decides prompts, training and test items")
