"""The way from a head to the logits in many architectures, against hooks and arithmetic on the raw models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sitelens as sl
from sitelens.heads import head_attribution
from sitelens.heads.writing import written
from sitelens.models import head_shape
from sitelens.prompts import few_shot_prompts, tokenize
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
    scale = 1.0 if name == "Gemma 2" else scale  # which caps its logits: attribution is before the cap
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
    z = torch.randn(*head_shape(model), generator=torch.Generator().manual_seed(1))
    found = written(z, model, batch)
    blocks = zoo.blocks(zoo.raw(name))
    for layer, head in ((0, 0), (0, 3), (1, 1)):
        expected = held.writes(layer, head, z[layer, head], blocks[layer])
        torch.testing.assert_close(found[layer, head], expected, rtol=1e-3, atol=2e-5)


def test_a_write_that_passes_a_norm_needs_a_prompt() -> None:
    model = zoo.bridge("Gemma 2")
    with pytest.raises(sl.SitelensError, match="give prompts"):
        written(torch.zeros(head_shape(model)), model)
