"""A suite, metric, condition, method or study in a user's own file works wherever sitelens's own ones work.

Every test runs a file outside of the package in a new process; the file uses public names only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # each test starts one or more processes

SUITE = '''
import sitelens as sl


class Mine(sl.Suite):
    """Two tasks over the words of built-in ones."""

    name = "mine"
    source = "my laboratory"

    def names(self):
        return ["mine/capitals", "mine/opposites"]

    def load(self, name):
        task = sl.load_task("country-capital" if name == "mine/capitals" else "antonym")
        pairs = [(item.input, item.output) for item in task.train[:40]]
        return sl.Task.from_pairs(name, pairs)

    def describe(self, name):
        return f"forty pairs of {name}"

    def group(self, name):
        return "facts" if name == "mine/capitals" else "words"

    def n_items(self, name):
        return 40
'''

RUN = """
training = {"n_steps": 2, "eval_every": 1, "n_valid": 2}
small = {"methods": [sl.methods.SITE(n_prompts=2, n_shots=2, **training)], "n_shots": 2, "n_items": 4}
model = sl.load_model("model")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as users have it: a folder in the format of the transformers library."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.network().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, model_folder: Path) -> Path:
    """A user's folder that contains the model."""
    (tmp_path / "model").symlink_to(model_folder)
    return tmp_path


def run(home: Path, *arguments: str, expect: int = 0) -> str:
    """Standard output of a new Python process in a user's folder."""
    environment = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{ROOT}", "SITELENS_CACHE": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def run_file(home: Path, text: str) -> list[str]:
    """The lines that a user's file prints."""
    (home / "script.py").write_text(text)
    return run(home, "script.py").splitlines()


def install(home: Path, group: str, name: str, value: str) -> None:
    """Turn the modules in the folder into an installed package with one entry point."""
    folder = home / "mine-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    with (folder / "entry_points.txt").open("a") as file:
        file.write(f"[{group}]\n{name} = {value}\n")


# Suites


def test_a_suite_runs_as_a_value(home: Path) -> None:
    lines = run_file(home, SUITE + RUN + '''
result = sl.run_suite(Mine(), model, **small)
print(*result.tasks["task"], *result.tasks["group"], sep=",")
print(result.left_out)
result.save("out")
print(sorted(set(result.scores["condition"])))
''')  # fmt: skip
    assert lines == [
        "mine/capitals,mine/opposites,facts,words", "{}", "['2-shot', 'SITE', 'zero-shot']",
    ]  # fmt: skip
    assert {"suite-mine.csv", "suite-mine.html", "suite-mine.json"} <= {path.name for path in (home / "out").iterdir()}
    assert "| facts" in (home / "out" / "suite-mine.md").read_text()


def test_the_tasks_of_a_registered_suite_are_known_by_name(home: Path) -> None:
    lines = run_file(home, SUITE.replace("class Mine", "@sl.register_suite\nclass Mine") + RUN + '''
print(len(sl.load_task("mine/capitals").train))
print(*sl.list_tasks().set_index("name").loc["mine/opposites"], sep=", ")
for name in ("mine/capital", "fv58"):
    try:
        sl.load_task(name) if "/" in name else sl.run_suite(name, model)
    except sl.SitelensError as error:
        print(error)
print(sl.run_suite("mine", model, tasks=["mine/capitals"], **small).left_out)
grid = sl.transfer_matrix(
    ["mine/capitals", "mine/opposites"], model, n_prompts=2, n_shots=2, n_items=4, config=sl.TrainConfig(**training)
)
print(grid.groups)
''')  # fmt: skip
    assert lines[:2] == ["28", "words, 40, my laboratory, forty pairs of mine/opposites"]
    assert lines[2].startswith("unknown task 'mine/capital': did you mean mine/capitals,")
    assert lines[3].endswith("(did you mean fv57?); there are: builtin, fv57, anli, mmlu-pro, bbh, mine")
    assert lines[4:] == [
        "{'mine/opposites': 'not requested'}", "{'mine/capitals': 'facts', 'mine/opposites': 'words'}",
    ]  # fmt: skip


