"""Random unusual arguments and files: each works or gives a one-line error. Thousands of them with `-m slow`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sitelens as sl
from sitelens import cli
from sitelens.cli.command import command_parser
from sitelens.models import loading
from sitelens.models.model import Bridge
from sitelens.reports import gallery
from sitelens.tasks.files import ENDINGS
from tests import micro

FEW, MANY = 150, 2500
SETTINGS: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck),
}  # fmt: skip


def how_many(few: int, many: int) -> Callable[[Any], Any]:
    """Parametrize a property test with few examples, and with many as a slow test."""

    def mark(function: Any) -> Any:
        return pytest.mark.parametrize(
            "examples", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
        )(function)

    return mark


# Command lines

ODD = st.sampled_from([
    "", " ", "0", "-1", "1", "3", "2.5", "1e9", "9" * 5000, "nan", "inf", "-inf", "many", "None", "null", "true",
    "first_token", "heads", "random", "best", "'", '"', "\\", "\0", "\n", "\ud83d", "💥", "x" * 3000, "../..", "/", "~",
    "~nobody/x", "a=b", "=", "--", "-", "-x", "--n-steps", "{input}{output}", "{input} {output}", "{", "chat", "a.b=c",
    "LTV.n_steps=100", "LTV.step=100", "FV.scope=generation", "FV.scope=7", "SITE.lr=NaN", "SITE=1",
    "LoRA.learning_rates=[1,\"x\"]",
    "LoRA.rank=" + "[" * 3000, "x=" + "9" * 5000, "enable_thinking=false", "strftime_now=9", "1GiB", "-1GiB",
    "antonym", "antonim", "fv/antonym", "bbh", "nowhere.csv", "shift.csv", "broken.json", "x.gguf", "1e400GiB",
    "SITE", "FV", "all", "html", "png", "svg", "cuda", "meta", "cpu", "float32", "float33", "nf4", "auto", "comparison",
])  # fmt: skip
WORDS = st.one_of(ODD, ODD, st.text(max_size=12))


def options_of(command: str) -> list[str]:
    """All options of a command."""
    parser: Any = command_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return sorted(commands.choices[command]._option_string_actions)


COMMANDS = ["run", "transfer", "compare", "suite", "figures", "tasks", "models", "cache"]
OPTIONS = {command: options_of(command) for command in COMMANDS}


@st.composite
def command_lines(draw: Any) -> list[str]:
    command = draw(st.sampled_from(COMMANDS))
    words = [command, *draw(st.lists(st.sampled_from(["antonym", "synonym", "shift.csv"]), max_size=2))]
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from(OPTIONS[command]))
        if draw(st.integers(0, 9)) == 0:
            option = option[:-1]  # an abbreviation
        words += [option, *draw(st.lists(WORDS, max_size=2))]
    if draw(st.integers(0, 19)) == 0:
        words = draw(st.lists(WORDS, max_size=4))
    return words


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which commands check everything that needs no model, and then fail before loading one."""

    def stop(*_: Any, **__: Any) -> None:
        raise sl.SitelensError("a model would be loaded")

    for module in (loading, gallery):
        monkeypatch.setattr(module, "load_model", stop)
    monkeypatch.setattr("sitelens.cli.listings._clear", stop)
    monkeypatch.setattr("sitelens.figures.missing_tool", lambda formats: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SITELENS_TRACEBACK", "1")
    (tmp_path / "shift.csv").write_text("input,output\n" + "".join(f"w{i},v{i}\n" for i in range(30)))
    (tmp_path / "broken.json").write_text('{"config": {"tasks": [[]], "train": {"n_steps": [1]}, "metrics": 3}}')
    return tmp_path


@how_many(60, 400)
def test_every_command_line_ends_in_an_exit_code(idle: Path, examples: int):
    @settings(max_examples=examples, **SETTINGS)
    @given(words=command_lines())
    def check(words: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(words)
            except SystemExit as stop:
                code = stop.code
        assert code in (0, 1, 2), words
        last = err.getvalue().strip().splitlines()[-1:]
        if code == 1:
            assert last and last[0].startswith("sitelens: "), (words, last)
        if code == 2:
            assert "error: " in last[0], (words, last)

    check()


# Functions


NUMBERS: list[Any] = [
    0, 1, 2, 3, -1, True, 2.0, 2.5, float("nan"), float("inf"), -0.0, 10**30, np.int64(2), np.int8(1), np.uint8(2),
    np.float32(0.1), np.float64(2), np.array(2), np.array([2]), np.array([[1]]), torch.tensor(2), torch.tensor(0.5),
    "2", "many", "", None, [], [2], {}, {"n_steps": 1}, object(), 1j, b"2", range(2), np.arange(2), {0, 1}, Ellipsis,
    int,
]  # fmt: skip
THINGS: list[Any] = [
    *NUMBERS, "prompt", "generation", "test", "first_token", ["first_token"], "exact", "\ud83d", "x" * 3000, Path("."),
    sl,
    torch.nn.Linear(1, 1), sl.ZeroShot(), sl.ZeroShot, {"z": sl.ZeroShot()}, {"": None}, {1: sl.ZeroShot()},
    sl.TrainConfig(n_steps=1), "antonym", ["antonym"], ["antonym", "antonym"], np.array(["a", "b"]), lambda: None,
]  # fmt: skip


def values(*usual: Any) -> st.SearchStrategy[Any]:
    """A usual value or an unusual one."""
    return st.one_of(st.sampled_from(list(usual)), st.sampled_from(range(len(THINGS))).map(THINGS.__getitem__))


@pytest.fixture(scope="module")
def tiny() -> Iterator[Bridge]:
    yield from micro.lent("Llama")


TASK = micro.task("shift", n=20)
SMALL = sl.TrainConfig(n_steps=1, eval_every=1, n_valid=2)
COUNT = values(1, 2)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, st.SearchStrategy[Any]]]] = {
    "TrainConfig": (sl.TrainConfig, {
        "n_steps": COUNT, "lr": values(0.1), "batch_size": COUNT, "eval_every": COUNT, "n_valid": COUNT, "seed": COUNT,
        "init": values("random", 0.5), "checkpoint": values("best"), "mixing": values("convex"),
    }),
    "RunConfig": (sl.RunConfig, {
        "tasks": values(("antonym",)), "model": values("m"), "n_prompts": COUNT, "n_shots": COUNT,
        "train": values(SMALL), "k": COUNT, "draws": COUNT, "n_items": COUNT, "metrics": values("first_token"),
        "seed": COUNT,
    }),
    "embed_task": (sl.embed_task, {"n_prompts": COUNT, "n_shots": COUNT, "seed": COUNT}),
    "evaluate": (sl.evaluate, {
        "conditions": values({"z": sl.ZeroShot()}), "n_items": COUNT, "split": values("test"), "seed": COUNT,
        "metrics": values("first_token"), "max_new_tokens": COUNT, "with_echo": values(True),
    }),
    "generate": (sl.generate, {"prompts": values(["Q: aa\nA:"]), "condition": values(None), "max_new_tokens": COUNT,
                               "stop": values("\n")}),
    "train_selections": (sl.train_selections, {"seeds": values((0,)), "config": values(SMALL), "shared": values(False),
                                               "embeddings": values(None)}),
    "HeadSelection": (sl.HeadSelection, {"alpha": values(torch.ones(2, 4), [[0.5]]), "task": values("a"),
                                         "model": values(None)}),
    "FewShot": (sl.FewShot, {"n_shots": COUNT}),
    "Ablate": (sl.Ablate, {"heads": values("L0H1", [(0, 1)]), "kind": values("zero"), "positions": values("last"),
                           "n_shots": COUNT, "scope": values("generation"), "reference": values(None)}),
    "compare": (sl.compare, {"methods": values("zero-shot", ["zero-shot"], [sl.methods.ZeroShot()]), "n_items": COUNT,
                             "seed": COUNT}),
    "load_task": (sl.load_task, {"name": values("antonym"), "seed": values(None), "split": values("split")}),
    "from_pairs": (sl.Task.from_pairs, {"name": values("t"), "pairs": values([("a", "b")] * 4), "seed": COUNT,
                                        "template": values("{input}: {output}\n"), "instruction": values("")}),
}  # fmt: skip
POSITIONAL = {"embed_task", "evaluate", "train_selections", "compare"}  # first argument: a task, or tasks


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CALLS)
@how_many(12, 150)
def test_odd_arguments_work_or_are_one_line(tiny: Bridge, name: str, examples: int):
    function, arguments = CALLS[name]
    before = repr(sl.settings)

    @settings(max_examples=examples, **SETTINGS)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
        call: dict[str, Any] = {key: data.draw(arguments[key], label=key) for key in chosen}
        usual: dict[str, Any] = {
            "generate": {"prompts": ["Q: aa\nA:"], "max_new_tokens": 2, "model": tiny},
            "evaluate": {"conditions": {"z": sl.ZeroShot()}, "n_items": 2, "max_new_tokens": 2, "model": tiny},
            "embed_task": {"n_prompts": 1, "n_shots": 1, "model": tiny},
            "train_selections": {"config": SMALL, "model": tiny},
            "compare": {"methods": ["zero-shot"], "n_items": 2, "model": tiny},
            "RunConfig": {"tasks": ("antonym",)}, "HeadSelection": {"alpha": torch.ones(2, 4)},
            "Ablate": {"heads": "L0H1"}, "load_task": {"name": "antonym"},
            "from_pairs": {"name": "t", "pairs": [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]},
        }.get(name, {})  # fmt: skip
        first = ([TASK] if name == "train_selections" else TASK,) if name in POSITIONAL else ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(sl.SitelensError):
                function(*first, **usual | call)

    check()
    assert repr(sl.settings) == before and not micro.hooks_left(tiny)


