# pyright: strict, reportMissingTypeStubs=false, reportUnnecessaryTypeIgnoreComment=true
"""A user's program that calls every public function. It is only read by pyright, in strict mode, and never run.

`assert_type` states the type that a caller sees; a name or type that is not fully known is an error. So is an `ignore`
comment without an error to ignore, which shows that the mistakes at the end are detected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import assert_type

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sitelens as sl
from sitelens import figures, heads, studies


def notebook(folder: Path) -> None:
    """The example of the README."""
    model = sl.load_model(dtype="float32")
    assert_type(sl.Model.of(model), sl.Model)
    assert_type(sl.fingerprint(model), str)
    with sl.settings.using(progress=False, memory_budget="1GiB", cache_dir=folder):
        task = assert_type(sl.load_task("antonym"), sl.Task)
    embedding = assert_type(sl.embed_task(task, model, n_prompts=50, n_shots=10, seed=0), sl.TaskEmbedding)
    result = assert_type(sl.train_selection(task, model, embedding=embedding), sl.TrainResult)
    assert_type(result.history, pd.DataFrame)
    assert_type(result.best_step, int)
    selection = assert_type(result.selection, sl.HeadSelection)
    assert_type(selection.alpha, Tensor)
    assert_type(selection.heatmap(), go.Figure)
    assert_type(selection.frame(), pd.DataFrame)
    assert_type(selection.ranking(), list[tuple[int, int]])
    patched = sl.PatchHeads(selection, embedding)
    assert_type(sl.generate(["Q: hot\nA:"], patched, model), list[str])
    conditions: dict[str, sl.Condition] = {
        "zero-shot": sl.ZeroShot(),
        "10-shot": sl.FewShot(10),
        "SITE": patched,
        "hard": sl.PatchHeads(selection.hard(), embedding),
        "high-alpha": sl.PatchHeads(selection.top(64), embedding, scope="generation"),
        "low-alpha": sl.PatchHeads(selection.bottom(64), embedding, mixing="additive"),
        "random": sl.PatchHeads(selection.random(64, seed=0), embedding),
        "without": sl.Ablate(["L10H6", (10, 7)], "mean", embedding),
    }
    scores = assert_type(sl.evaluate(task, conditions, model), pd.DataFrame)
    assert_type(sl.echo(task, model), pd.DataFrame)
    assert_type(sl.summarize(scores, against="zero-shot"), pd.DataFrame)
    assert_type(patched.save(folder / "condition.safetensors"), Path)
    assert_type(sl.Condition.load(folder / "condition.safetensors"), sl.Condition)
    assert_type(sl.HeadSelection.load(selection.save(folder / "alpha.safetensors")), sl.HeadSelection)
    assert_type(sl.TaskEmbedding.load(embedding.save(folder / "z.safetensors")), sl.TaskEmbedding)


def tasks() -> None:
    """Tasks, suites and models by name, and custom ones."""
    assert_type(sl.list_tasks(), pd.DataFrame)
    assert_type(sl.list_models(), pd.DataFrame)
    assert_type(sl.load_tasks(["antonym", "synonym"]), list[sl.Task])
    task = assert_type(sl.Task.from_pairs("own", [("hot", "cold")], template="chat"), sl.Task)
    assert_type(sl.Task.from_frame("own", pd.DataFrame({"input": ["hot"], "output": ["cold"]})), sl.Task)
    assert_type(task.train, tuple[sl.Example, ...])
    assert_type(task.digest, str)

    class Own(sl.Suite):
        name = "own"

        def names(self) -> list[str]:
            return ["one"]

        def load(self, name: str) -> sl.Task:
            return task

    sl.register_suite(Own())


def across_tasks(folder: Path) -> None:
    """Heads compared across tasks, methods and whole suites."""
    names = ["antonym", "synonym", "capitalize"]
    config = sl.TrainConfig(n_steps=100, seed=1)
    results = sl.train_selections(names, seeds=(0, 1), config=config)
    assert_type(results, dict[tuple[str, int], sl.TrainResult])
    grid = assert_type(sl.transfer_matrix(names, swap="heads"), sl.TransferMatrix)
    assert_type(grid.frame, pd.DataFrame)
    assert_type(grid.normalized(), pd.DataFrame)
    assert_type(grid.clusters(), list[list[str]])
    assert_type(grid.summary(), pd.DataFrame)
    assert_type(grid.markdown(), str)
    assert_type(grid.latex(), str)
    assert_type(grid.figure(), go.Figure)
    assert_type(grid.heatmap(), go.Figure)
    similarity = assert_type(sl.head_similarity(names), sl.HeadSimilarity)
    assert_type(similarity.figure(), go.Figure)
    assert_type(sl.similarity_predicts_transfer(similarity, grid), pd.DataFrame)
    methods: list[sl.Method | str] = [sl.methods.SITE(n_prompts=20), sl.methods.LTV(n_steps=100), "FV"]
    comparison = assert_type(sl.compare(names, methods), sl.Comparison)
    assert_type(comparison.frame, pd.DataFrame)
    assert_type(comparison.differences("zero-shot"), pd.DataFrame)
    suite = assert_type(sl.run_suite("builtin", n_items=20), sl.SuiteResult)
    assert_type(suite.frame, pd.DataFrame)
    report = assert_type(sl.run(sl.RunConfig(tasks=("antonym",), train=config)), sl.RunReport)
    assert_type(report.scores, pd.DataFrame)
    verification = assert_type(sl.verify(), sl.Verification)
    assert_type(verification.failures, list[str])


def methods() -> None:
    """A custom method next to built-in ones."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(sl.Method):
        n_shots: int = 3

        def fit(self, task: sl.Task, model: TransformerBridge, *, seed: int = 0) -> sl.Condition:
            return sl.FewShot(self.n_shots)

    assert_type(sl.compare(["antonym"], [Mine(n_shots=5), "zero-shot"]), sl.Comparison)