def test_a_suite_of_an_installed_package_is_known_to_the_commands(home: Path) -> None:
    (home / "laboratory.py").write_text(SUITE)
    install(home, "sitelens.suites", "mine", "laboratory:Mine")
    assert "forty pairs of mine/opposites" in run(home, "-m", "sitelens.cli", "tasks", "mine/")
    options = ["--model", "model", "--n-shots", "2", "--n-items", "4"]
    assert "facts" in run(home, "-m", "sitelens.cli", "suite", "mine", "--methods", "zero-shot", *options)
    error = run(home, "-m", "sitelens.cli", "suite", "mime", expect=1)
    assert "unknown suite 'mime' (did you mean mine?)" in error


def test_a_broken_entry_point_is_named_and_the_rest_goes_on(home: Path) -> None:
    install(home, "sitelens.suites", "lost", "nowhere:Lost")
    lines = run_file(home, '''
import warnings
import sitelens as sl

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert sl.load_task("antonym").train and not caught
    assert len(sl.list_tasks()) > 100
    sl.list_tasks()
print(*[warning.message for warning in caught], sep="\\n")
''')  # fmt: skip
    assert lines == ["the suite 'lost' (nowhere:Lost) of mine cannot be used: ModuleNotFoundError: No module named "
                     "'nowhere'"]  # fmt: skip


def test_a_suite_that_cannot_be_told_from_others_is_refused(home: Path) -> None:
    lines = run_file(home, SUITE + '''
class Elsewhere(Mine):
    def names(self):
        return ["antonym"]

class Taken(Mine):
    name = "bbh"

class Other(Mine):
    pass

class File(Mine):
    name = "file"
    def names(self):
        return ["file/words.csv"]

class Wrong(Mine):
    name = "wrong"
    def load(self, name):
        return sl.load_task("antonym")

sl.register_suite(Mine)
sl.register_suite(Mine())  # again, as when a cell is run again
for act in (
    lambda: sl.register_suite(Elsewhere), lambda: sl.register_suite(Taken), lambda: sl.register_suite(Other),
    lambda: sl.register_suite(File), lambda: sl.register_suite(3), lambda: sl.register_suite(sl.Task),
    lambda: sl.register_suite(Wrong),
):
    try:
        act()
    except sl.SitelensError as error:
        print(error)
''')  # fmt: skip
    for line, said in zip(lines, (
        "there is a suite 'mine' already, __main__:Mine; choose another name",
        "there is a suite 'bbh' already, sitelens.tasks.benchmarks:Benchmark; choose another name",
        "there is a suite 'mine' already, __main__:Mine; choose another name",
        "suite 'file': the name of a task must be text that is not empty and does not end like a file",
        "a suite must be a sitelens.Suite, not 3",
        "a suite must be a sitelens.Suite, not <class",
        "suite 'wrong': 'mine/capitals' is a task of the suite 'mine'",
    ), strict=True):  # fmt: skip
        assert line.startswith(said)


# Methods

METHOD = '''
from dataclasses import dataclass

import torch

import sitelens as sl


@dataclass(frozen=True, kw_only=True)
class Widest(sl.Method):
    """The task's mean z in the heads whose mean z is longest."""

    name = "widest"
    width: int = 3

    def fit(self, task, model, *, seed=0):
        print("fitting", task.name, self.width)
        embedding = sl.embed_task(task, model, n_prompts=2, n_shots=2, seed=seed)
        norms = embedding.mean_z.norm(dim=-1)
        longest = norms >= norms.flatten().sort().values[-self.width]
        return sl.PatchHeads(sl.HeadSelection(longest.float()), embedding)

    def n_trained(self, condition):
        return self.width


@dataclass(frozen=True, eq=False)
class Louder(sl.Condition):
    """Every head's z of a layer, scaled; a condition of one's own."""

    scale: float
    scope = "generation"

    def fwd_hooks(self, model):
        return [("blocks.0.attn.hook_z", lambda z, hook: self.scale * z)]


@dataclass(frozen=True, kw_only=True)
class Loud(sl.Method):
    scale: float = 2.0

    def fit(self, task, model, *, seed=0):
        print("fitting", task.name, self.scale)
        if task.name == "antonym":
            raise sl.SitelensError("antonyms are loud already")
        return Louder(self.scale)
'''
COMPARED = """
import sitelens as sl
from mine import Loud, Widest

model = sl.load_model("model")
"""


