"""Saved files with a valid checksum but altered content are rejected with a clear message or read exactly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import sitelens as sl
from sitelens.conditions.adapters import LowRank
from sitelens.conditions.base import Condition, Scope
from sitelens.conditions.heads import HeadOffsets
from sitelens.conditions.registry import HOMES
from sitelens.conditions.streams import AddToStream, InContextVector, LinearCombination, ReplaceStream
from sitelens.engine.forward import Hook
from sitelens.errors import SitelensError
from sitelens.evaluation.cached import score_conditions
from sitelens.evaluation.result import Result
from sitelens.models.model import Bridge, Model
from sitelens.models.provenance import Origin
from sitelens.reports.run import RunConfig
from sitelens.store import artifact as artifact_module
from sitelens.store.artifact import Artifact
from sitelens.store.folder import default_store
from tests import micro

ORIGIN = Origin(model="tiny", dtype="float32", template_arguments=(("enable_thinking", False),), n_shots=2, seed=0)
SELECTION = sl.HeadSelection(torch.rand(2, 3), "shift", "ab12", "given", ORIGIN)
EMBEDDING = sl.TaskEmbedding(torch.randn(2, 3, 4), "shift", "ab12", 5, 2, 0, ORIGIN)
WEIGHTS = {
    "q.A": torch.rand(2, 2, 6),
    "q.B": torch.rand(2, 5, 2),
    "v.A": torch.rand(2, 2, 6),
    "v.B": torch.rand(2, 3, 2),
}
CONDITIONS: list[Condition] = [
    sl.ZeroShot(),
    sl.FewShot(3),
    sl.PatchHeads(SELECTION, EMBEDDING, "additive", 1, "generation"),
    sl.Ablate([(0, 1), (1, 2)]),
    sl.Ablate(SELECTION, "mean", EMBEDDING, "all"),
    sl.Ablate("L1H2", "mean", EMBEDDING.mean_z),
    AddToStream(torch.rand(2, 5), (0, 2), "ab12", n_trained=4, origin=ORIGIN),
    ReplaceStream(torch.rand(1, 5), (1,), None),
    InContextVector(torch.rand(2, 5), 0.5, "ab12", ORIGIN),
    LinearCombination(torch.rand(2, 2, 5), torch.rand(2, 2), torch.rand(2, 2), "ab12", ORIGIN),
    HeadOffsets(torch.rand(2, 3, 4), "ab12", ORIGIN),
    LowRank(WEIGHTS, 8, "ab12", ORIGIN),
]
Load = Callable[[Path], Any]


def matrix() -> sl.TransferMatrix:
    names = ["a", "b"]
    frame = pd.DataFrame(torch.rand(2, 2, dtype=torch.float64).numpy(), names, names)
    ones = pd.Series([0.5, 0.25], names)
    n = pd.Series([4, 4], names)
    return sl.TransferMatrix(frame, ones, n, "heads", "first_token", "tiny", {"a": "x"}, ORIGIN, {"seed": 0})


def comparison() -> sl.Comparison:
    costs = dict.fromkeys(("trained", "forward_tokens", "backward_tokens", "fit_seconds", "seconds_per_prompt"), 1.5)
    row = {"task": "a", "method": "x", "accuracy": 0.5, "low": 0.1, "high": 0.9, "n": 2, **costs}
    scores = pd.DataFrame({"task": ["a", "a"], "condition": "x", "item": [0, 1], "score": [0.0, 1.0]})
    return sl.Comparison(pd.DataFrame([row]), scores, {"seed": 0})


def written(thing: Any, path: Path) -> Path:
    return thing.artifact().save(path) if isinstance(thing, Result) else thing.save(path)


def saved(folder: Path) -> list[tuple[Artifact, Load]]:
    """An artifact of each kind that users load, with the function that loads it."""
    path = folder / "saved.safetensors"
    things: list[tuple[Any, Load]] = [
        (SELECTION, sl.HeadSelection.load),
        (EMBEDDING, sl.TaskEmbedding.load),
        (matrix(), sl.TransferMatrix.load),
        (comparison(), sl.Comparison.load),
        *((condition, Condition.load) for condition in CONDITIONS),
    ]
    return [(Artifact.load(written(thing, path)), load) for thing, load in things]


def plain(artifact: Artifact) -> Any:
    """The content of an artifact with the type of each value, without null values."""

    def typed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: typed(inner) for key, inner in sorted(value.items()) if inner is not None}
        if isinstance(value, list | tuple):
            return [typed(inner) for inner in value]
        return type(value).__name__, value

    tensors = {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in sorted(artifact.tensors.items())}
    return typed(artifact.meta), tensors


def test_every_kind_of_condition_is_tried():
    assert {type(condition).__name__ for condition in CONDITIONS} == set(HOMES)


def test_what_is_saved_comes_back_equal(tmp_path: Path):
    for artifact, load in saved(tmp_path):
        again = written(load(artifact.save(tmp_path / "one.safetensors")), tmp_path / "again.safetensors")
        assert plain(Artifact.load(again)) == plain(artifact)


def test_a_repr_is_a_line_without_tensors():
    assert repr(EMBEDDING) == "TaskEmbedding('shift', model='tiny', 2 layers x 3 heads x 4, 5 prompts of 2 shots)"
    selection = sl.HeadSelection(torch.tensor([[0.2, 0.6], [1.0, 0.0]]), "shift", "ab12cd34ef", "given")
    assert repr(selection) == "HeadSelection('shift', model='ab12cd34', 2 layers x 2 heads, 2 on, given)"
    assert repr(sl.HeadSelection(selection.alpha)) == "HeadSelection('', any model, 2 layers x 2 heads, 2 on, given)"
    assert repr(sl.ZeroShot()) == "ZeroShot()" and repr(sl.FewShot(3)) == "FewShot(n_shots=3)"
    assert repr(sl.Ablate([(0, 1)])) == "Ablate(heads=((0, 1),), scope='prompt')"
    assert repr(CONDITIONS[6]).startswith("AddToStream(vectors=Tensor[2, 5], layers=(0, 2), model='tiny'")
    for condition in CONDITIONS:
        text = repr(condition)
        assert text.startswith(type(condition).__name__) and "tensor(" not in text and "\n" not in text
        assert len(text) < 360, text
    patch = sl.PatchHeads(SELECTION, EMBEDDING)
    assert repr(patch) == f"PatchHeads(selection={SELECTION!r}, embedding={EMBEDDING!r})"
    task = micro.task()
    sizes = f"{len(task.train)} train, {len(task.valid)} valid, {len(task.test)} test"
    assert repr(task) == f"Task('shift', {sizes})"
    history = pd.DataFrame({"step": [1, 2], "valid_loss": [float("nan"), 0.25]})
    result = sl.TrainResult(selection, history, sl.TrainConfig())
    assert repr(result) == (
        "TrainResult('shift', model='ab12cd34', 2 layers x 2 heads, 2 on, valid loss 0.25 at step 2 of 2)"
    )


# One change of a valid file


WRONG: list[Any] = [
    None, True, 0, 1, -1, 7, 2**70, 0.0, 1.0, 0.5, -0.5, "", "1", "generation", "convex", [], [1], [[0, 1]],
    [[True, 1]], {}, {"a": 1}, {"model": 3}, [["a", 1]], 10**400,
]  # fmt: skip
TENSORS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.to(torch.complex64), lambda x: x.to(torch.int64), lambda x: x.to(torch.bool), lambda x: x[None],
    lambda x: x.flatten(), lambda x: x[:0], lambda x: x.to(torch.float16), lambda x: torch.cat([x, x]),
    lambda x: x * math.nan, lambda x: x / 0, lambda x: -x - 1, lambda x: x.to(torch.float8_e4m3fn), lambda x: x * 2,
    lambda x: torch.cat([x, x], -1),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return copy


@st.composite
def mutants(draw: st.DrawFn, artifacts: list[tuple[Artifact, Load]]) -> tuple[Artifact, Load]:
    artifact, load = draw(st.sampled_from(artifacts))
    meta, tensors = artifact.meta, dict(artifact.tensors)
    paths = [path for path in places(json.loads(json.dumps(meta))) if path]
    kinds = ["value", "missing", "more"] * bool(paths) + ["tensor", "no tensor", "another tensor"] * bool(tensors)
    kind = draw(st.sampled_from(kinds))
    if "tensor" in kind:
        name = draw(st.sampled_from(sorted(tensors)))
        if kind == "tensor":
            tensors[name] = draw(st.sampled_from(TENSORS))(tensors[name].clone())
        elif kind == "no tensor":
            del tensors[name]
        else:
            tensors[draw(st.sampled_from(["more", f"{name}.more", name.partition(".")[0]]))] = tensors[name]
    else:
        path = draw(st.sampled_from(paths))
        value = draw(st.sampled_from(WRONG))
        change: dict[str, Callable[[Any, Any], Any]] = {
            "value": lambda inside, key: inside.__setitem__(key, value),
            "missing": lambda inside, key: inside.pop(key),
            "more": lambda inside, key: inside.update(more=value) if isinstance(inside, dict) else inside.append(value),
        }
        meta = changed(meta, path, change[kind])
    return Artifact(artifact.kind, artifact.spec, tensors, meta), load


CHECKS = HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=CHECKS)
@given(data=st.data())
def test_a_changed_file_is_refused_in_words_or_read_as_what_it_says(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "mutants"
    if not (kinds := _kinds):
        kinds += saved(folder)
    mutant, load = data.draw(mutants(kinds))
    path = mutant.save(folder / "mutant.safetensors")
    try:
        found = load(path)
    except sl.SitelensError as error:
        found = str(error)
    if isinstance(found, str):
        assert str(path) in found
        return
    said, read = plain(Artifact.load(path)), plain(Artifact.load(written(found, folder / "read.safetensors")))
    if said != read:  # only optional values, or an integer in place of a float
        assert said[1] == read[1]
        assert json.loads(json.dumps(said[0])) == json.loads(json.dumps(read[0])) or _defaults(mutant, read[0])


_kinds: list[tuple[Artifact, Load]] = []


def _defaults(mutant: Artifact, read: dict[str, Any]) -> bool:
    """Whether what was read contains every value in the file; true and 1.0 are not accepted as 1."""

    def within(small: Any, large: Any) -> bool:
        if isinstance(small, dict):
            return isinstance(large, dict) and all(v is None or within(v, large.get(k)) for k, v in small.items())
        if isinstance(small, list | tuple):
            return isinstance(large, list) and len(small) == len(large) and all(map(within, small, large))
        kinds = ("int", "float") if type(small) is int else (type(small).__name__,)
        return large is not None and large[0] in kinds and large[1] == small

    return within(json.loads(json.dumps(mutant.meta)), read)


# Headers that are not plain JSON


def write(path: Path, header: str, tensors: dict[str, Tensor]) -> Path:
    checksum = artifact_module._checksum(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"sitelens": header, "sha256": checksum}))
    return path


HEAD = '{"format":1,"kind":"selection","spec":{},"sitelens":"0.1.0","meta":'
HEADERS = {
    "a list": "[]",
    "a number": "3",
    "no JSON": "{",
    "no keys": "{}",
    "format as text": HEAD.replace('"format":1', '"format":"1"') + "{}}",
    "format as true": HEAD.replace('"format":1', '"format":true') + "{}}",
    "kind as a list": HEAD.replace('"selection"', "[]") + "{}}",
    "meta as a list": HEAD + "[]}",
    "spec as a number": HEAD.replace('"spec":{}', '"spec":1') + "{}}",
    "a key twice": HEAD + '{"task":"a","task":"b"}}',
    "one key more": HEAD + '{},"more":1}',
    "not a number": HEAD + '{"task":NaN}}',
    "infinity": HEAD + '{"task":1e999}}',
    "a long number": HEAD + '{"task":' + "9" * 5000 + "}}",
    "deep": HEAD + '{"task":' + "[" * 200 + "]" * 200 + "}}",
    "very deep": HEAD + '{"task":' + "[" * 100_000 + "]" * 100_000 + "}}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none_is_refused_in_words(header: str, tmp_path: Path):
    path = write(tmp_path / "selection.safetensors", HEADERS[header], {"alpha": torch.rand(2, 3)})
    with pytest.raises(sl.SitelensError, match=r"selection\.safetensors"):
        sl.HeadSelection.load(path)


# run.json


RUN: dict[str, Any] = {"tasks": ["a"], "n_prompts": 5, "train": {"n_steps": 3, "init": 0.5}, "metrics": ["first_token"]}
RUNS: list[tuple[dict[str, Any], str]] = [
    ({"tasks": "antonym"}, "tasks"), ({"tasks": [1]}, "tasks"), ({"n_prompts": True}, "n_prompts"),
    ({"n_prompts": 5.0}, "n_prompts"), ({"n_prompts": "5"}, "n_prompts"), ({"more": 1}, "more"), ({"k": 0}, "k"),
    ({"train": []}, "train"), ({"train": {"n_steps": 2.5}}, "n_steps"), ({"train": None}, "train"),
    ({"model": 3}, "model"), ({"train": {"init": "zero"}}, "init"), ({"train": {"lr": True}}, "lr"),
    ({"metrics": [None]}, "metrics"), ({"train": {"mixing": "loud"}}, "mixing"), ({"seed": 2**80}, "seed"),
    ({"train": {"seed": None}}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), RUNS)
def test_a_run_json_of_other_content_is_refused_in_words(change: dict[str, Any], field: str, tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {**RUN, **change}}))
    with pytest.raises(sl.SitelensError, match=rf"run\.json.*{field}"):
        RunConfig.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "[" * 100_000, '{"config": {}, "config": {}}', '{"config": NaN}'])
def test_a_run_json_that_is_none_is_refused_in_words(text: str, tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(sl.SitelensError, match=r"no run\.json of sitelens"):
        RunConfig.load(path)


# Which class it is


def own(**options: Any) -> type[Condition]:
    """A custom condition class, as if it were defined in a module of this name."""

    @dataclass(frozen=True, eq=False)
    class Mine(Condition, **options):
        strength: float = 1.0

        def fwd_hooks(self, model: Bridge) -> list[Hook]:
            return []

    return Mine


@pytest.mark.slow
def test_all_of_sitelens_own_conditions_load_in_a_fresh_process(tmp_path: Path):
    for place, condition in enumerate(CONDITIONS):
        condition.save(tmp_path / f"{place}.safetensors")
    code = (
        "import sys\n"
        "from sitelens import Condition\n"
        "print(*(type(Condition.load(path)).__name__ for path in sys.argv[1:]))"
    )
    paths = [str(tmp_path / f"{place}.safetensors") for place in range(len(CONDITIONS))]
    found = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [type(condition).__name__ for condition in CONDITIONS]


def test_two_conditions_of_one_name_do_not_take_each_others_place(tmp_path: Path):
    class First:
        @dataclass(frozen=True, eq=False)
        class Same(sl.ZeroShot):
            """One."""

    class Second:
        @dataclass(frozen=True, eq=False)
        class Same(sl.ZeroShot):
            """Another."""

    try:
        for kind in (First.Same, Second.Same):
            assert type(Condition.load(kind().save(tmp_path / "own.safetensors"))) is kind
    finally:
        for kind in (First.Same, Second.Same):
            del Condition.registry[kind.saved_as]


def test_a_name_that_another_class_has_is_refused_when_the_class_is_made():
    for name in ("PatchHeads", "LowRank"):
        with pytest.raises(sl.SitelensError, match=rf"Mine cannot be saved as '{name}': sitelens\.\S+:{name} is"):
            own(saved_as=name)


def test_a_class_of_ones_own_has_the_name_that_it_asks_for_and_may_be_defined_anew(tmp_path: Path):
    try:
        own(saved_as="mine")
        latest: Any = own(saved_as="mine")
        found: Any = Condition.load(latest(2.5).save(tmp_path / "own.safetensors"))
        assert type(found) is latest and found.strength == 2.5
    finally:
        del Condition.registry["mine"]


def test_a_class_that_is_not_imported_is_named_with_its_module(tmp_path: Path):
    for name, message in (
        ("mypackage.edits:Louder", "class Louder: import mypackage.edits first"),
        ("__main__:Louder", "'Louder' that is not known here: define or import its class first"),
        ("Louder", "'Louder' that is not known here"),
    ):
        path = Artifact("condition", {}, {}, {"condition": name}).save(tmp_path / "own.safetensors")
        with pytest.raises(sl.SitelensError, match=message):
            Condition.load(path)


def test_files_of_the_first_edition_load(tmp_path: Path):
    embedding = {"task": "shift", "model": None, "n_prompts": 5, "n_shots": 2, "seed": 0}
    selection = {"task": "shift", "model": None, "provenance": "given"}
    patch = {
        "condition": "PatchHeads",
        "mixing": "convex",
        "n_shots": 0,
        "selection": selection,
        "embedding": embedding,
    }
    files = {
        "embedding": (sl.TaskEmbedding.load, {"mean_z": EMBEDDING.mean_z}, embedding),
        "selection": (sl.HeadSelection.load, {"alpha": SELECTION.alpha}, selection),
        "condition": (Condition.load, {"alpha": SELECTION.alpha, "mean_z": EMBEDDING.mean_z}, patch),
    }
    found = {
        kind: load(Artifact(kind, {}, tensors, meta).save(tmp_path / f"{kind}.safetensors"))
        for kind, (load, tensors, meta) in files.items()
    }
    assert torch.equal(found["condition"].selection.alpha, SELECTION.alpha)
    assert torch.equal(found["condition"].embedding.mean_z, EMBEDDING.mean_z)
    assert found["selection"].task == found["embedding"].task == "shift" and found["selection"].origin is None
    adapters = Artifact("condition", {}, WEIGHTS, {"condition": "LowRank", "alpha": 8, "model": None})
    assert torch.equal(Condition.load(adapters.save(tmp_path / "lora.safetensors")).weights["v.B"], WEIGHTS["v.B"])  # type: ignore[attr-defined]


# What a saved condition records, and the same model in another precision


def test_a_trained_selection_and_its_embedding_know_where_they_come_from(tmp_path: Path):
    model, task = micro.bridge("Llama"), micro.task(instruction="Say the next.")
    embedding = sl.embed_task(task, model, n_prompts=3, n_shots=2, seed=4)
    config = sl.TrainConfig(n_steps=2, eval_every=1)
    for _ in range(2):  # computed, then from the cache
        selection = sl.train_selection(task, model, embedding=embedding, config=config).selection
        for thing, load in ((embedding, sl.TaskEmbedding.load), (selection, sl.HeadSelection.load)):
            origin = load(thing.save(tmp_path / "one.safetensors")).origin
            assert origin is not None and origin == thing.origin
            assert (origin.model, origin.dtype, origin.quantize) == ("Llama", "float32", None)
            assert (origin.template, origin.instruction) == (task.template, "Say the next.")
            assert (origin.n_prompts, origin.n_shots, origin.seed) == (3, 2, 4)
            assert origin.task_digest == task.digest and origin.sitelens == sl.__version__
            assert origin.created is not None and len(origin.created) == 10
    kept = next((default_store().root / "selection").glob("*.safetensors"))
    found = sl.HeadSelection.load(kept)
    assert (found.task, found.model) == ("shift", sl.fingerprint(model))
    other = micro.bridge("Llama", torch.bfloat16)
    patch = sl.PatchHeads(found, embedding)
    with pytest.warns(sl.SitelensWarning, match=r"made with Llama in float32 \(not in bfloat16"):
        sl.evaluate(task, {"patched": patch}, other, n_items=2)
    with pytest.raises(sl.SitelensError, match="another model"):
        sl.evaluate(task, {"patched": patch}, micro.bridge("Llama", seed=1), n_items=2)


def changes_in_the_store() -> list[tuple[str, Callable[[Artifact], Artifact]]]:
    def tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Artifact], Artifact]:
        def apply(kept: Artifact) -> Artifact:
            name = sorted(kept.tensors)[0]
            return Artifact(kept.kind, kept.spec, kept.tensors | {name: change(kept.tensors[name])}, kept.meta)

        return apply

    return [
        ("no tensors", lambda kept: Artifact(kept.kind, kept.spec, {}, kept.meta)),
        ("no meta", lambda kept: Artifact(kept.kind, kept.spec, kept.tensors, {})),
        ("more meta", lambda kept: Artifact(kept.kind, kept.spec, kept.tensors, kept.meta | {"more": 1})),
        ("flat", tensor(lambda x: x.double().flatten()[:-1])),
        ("complex", tensor(lambda x: x.to(torch.complex64))),
        ("not finite", tensor(lambda x: x.double() * math.nan)),
    ]


@pytest.mark.slow
def test_what_the_store_holds_of_another_content_is_made_anew():
    model, task = micro.bridge("Llama"), micro.task()
    options: dict[str, Any] = {"n_items": 3}
    config = sl.TrainConfig(n_steps=2, eval_every=1)

    def all_kinds() -> list[Any]:
        embedding = sl.embed_task(task, model, n_prompts=2, n_shots=1)
        selection = sl.train_selection(task, model, embedding=embedding, config=config).selection
        scores = score_conditions(task, {"zero-shot": sl.ZeroShot()}, Model.of(model), **options)
        compared = sl.compare([task], ["zero-shot", sl.methods.TV(n_sets=2, n_shots=1)], model, **options)
        return [
            embedding.mean_z.tolist(),
            selection.alpha.tolist(),
            scores["logprob"].tolist(),
            compared.frame["accuracy"].tolist(),
        ]

    expected, root = all_kinds(), default_store().root
    kinds = {path.parent.name for path in root.glob("*/*.safetensors")}
    assert kinds == {"embedding", "selection", "scores", "comparison", "method"}
    for name, change in changes_in_the_store():
        paths = sorted(root.glob("*/*.safetensors"))
        for path in paths:
            change(Artifact.load(path)).save(path)
        with pytest.warns(sl.SitelensWarning, match="it is computed again") as heard:
            assert all_kinds() == expected, name
        assert len({str(one.message).split("safetensors")[0] for one in heard}) == len(paths), name


def test_a_condition_that_says_steps_as_earlier_editions_wrote_it_loads(tmp_path: Path) -> None:
    scopes: dict[str, Scope] = {"every": "generation", "prompt": "prompt"}
    for steps, scope in scopes.items():
        tensors, meta = sl.PatchHeads(SELECTION, EMBEDDING, scope=scope).state()
        assert meta.pop("scope") == scope
        path = Artifact("condition", {}, tensors, meta | {"steps": steps}).save(tmp_path / "old.safetensors")
        assert Condition.load(path).scope == scope


def test_a_condition_of_ones_own_that_says_steps_is_told_of_scope() -> None:
    with pytest.raises(SitelensError, match="write scope = 'generation'"):

        class Old(sl.ZeroShot):
            steps = "every"