def single_heads(embedding: sl.TaskEmbedding, selection: sl.HeadSelection) -> None:
    """What a single head attends to and writes."""
    assert_type(heads.attention("Q: hot\nA:", ["L10H6"]), Tensor)
    assert_type(heads.attention_example("antonym", ["L10H6"]), pd.DataFrame)
    assert_type(heads.attention_roles("antonym", selection.ranking()[:5]), pd.DataFrame)
    assert_type(heads.induction_scores(), pd.DataFrame)
    assert_type(heads.indirect_effects("antonym", embedding=embedding), pd.DataFrame)
    assert_type(heads.head_attribution("Q: hot\nA:", answer=" cold"), pd.DataFrame)
    assert_type(heads.promoted_tokens(embedding, (10, 6), "antonym"), pd.DataFrame)


def analyses(embedding: sl.TaskEmbedding, one: sl.HeadSelection, other: sl.HeadSelection, folder: Path) -> None:
    """Each study, and the figure of its frame."""
    names = ["antonym", "synonym"]
    shares = assert_type(studies.alpha_distribution(names, by="layer"), pd.DataFrame)
    runs = assert_type(studies.seed_variance(names), pd.DataFrame)
    assert_type(studies.variance_components(runs), pd.DataFrame)
    assert_type(studies.similarity_transfer([*names, "capitalize"]), pd.DataFrame)

    @sl.study(caption="Accuracy without demonstrations.", figure=figures.dots, tasks=["antonym"])
    def own(tasks: list[sl.Task], model: object, *, n_items: int) -> pd.DataFrame:
        return sl.evaluate(tasks[0], sl.ZeroShot(), n_items=n_items)

    assert_type(own([], None, n_items=3), pd.DataFrame)
    assert_type(sl.STUDIES["costs"], sl.Study)
    assert_type(sl.make_figures(["own"], folder), list[Path])
    grid = sl.transfer_matrix(names)
    drawings: list[go.Figure] = [
        figures.alpha_distribution(shares),
        figures.checkpoints(studies.checkpoints(names)),
        figures.costs(studies.costs("antonym"), quantity="tokens"),
        figures.head_counts(studies.head_counts(names)),
        figures.head_overlap(studies.head_overlap(names)),
        figures.initialization_distances(studies.initialization_distances(names)),
        figures.initializations(studies.initializations(names, inits=(0.5, "random"))),
        figures.loss_path(studies.loss_path("antonym", one, other, embedding)),
        figures.loss_path(studies.loss_paths(names)),
        figures.mixing(studies.mixing(names)),
        figures.prompt_counts(studies.prompt_counts(names)),
        figures.random_heads(studies.random_heads(names)),
        figures.seed_variance(runs),
        figures.shared_attention(studies.shared_attention(names)),
        figures.soft_hard(studies.soft_hard(names)),
        figures.task_agnostic(studies.task_agnostic(names, split="valid")),
        figures.alpha_heatmap(one.alpha.numpy()),
        figures.head_heatmap(np.zeros((30, 9))),
        figures.lines(shares, "layer"),
        figures.dots(shares),
        figures.histogram(shares, "low", "share"),
        figures.attention_example(heads.attention_example("antonym", ["L10H6"])),
        figures.attention_roles(heads.attention_roles("antonym")),
        figures.comparison(sl.compare(names).frame),
        figures.suite(sl.run_suite("builtin").frame),
        figures.training_curves(studies.training_curves(names)),
        figures.training_curves(sl.train_selection("antonym").history),
        figures.transfer_heatmap(grid.normalized(), groups={"antonym": "words"}, limits=(-1, 1)),
        figures.similarity_against_transfer(sl.head_similarity(names).matrix(), grid.normalized()),
    ]
    assert_type(studies.initialization_runs(names)["antonym", 0.5, 0], tuple[sl.TaskEmbedding, sl.TrainResult])
    assert_type(figures.missing_tool(figures.check_formats(["png"])), str | None)
    assert_type(figures.save(drawings[0], folder / "figure.html"), Path)
    assert_type(figures.show_static_too(), bool)