def test_a_method_is_compared_as_a_value(home: Path) -> None:
    (home / "mine.py").write_text(METHOD)
    script = COMPARED + '''
methods = ["zero-shot", Widest(width=2), Widest(width=3), Loud(), "mine:Widest"]
result = sl.compare(["country-capital"], methods, model, n_items=4)
print(*result.frame["method"], *result.frame["trained"])
result.save("out")
figure = result.figure()
print(result.record["methods"]["widest(width=2)"])
'''  # fmt: skip
    lines = run_file(home, script)
    fits = [line for line in lines if line.startswith("fitting")]
    assert fits == ["fitting country-capital 2", "fitting country-capital 3", "fitting country-capital 2.0"]
    assert lines[-2:] == [
        "zero-shot widest(width=2) widest Loud 0 2 3 0", "{'method': 'mine:Widest', 'width': 2}",
    ]  # fmt: skip
    assert "widest(width=2)" in (home / "out" / "comparison.md").read_text()
    again = run_file(home, script)
    assert not any(line.startswith("fitting") for line in again) and again[-2:] == lines[-2:]
    (home / "mine.py").write_text(METHOD.replace("[-self.width]", "[-1]"))  # other code: other results
    assert len([line for line in run_file(home, script) if line.startswith("fitting")]) == 2


def test_a_methods_condition_is_saved_and_loaded_and_its_fields_are_checked(home: Path) -> None:
    (home / "mine.py").write_text(METHOD)
    lines = run_file(home, COMPARED + '''
condition = Loud(scale=3).fit(sl.load_task("country-capital"), model)
path = condition.save("loud.safetensors")
print(sl.Condition.load(path).scale)
for scale in ("x", None):
    try:
        Loud(scale=scale)
    except sl.SitelensError as error:
        print(error)
try:
    sl.compare(["country-capital"], ["wides"], model)
except sl.SitelensError as error:
    print(error)
''')  # fmt: skip
    assert lines == [
        "fitting country-capital 3.0", "3.0", "Loud.scale must be a number, not 'x'",
        "Loud.scale must be a number, not None", "unknown method 'wides': did you mean widest?",
    ]  # fmt: skip


def test_a_suite_runs_a_method_and_leaves_out_where_it_fails(home: Path) -> None:
    (home / "mine.py").write_text(METHOD)
    lines = run_file(home, COMPARED + '''
result = sl.run_suite("builtin", model, tasks=["antonym", "country-capital"], methods=[Widest(), Loud()], n_items=4,
                      n_shots=2)
print(result.left_out["antonym, Loud"])
print(sorted(set(result.scores["condition"])), sorted(result.conditions["Loud"]))
result.save("out")
''')  # fmt: skip
    assert lines[-2:] == ["antonyms are loud already", "['2-shot', 'Loud', 'widest', 'zero-shot'] ['country-capital']"]
    assert "widest" in (home / "out" / "suite-builtin.md").read_text()


def test_a_method_of_a_file_or_an_installed_package_is_known_to_the_command(home: Path) -> None:
    (home / "mine.py").write_text(METHOD)
    command = ["-m", "sitelens.cli", "compare", "country-capital", "--model", "model", "--n-items", "4", "--methods"]
    assert "unknown method 'widest'" in run(home, *command, "widest", expect=1)
    file = ["widest", "zero-shot", "--method-file", "mine.py", "--set"]
    assert "| widest |" in run(home, *command, *file, "widest.width=2").replace("widest(width=2)", "widest")
    assert "widest.width must be a whole number, not 'x'" in run(home, *command, *file, "widest.width=x", expect=1)
    assert "widest has no option 'with': did you mean width?" in run(home, *command, *file, "widest.with=1", expect=1)
    install(home, "sitelens.methods", "widest", "mine:Widest")
    install(home, "sitelens.methods", "lost", "nowhere:Lost")
    assert "| widest |" in run(home, *command, "widest", "zero-shot")
    error = run(home, *command, "widset", expect=1)
    assert "'lost'" in error and "did you mean widest?" in error


# Metrics and conditions

