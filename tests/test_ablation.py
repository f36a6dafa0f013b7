"""Ablated heads compared with raw models whose output projections get zeros or means instead of z."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import sitelens as sl
from sitelens.conditions.base import Condition
from sitelens.models.model import Bridge, Model
from tests import micro, oracle, zoo

HEADS = [(0, 1), (1, 0), (1, 3)]
TASK = micro.task("shift", 40)


@contextmanager
def ablated(network: Any, heads: Sequence[tuple[int, int]], source: Tensor, where: slice) -> Iterator[None]:
    """A raw model whose output projections read `source` `[layer head d_head]` at some heads and positions."""

    def hook(layer: int) -> Any:
        def act(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            by_head = z.view(*z.shape[:2], *source.shape[1:])
            for at, head in heads:
                if at == layer:
                    by_head[:, where, head] = source[layer, head]
            return z, *args[1:]

        return act

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(zoo.projections(network))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(model: Bridge) -> Tensor:
    return torch.randn(*Model.of(model).shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma3Text"])
def test_ablation_is_that_of_the_raw_model(family: str, kind: Any, positions: Any, monkeypatch: Any) -> None:
    model, network = micro.bridge(family), micro.raw(family)
    mean = reference(model) if kind == "mean" else None
    condition = sl.Ablate(["L0H1", "1.0", (1, 3)], kind, mean, positions, n_shots=1)
    scores = sl.evaluate(TASK, {"whole": sl.FewShot(1), "ablated": condition}, model, n_items=4)
    scores = scores.set_index(["condition", "item"])
    source = torch.zeros(Model.of(model).shape) if mean is None else mean
    where = slice(-1, None) if positions == "last" else slice(None)
    changed = 0.0
    for item in scores.loc["ablated"].index:
        (prompt,) = sl_prompts(item)
        ids, answer = oracle.encode(prompt.text), oracle.encode(prompt.answers[0])[0]
        with torch.no_grad(), ablated(network, HEADS, source, where):
            said = network(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)[answer]
        assert scores.loc[("ablated", item), "logprob"] == pytest.approx(float(said), abs=2e-4)
        changed += abs(float(said) - scores["logprob"]["whole", item])
    assert changed > 0.01


def sl_prompts(item: int) -> Any:
    from sitelens.engine.prompts import few_shot_prompts

    return few_shot_prompts(TASK, [TASK.test[item]], 1, micro.tokenizer(), 0, "test", [item])


def test_an_ablation_of_the_last_token_shares_the_prefix_and_one_of_all_does_not(llama: Bridge) -> None:
    last, everywhere = sl.Ablate(HEADS), sl.Ablate(HEADS, positions="all")
    patch = last.patch(llama)
    assert patch is not None and patch.alpha.sum() == 3 and not patch.vectors.any()
    assert everywhere.patch(llama) is None
    assert (last.scope, everywhere.scope) == ("prompt", "generation")


def test_a_soft_selection_is_a_soft_mask(llama: Bridge) -> None:
    alpha = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    patch = sl.Ablate(sl.HeadSelection(alpha)).patch(llama)
    assert patch is not None and torch.equal(patch.alpha, alpha)


def test_generated_text_is_the_raw_models(llama: Bridge) -> None:
    network, ids = micro.raw("Llama"), oracle.encode("Q: aa\nA:")
    said = sl.generate(["Q: aa\nA:"], sl.Ablate(HEADS, positions="all"), llama, max_new_tokens=4)
    with torch.no_grad(), ablated(network, HEADS, torch.zeros(Model.of(llama).shape), slice(None)):
        for _ in range(4):
            ids = [*ids, int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    text = micro.tokenizer().decode([i for i in ids[len(oracle.encode("Q: aa\nA:")) :] if i != 2])
    assert said == [text.split("\n")[0].strip()]


@pytest.fixture
def llama() -> Iterator[Bridge]:
    yield from micro.lent("Llama")


@pytest.mark.parametrize("kind", ["heads", "selection"])
@pytest.mark.parametrize("source", ["zero", "tensor", "embedding"])
def test_an_ablation_comes_back_from_disk(kind: str, source: str, llama: Bridge, tmp_path: Path) -> None:
    heads: Any = HEADS if kind == "heads" else sl.HeadSelection(torch.full((2, 4), 0.5))
    mean: Any = None if source == "zero" else reference(llama)
    if source == "embedding":
        mean = sl.TaskEmbedding(mean, "shift", None, 3, 2, 0)
    condition = sl.Ablate(heads, "zero" if mean is None else "mean", mean, "all", n_shots=2)
    again = Condition.load(condition.save(tmp_path / "one.safetensors"))
    assert isinstance(again, sl.Ablate)
    assert (again.kind, again.positions, again.scope, again.n_shots) == (condition.kind, "all", "generation", 2)
    first, second = condition.head_patch(llama), again.head_patch(llama)
    assert torch.equal(first.alpha, second.alpha) and torch.equal(first.vectors, second.vectors)


@pytest.mark.slow
def test_a_fresh_process_knows_the_condition(tmp_path: Path) -> None:
    path = sl.Ablate(HEADS).save(tmp_path / "one.safetensors")
    code = f"import sitelens as sl; print(sl.Condition.load({str(path)!r}).heads)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "((0, 1), (1, 0), (1, 3))\n"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "median"}, "kind must be 'zero' or 'mean', not 'median'"),
        ({"positions": "first"}, "positions must be 'last' or 'all'"),
        ({"kind": "mean"}, r"needs a reference: Ablate\(heads, 'mean', sl.embed_task"),
        ({"reference": torch.zeros(2, 4, 8)}, "write kind='mean'"),
        ({"kind": "mean", "reference": "antonym"}, "not 'antonym'"),
        ({"n_shots": -1}, "n_shots must be at least 0"),
        ({"heads": "L1X2"}, "not 'L1X2'"),
        ({"heads": "L9H0"}, r"no head \(9, 0\): layers 0 to 1"),
        ({"kind": "mean", "reference": torch.zeros(2, 4, 5)}, "d_head"),
    ],
)
def test_what_cannot_be_ablated_is_refused(arguments: Any, message: str, llama: Bridge) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        sl.Ablate(**({"heads": HEADS} | arguments)).patch(llama)


# -- how heads are specified --


@pytest.mark.parametrize(
    "heads",
    [
        [(0, 1), (1, 3)],
        ((0, 1), (1, 3)),
        [[0, 1], [1, 3]],
        ["L0H1", "L1H3"],
        ["l0h1", "1.3"],
        "L0H1, L1H3",
        "0.1 1.3",
        [(np.int64(0), np.int32(1)), (1.0, np.float64(3))],
        np.array([[0, 1], [1, 3]]),
        torch.tensor([[0, 1], [1, 3]]),
        torch.tensor([[False, True, False, False], [False, False, False, True]]),
        np.array([[False, True, False, False], [False, False, False, True]]),
        pd.DataFrame({"layer": [0, 1], "head": [1, 3], "effect": [0.2, 0.1]}),
        (head for head in ["L0H1", (1, 3)]),
    ],
)
def test_heads_may_be_written_in_many_ways(heads: Any) -> None:
    kept = sl.HeadSelection(torch.ones(2, 4)).keep(heads)
    assert kept.ranking()[:2] == [(0, 1), (1, 3)] and kept.alpha.sum() == 2


@pytest.mark.parametrize("head", [(1, 2), "L1H2", "1.2", (np.int64(1), 2), ["L1H2"]])
def test_one_head_needs_no_list(head: Any) -> None:
    assert sl.HeadSelection(torch.ones(2, 4)).without(head).alpha.sum() == 7


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (5, "not 5"),
        (["L1"], "not 'L1'"),
        ([(0, 1, 2)], r"not \(0, 1, 2\)"),
        ([(0.5, 1)], r"not \(0.5, 1\)"),
        ([(True, 1)], r"not \(True, 1\)"),
        ([("0", "1")], "not "),
        ([(0, None)], "not "),
        ("L0H4", r"no head \(0, 4\): layers 0 to 1, heads 0 to 3"),
        ([(-1, 0)], r"no head \(-1, 0\)"),
        (pd.DataFrame({"l": [1]}), "columns layer and head, it has l"),
        (torch.ones(4, 2, dtype=torch.bool), r"boolean of shape \(2, 4\)"),
        (torch.ones(2, 4), r"boolean of shape \(2, 4\), not torch.float32"),
    ],
)
def test_what_is_no_head_is_refused(heads: Any, message: str) -> None:
    with pytest.raises(sl.SitelensError, match=message):
        sl.HeadSelection(torch.ones(2, 4)).keep(heads)
