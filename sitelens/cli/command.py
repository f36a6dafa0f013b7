"""The `sitelens` command-line program. Slow imports are postponed until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sitelens.cli import experiments, listings
from sitelens.cli.options import (
    Help,
    compare_options,
    figures_options,
    run_options,
    suite_options,
    transfer_options,
    verify_options,
)
from sitelens.cli.parser import Parser
from sitelens.errors import SitelensError, SitelensWarning, warned_once
from sitelens.files.escaping import visible
from sitelens.files.writing import MissingOutputWarning
from sitelens.settings import settings
from sitelens.store.kinds import Kind
from sitelens.version import __version__

TRACEBACK = "SITELENS_TRACEBACK"  # environment variable; if it is set, unexpected errors are raised


@contextlib.contextmanager
def _escapes() -> Iterator[None]:
    """A context manager in which characters that the output's encoding lacks are printed as escapes."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(OSError, ValueError):  # closed, or its reader has exited
                stream.reconfigure(errors=errors)


@_escapes()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; settings, warnings and output streams are restored afterwards.

    Errors are printed in one line. With SITELENS_TRACEBACK=1 in the environment, unexpected ones are raised instead.

    Args:
        arguments: words of the command line after "sitelens"; None for those of the process.

    Returns:
        0: success. 1: input that cannot be used, an error, or a requested file that could not be written.
        130: interrupted by Ctrl-C.

    Raises:
        SystemExit: for `--help` and `--version` (code 0), and for an invalid command line (code 2).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = command_parser().parse_args(words)
    options.words = words
    asked = {
        "memory_budget": getattr(options, "memory_budget", None),  # only commands that compute have it
        "progress": options.progress, "cache_dir": options.cache, "data_dir": options.data,
    }  # fmt: skip
    command: Callable[[argparse.Namespace], None] = options.command
    with warnings.catch_warnings(), warned_once():
        warnings.simplefilter("always", SitelensWarning)
        incomplete: list[str] = []
        warnings.showwarning = functools.partial(_show_warning, incomplete)
        try:
            with settings.using(**{name: value for name, value in asked.items() if value is not None}):
                command(options)
            sys.stdout.flush()
        except SitelensError as error:
            print(f"sitelens: {visible(str(error))}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("sitelens: interrupted; what was finished is cached, run the same command to go on", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of the output has exited, as in `| head`
            _drop_output()
            return 0
        except OSError as error:
            _drop_output()
            place = f"{error.filename}: " if error.filename else ""
            print(f"sitelens: {visible(f'{place}{error.strerror or error}')}", file=sys.stderr)
            return 1
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            print(f"sitelens: {_unexpected(error)}", file=sys.stderr)
            return 1
    return 1 if incomplete else 0


def _unexpected(error: Exception) -> str:
    """The message for an unexpected error, in one line, with advice."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = visible(f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({said}); a smaller --memory-budget, a smaller --dtype or a smaller model may fit"
    return f"an error in sitelens ({said}); please report it with the traceback that {TRACEBACK}=1 shows"


def command_parser() -> Parser:
    parser = Parser(
        prog="sitelens",
        description="Find the attention heads in which a language model keeps a task, and inject the task there.",
        epilog="Start with: sitelens run antonym --out figures/antonym",
    )
    parser.add_argument("--version", action="version", version=f"sitelens {__version__}")
    common = Parser(add_help=False)
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
        added.set_defaults(command=act, parser=added)
        return added

    run_options(command(
        "run", experiments.run, "train head selections and compare them with prompting",
        "For each task: accuracy under zero-shot and few-shot prompting, SITE (soft selection), and hard, high-alpha, "
        "low-alpha and random heads. Everything computed is cached.",
    ))  # fmt: skip
    transfer_options(command(
        "transfer", experiments.transfer, "how well each task's heads serve every other task",
        "Embeddings and selections are made where they are missing. Everything computed is cached.",
    ))  # fmt: skip
    compare_options(command(
        "compare", experiments.compare, "compare ways of adapting the model to tasks, and what they cost",
        "Function vectors, task vectors, LoRA and others, fitted alike. Everything computed is cached.",
    ))  # fmt: skip
    suite_options(command(
        "suite", experiments.suite, "run a whole benchmark under prompting, SITE and other methods",
        "Tasks train in batches. Everything finished is kept: if interrupted, the same command resumes.",
    ))  # fmt: skip
    figures_options(command(
        "figures", experiments.figures, "make the figures of the paper's analyses",
        "Each is written with its data (.csv) and provenance (.json).",
    ))  # fmt: skip
    verify_options(command(
        "verify", experiments.verify, "check on a model what this library computes",
        "Fast paths, head edits, attention, attribution and generation against the raw network, and which methods the "
        "architecture supports. The exit code is 1 if something fails.",
    ))  # fmt: skip
    tasks = command("tasks", listings.tasks, "list the tasks", "With a word: those whose name contains it.")
    tasks.add_argument("pattern", nargs="?", help="part of a name")
    tasks.add_argument("--built-in", action="store_true", help="only those that need no download")
    tasks.add_argument("--names", action="store_true", help="only the names, a line each")
    command("models", listings.models, "list the packaged models and the paper's")
    cache = command("cache", listings.cache, "show or clear the cache")
    cache.add_argument("--clear", metavar="KIND", nargs="?", const="all",
                       choices=["all", *Kind.cached_kinds(), "models", "damaged"],
                       help="remove all results but no models, or one kind")  # fmt: skip
    cache.add_argument("--models", action="store_true", help="with --clear: remove the converted models, too")
    cache.add_argument("--verbose", action="store_true", help="a line for each artifact")
    return parser


def _show_warning(incomplete: list[str], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Print a SitelensWarning as a one-line note; append those about missing output files to `incomplete`."""
    if issubclass(category, MissingOutputWarning):
        incomplete.append(str(message))
    if issubclass(category, SitelensWarning):
        print(f"sitelens: note: {visible(str(message))}", file=sys.stderr)


def _drop_output() -> None:
    """Discard the rest of the output if it cannot be written; otherwise flushing it at exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # not a stream of the operating system, as in a test
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