METRIC = """
import sitelens as sl

VOWELS = "aeiou"

def begins_with_a_vowel(output, target):
    return output.token_text.strip()[:1] in VOWELS

def close(output, target):
    return output.rank <= 100

vowel = sl.Metric("vowel", begins_with_a_vowel, definition="the likeliest token begins with a vowel")
"""

CONDITION = '''
from dataclasses import dataclass

@dataclass(frozen=True, eq=False)
class Louder(sl.Condition):
    """The last token's final state, scaled."""

    factor: float = 2.0

    def fwd_hooks(self, model):
        return [("ln_final.hook_out", lambda tensor, hook=None: tensor * self.factor)]
'''


def artifacts(home: Path) -> dict[str, int]:
    """The files in the cache, with their modification times."""
    return {path.name: path.stat().st_mtime_ns for path in (home / "cache").rglob("*.safetensors")}


def test_a_metric_is_a_value_and_its_scores_are_kept(home: Path) -> None:
    script = (
        METRIC
        + RUN
        + """
pairs = [sl.load_task("antonym"), sl.load_task("synonym")]
frame = sl.evaluate(pairs[0], sl.ZeroShot(), model, n_items=9, metrics=[vowel, "first_token"])
print(sorted(set(frame["metric"])))
sizes = {"n_prompts": 2, "n_shots": 2, "n_items": 4}
grid = sl.transfer_matrix(pairs, model, metric=vowel, config=sl.TrainConfig(**training), **sizes)
print(grid.metric, grid.frame.to_numpy().tolist())
result = sl.run_suite("builtin", model, tasks=["antonym"], methods=["zero-shot"], metric=vowel, n_shots=2, n_items=4)
print(result.scores["metric"].unique(), result.scores["score"].tolist())
"""
    )
    first = run_file(home, script)
    before = artifacts(home)
    assert first[0] == "['first_token', 'vowel']" and first[1].startswith("vowel [[")
    assert run_file(home, script) == first and artifacts(home) == before
    # Another metric with the same name shares no cache entries with it.
    again = run_file(home, script.replace('VOWELS = "aeiou"', 'VOWELS = "bcdfghjklmnpqrstvwxyz"'))
    assert again[1:] != first[1:] and len(artifacts(home)) > len(before) and before.items() <= artifacts(home).items()


def test_a_metric_of_an_installed_package_is_known_by_name(home: Path) -> None:
    (home / "laboratory.py").write_text(METRIC)
    install(home, "sitelens.metrics", "vowel", "laboratory:vowel")
    sizes = ["--n-prompts", "2", "--n-shots", "2", "--n-steps", "2", "--n-items", "4", "--draws", "1"]
    words = ["run", "antonym", "--model", "model", "--metrics", "vowel", *sizes]
    assert "vowel" in run(home, "-m", "sitelens.cli", *words)


def test_metrics_that_cannot_be_told_apart_are_refused(home: Path) -> None:
    lines = run_file(home, METRIC + '''
sl.register_metric(vowel)
sl.register_metric(vowel)
for act in (
    lambda: sl.register_metric(sl.Metric("vowel", close)), lambda: sl.register_metric(sl.Metric("first_token", close)),
    lambda: sl.Metric(" ", close), lambda: sl.register_metric(close),
    lambda: sl.evaluate("antonym", sl.ZeroShot(), "model", metrics=[vowel, sl.Metric("vowel", close)]),
    lambda: sl.evaluate("antonym", sl.ZeroShot(), "model", metrics=["vowels"]),
):
    try:
        act()
    except sl.SitelensError as error:
        print(error)
''')  # fmt: skip
    for line, said in zip(lines, (
        "there is a metric 'vowel' already, __main__:begins_with_a_vowel; choose another name",
        "there is a metric 'first_token' already, sitelens.metrics:<lambda>; choose another name",
        "the name of a metric must be text and not empty, not ' '",
        "a metric must be a sitelens.Metric, not <function close",
        "each metric may be given once, got vowel, vowel",
        "unknown metric 'vowels' (did you mean vowel?); one of first_token,",
    ), strict=True):  # fmt: skip
        assert line.startswith(said)


