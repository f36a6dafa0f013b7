"""From a head to the logits in many architectures, compared with hooks and arithmetic on the raw models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sitelens as sl
from sitelens.conditions.streams import InContextVector, LinearCombination
from sitelens.engine.batches import tokenize
from sitelens.engine.prompts import few_shot_prompts
from sitelens.heads import (
    ROLES,
    SINK,
    attention,
    attention_example,
    attention_roles,
    head_attribution,
    induction_scores,
)
from sitelens.heads.attribution import head_outputs
from sitelens.models.model import Model
from tests import micro, zoo

architectures = [pytest.param(name, marks=[] if name in zoo.FAST else pytest.mark.slow) for name in zoo.ZOO]


def prompt_of(task: sl.Task) -> Any:
    return few_shot_prompts(task, task.valid[:1], 1, micro.tokenizer(), 0, "valid", range(1))[0]


@pytest.mark.parametrize("name", architectures)
def test_attribution_is_what_the_logit_loses_without_the_head_all_else_held(name: str) -> None:
    model, task = zoo.bridge(name), micro.task()
    prompt = prompt_of(task)
    batch = tokenize([prompt], micro.tokenizer())
    held = zoo.Held(name, batch.tokens[0].tolist())
    scale = float((held.logits * held.unembedded).sum() / held.unembedded.pow(2).sum())
    scale = 1.0 if name == "Gemma 2" else scale  # it caps its logits; attribution is computed before the cap
    answer = int(batch.answer[0])
    expected = torch.stack([
        scale * ((lost := held.unembedded - held.without(layer, head))[answer] - lost.mean())
        for layer in range(2) for head in range(model.cfg.n_heads)
    ])  # fmt: skip
    found = torch.tensor(head_attribution(task, model, n_items=1, n_shots=1)["attribution"].tolist())
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected.double() if found.dtype == torch.float64 else expected,
                               rtol=1e-3, atol=1e-4 * float(held.unembedded.abs().max()))  # fmt: skip


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_an_architecture_that_cannot_be_read_is_refused_in_words(name: str) -> None:
    with pytest.raises(sl.SitelensError, match=zoo.REFUSED[name][2]):
        head_attribution(micro.task(), zoo.bridge(name), n_items=1, n_shots=1)


@pytest.mark.parametrize("name", architectures)
def test_what_a_head_adds_to_the_stream_is_what_its_block_gives_more(name: str) -> None:
    model, prompt = zoo.bridge(name), prompt_of(micro.task())
    batch = tokenize([prompt], micro.tokenizer())
    held = zoo.Held(name, batch.tokens[0].tolist())
    z = torch.randn(*Model.of(model).shape, generator=torch.Generator().manual_seed(1))
    found = head_outputs(z, Model.of(model), batch)
    blocks = zoo.blocks(zoo.raw(name))
    for layer, head in ((0, 0), (0, 3), (1, 1)):
        expected = held.writes(layer, head, z[layer, head], blocks[layer])
        torch.testing.assert_close(found[layer, head], expected, rtol=1e-3, atol=2e-5)


def test_a_write_that_passes_a_norm_needs_a_prompt() -> None:
    model = zoo.bridge("Gemma 2")
    with pytest.raises(sl.SitelensError, match="give prompts"):
        head_outputs(torch.zeros(Model.of(model).shape), Model.of(model))


# -- attention --

UNSEEN = {"OPT"}  # its bridge computes attention without exposing the pattern


@pytest.mark.parametrize("name", architectures)
def test_attention_is_that_of_the_raw_model_or_refused(name: str) -> None:
    model, heads = zoo.bridge(name), [(0, 0), (1, 3), (1, 2)]
    text = "Q: aa bb ab ac ad ae ba bc\nA:"
    if name in UNSEEN:
        with pytest.raises(sl.SitelensError, match=r"does not show the attention of layers 0, 1"):
            attention(text, heads, model)
        return
    found = attention([text, "Q: aa\nA:"], heads, model)
    for row, one in ((0, text), (1, "Q: aa\nA:")):
        ids = torch.tensor([micro.tokenizer()(one)["input_ids"]])
        if not name.startswith("Falcon"):  # its logits change if attention weights are requested
            weights = zoo.attentions(name, ids)
            expected = torch.stack([weights[layer][0, head, -1] for layer, head in heads])
            torch.testing.assert_close(found[row, :, -ids.shape[1] :], expected, rtol=1e-4, atol=1e-5)
        assert not found[row, :, : -ids.shape[1]].any()
    if name == "GPT-OSS":
        assert (found.sum(-1) < 0.99).all() and (found.sum(-1) > 0.01).all()
    else:
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))


def test_attention_sinks_are_a_role_of_their_own() -> None:
    model, task = zoo.bridge("GPT-OSS"), micro.task()
    roles = attention_roles(task, [(0, 1)], model, n_prompts=2, n_shots=1)
    assert roles["role"].tolist() == [*ROLES, SINK] and roles["share"].sum() == pytest.approx(1, abs=1e-5)
    frame = attention_example("Q: aa\nA:", "L0H1", model)
    assert frame["role"].iloc[-1] == SINK and frame["0.1"].sum() == pytest.approx(1, abs=1e-5)
    ids = torch.tensor([micro.tokenizer()("Q: aa\nA:")["input_ids"]])
    on_tokens = float(zoo.attentions("GPT-OSS", ids)[0][0, 1, -1].sum())
    assert frame["0.1"].iloc[-1] == pytest.approx(1 - on_tokens, abs=1e-5) and on_tokens < 0.99
    assert SINK not in set(attention_roles(task, [(0, 1)], zoo.bridge("Llama"), n_prompts=2, n_shots=1)["role"])


def test_a_bridge_that_shows_no_attention_is_refused_everywhere() -> None:
    model = zoo.bridge("OPT")
    for call in (
        lambda: attention_roles(micro.task(), None, model, n_prompts=2, n_shots=1),
        lambda: attention_example("Q: aa\nA:", [(0, 0)], model),
        lambda: induction_scores(model, n_rows=1, length=4),
    ):
        with pytest.raises(sl.SitelensError, match="does not show the attention"):
            call()


# -- conditions at the outputs of attention and MLP --


@pytest.mark.parametrize("name", architectures)
def test_icv_and_i2cl_change_what_a_module_adds_to_the_stream(name: str) -> None:
    """Compared with hooks on the raw model: after each module, or after its last layer if it adds the stream itself."""
    model = zoo.bridge(name)
    ids = torch.tensor([micro.tokenizer()("Q: aa\nA:")["input_ids"]])
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(2, model.cfg.d_model, generator=generator), dim=-1)
    turn = InContextVector(direction, 0.5)
    context = torch.randn(2, 2, model.cfg.d_model, generator=generator)
    mix = LinearCombination(context, torch.full((2, 2), 0.3), torch.full((2, 2), 0.8))
    attention_outputs, mlp_outputs = zoo.outputs(zoo.raw(name))
    turned = {
        module: lambda x, v=v: turn._turn(x, direction=v) for module, v in zip(mlp_outputs, direction, strict=True)
    }
    mixed = {}
    for place, modules in enumerate((attention_outputs, mlp_outputs)):
        for layer, module in enumerate(modules):
            mixed[module] = lambda x, vector=context[layer, place]: 0.8 * x + 0.3 * vector
    for condition, changes in ((turn, turned), (mix, mixed)):
        with torch.no_grad(), condition.applied(model):
            found = model.forward(ids, use_cache=False)[0, -1]
        expected = zoo.logits_with_outputs(name, ids, changes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