# Task files

CELLS = st.one_of(
    st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.text(max_size=3), max_size=2)
)
KEYS = st.sampled_from(["input", "output", "also", "split", "examples", "train", "valid", "test", "name", "template",
                        "instruction", "template_arguments", "metric", "note", "case_sensitive", "x"])  # fmt: skip
JSON = st.recursive(
    CELLS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
GOOD = {
    ".csv": b"input,output\n" + b"".join(b"w%d,v%d\n" % (i, i) for i in range(6)),
    ".tsv": b"input\toutput\n" + b"".join(b"w%d\tv%d\n" % (i, i) for i in range(6)),
    ".json": json.dumps([{"input": f"w{i}", "output": f"v{i}"} for i in range(6)]).encode(),
    ".jsonl": b"".join(b'{"input": "w%d", "output": "v%d"}\n' % (i, i) for i in range(6)),
}
HOSTILE = [
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b'[{"input": 1e999, "output": "b"}]' * 2, b"NaN", b"\xef\xbb\xbf",
    b'{"examples": [], "examples": 3}', b'[{"input": ' + b"9" * 5000 + b', "output": "b"}]', b"\0" * 50, b"\xff\xfe",
    b"input,output\n" + b'"' * 999, b"input\ninput\n", b'{"input": "\\ud83d", "output": "x"}\n' * 5, b"sep=,\n", b"",
]  # fmt: skip


@st.composite
def mutated(draw: Any) -> bytes:
    content = bytearray(draw(st.sampled_from(sorted(GOOD.values()))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(content)


@how_many(FEW, MANY)
def test_every_task_file_is_a_task_or_one_line(tmp_path: Path, examples: int):
    @settings(max_examples=examples, **SETTINGS)
    @given(
        ending=st.sampled_from(ENDINGS),
        content=st.one_of(
            st.binary(max_size=60), mutated(), JSON.map(lambda value: json.dumps(value).encode()),
            st.lists(st.dictionaries(KEYS, CELLS, max_size=3), max_size=5).map(lambda rows: json.dumps(rows).encode()),
            st.sampled_from(HOSTILE),
        ),
    )  # fmt: skip
    def check(ending: str, content: bytes) -> None:
        path = tmp_path / f"t{ending}"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(sl.SitelensError):
                assert isinstance(sl.load_task(path), sl.Task)

    check()