def test_a_condition_is_saved_and_loaded_by_its_module(home: Path) -> None:
    (home / "laboratory.py").write_text("import sitelens as sl\n" + CONDITION)
    lines = run_file(home, "from laboratory import Louder\nimport sitelens as sl\n" + RUN + '''
task = sl.load_task("antonym")
path = Louder(0.5).save("louder.safetensors")
one, other = (sl.evaluate(task, {"louder": condition}, model, n_items=5) for condition in
              (Louder(0.5), sl.Condition.load(path)))
print(one.equals(other), sl.summarize(one)["n"].tolist())
''')  # fmt: skip
    assert lines == ["True [5]"]
    assert run_file(home, "import laboratory, sitelens as sl\nprint(sl.Condition.load('louder.safetensors'))") == [
        "Louder(factor=0.5)"
    ]


# Studies

STUDY = """
import pandas as pd
import sitelens as sl

def lengths(frame):
    return sl.figures.lines(frame, "n_shots", labels={"mean": "First-token accuracy"})

@sl.study(caption="Accuracy over the number of demonstrations.", figure=lengths, tasks=["antonym"])
def few_shot_curve(tasks, model, *, n_items, seed):
    shots = {str(n): sl.FewShot(n) for n in (0, 1, 2)}
    frames = [sl.evaluate(task, shots, model, n_items=n_items, seed=seed) for task in tasks]
    frame = sl.summarize(pd.concat(frames))
    return frame.assign(n_shots=frame["condition"].astype(int))
"""


def test_a_study_is_listed_and_made_with_its_origin(home: Path) -> None:
    (home / "laboratory.py").write_text(STUDY)
    install(home, "sitelens.studies", "mine", "laboratory")
    assert "few-shot-curve            Accuracy over the number of demonstrations." in run(
        home, "-m", "sitelens.cli", "figures", "--list"
    )
    words = ["figures", "few-shot-curve", "--model", "model", "--n-items", "3", "--out", "out", "--formats", "html"]
    printed = run(home, "-m", "sitelens.cli", *words).splitlines()
    assert [Path(line).name for line in printed] == [f"few-shot-curve.{ending}" for ending in ("csv", "json", "html")]
    record = json.loads((home / "out" / "few-shot-curve.json").read_text())
    assert record["caption"] == "Accuracy over the number of demonstrations." and record["tasks"] == ["antonym"]
    assert record["made_by"].startswith("sitelens figures few-shot-curve --n-items 3") and record["n_items"] == 3
    assert list(pd.read_csv(home / "out" / "few-shot-curve.csv")["n_shots"]) == [0, 1, 2]


def test_a_study_of_a_script_is_made_by_a_call(home: Path) -> None:
    lines = run_file(home, STUDY + '''
@sl.study("wrong-frame", caption="", figure=lengths)
def no_frame(task, model):
    return task.name

@sl.study("wrong-figure", caption="", figure=len)
def no_figure(task, model):
    return pd.DataFrame({"a": [1]})

print(*[path.name for path in sl.make_figures(["few-shot-curve"], "out", "model", n_items=3, formats=["html"])])
for act in (
    lambda: sl.make_figures(["wrong-frame"], "out", "model"), lambda: sl.make_figures(["wrong-figure"], "out", "model"),
    lambda: sl.make_figures(["few-shot-curves"], "out", "model"),
    lambda: sl.study("costs", caption="", figure=lengths)(no_frame),
    lambda: sl.study("wrong-frame", caption="", figure=lengths)(no_figure),
    lambda: sl.study("a/b", caption="", figure=lengths)(no_figure),
):
    try:
        act()
    except sl.SitelensError as error:
        print(error)
''')  # fmt: skip
    assert lines[0] == "few-shot-curve.csv few-shot-curve.json few-shot-curve.html"
    for line, said in zip(lines[1:], (
        "the study 'wrong-frame' must return a DataFrame, not str",
        "the study 'wrong-figure' must be drawn as a Plotly figure, not int",
        "unknown figure 'few-shot-curves' (did you mean few-shot-curve?)",
        "there is a study 'costs' already, sitelens.studies.costs:costs; choose another name",
        "there is a study 'wrong-frame' already, __main__:no_frame; choose another name",
        "the name of a study",
    ), strict=True):  # fmt: skip
        assert line.startswith(said)