def own_study(folder: Path) -> None:
    """A custom study and its figure."""

    @sl.study(caption="Accuracy without demonstrations.", figure=figures.dots, tasks=["antonym"])
    def zero_shot(tasks: list[sl.Task], model: sl.Model, *, n_items: int) -> pd.DataFrame:
        return pd.concat([sl.evaluate(task, sl.ZeroShot(), model, n_items=n_items) for task in tasks])

    assert_type(zero_shot([sl.load_task("antonym")], sl.Model.of(sl.load_model()), n_items=3), pd.DataFrame)
    assert_type(sl.STUDIES["zero-shot"], sl.Study)
    assert_type(sl.make_figures(["zero-shot"], folder), list[Path])


def metrics() -> None:
    """A custom metric."""
    assert_type(sl.METRICS["first_token"], sl.Metric)
    contains = sl.Metric("contains", lambda output, target: target.answers[0] in output.text, generates=True)
    assert_type(sl.register_metric(contains), sl.Metric)
    sl.evaluate("antonym", sl.ZeroShot(), metrics=("first_token", contains))


def refused(error: sl.SitelensError, warning: sl.SitelensWarning) -> tuple[ValueError, UserWarning]:
    """The error and the warning class of sitelens."""
    return error, warning


def mistakes(selection: sl.HeadSelection, embedding: sl.TaskEmbedding) -> None:
    """Mistakes that pyright must report."""
    sl.embed_tasks("antonym")  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    sl.embed_task("antonym", n_promts=50)  # pyright: ignore[reportCallIssue]
    sl.embed_task("antonym", n_prompts="50")  # pyright: ignore[reportArgumentType]
    sl.PatchHeads(selection, embedding, scope="every")  # pyright: ignore[reportArgumentType]
    sl.PatchHeads(embedding, selection)  # pyright: ignore[reportArgumentType]
    sl.TrainConfig(init="ones")  # pyright: ignore[reportArgumentType]
    studies.mixing(["antonym"], spilt="valid")  # pyright: ignore[reportCallIssue]
    sl.evaluate("antonym", [sl.ZeroShot()])  # pyright: ignore[reportArgumentType]
