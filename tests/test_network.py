"""The network under the bridge: set aside and put back, never past a hook, always with the weights of the moment."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sitelens.models import Model
from sitelens.network import all_positions, can_unhook, run_tokens, unhooked
from tests import micro, oracle

IDS = oracle.encode("ab cd ef")


def logits_of(model: Model) -> Tensor:
    tokens = torch.tensor([IDS])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return run_tokens(model, tokens, mask, all_positions(mask))[0, -1]


def modules_of(model: Model) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.original_model.named_modules(remove_duplicate=False)]


def test_everything_is_put_back(family: str) -> None:
    model = micro.bridge(family)
    before, config = modules_of(model), model.original_model.config

    def interrupted() -> None:
        with unhooked(model, "sdpa") as network:
            assert config._attn_implementation == "sdpa"
            assert not any("Bridge" in type(module).__name__ for module in network.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert modules_of(model) == before
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("where", ["point", "wrapper", "backward", "permanent"])
def test_whoever_listens_is_heard(where: str) -> None:
    model = micro.bridge("Llama")
    model.forward(torch.tensor([IDS]))
    assert can_unhook(model)
    point: Any = model.hook_dict["blocks.1.attn.hook_pattern"]
    if where == "wrapper":
        handle = model.blocks[0].register_forward_hook(lambda *_: None)
    else:
        point.add_hook(lambda x, hook: None, dir="bwd" if where == "backward" else "fwd",
                       is_permanent=where == "permanent")  # fmt: skip
    assert not can_unhook(model)
    if where == "wrapper":
        handle.remove()
    else:
        point.remove_hooks(dir="both", including_permanent=True)
    assert can_unhook(model)


def test_hooks_of_the_raw_modules_act_all_the_same() -> None:
    model = micro.bridge("Llama")
    before = logits_of(model)
    raw: Any = model.blocks[0].mlp.original_component
    handle = raw.register_forward_hook(lambda module, args, output: 0 * output)
    assert can_unhook(model)
    without = logits_of(model)
    expected = model.forward(torch.tensor([IDS]))[0, -1]
    handle.remove()
    assert not torch.allclose(without, before)
    torch.testing.assert_close(without, expected)


@pytest.mark.parametrize("change", ["in place", "parameter", "module"])
def test_the_weights_of_the_moment_count(family: str, change: str) -> None:
    model = micro.bridge(family)
    before = logits_of(model)
    wrapper: Any = model.blocks[1].ln2
    part: Any = wrapper.original_component
    if change == "in place":
        part.weight.mul_(1.5)
    elif change == "parameter":
        part.weight = nn.Parameter(part.weight * 1.5, requires_grad=False)
    else:
        other = copy.deepcopy(part)
        other.weight.mul_(1.5)
        wrapper.set_original_component(other)
    expected = model.forward(torch.tensor([IDS]))[0, -1]
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_what_is_known_of_a_model_does_not_keep_it_alive() -> None:
    model = micro.bridge("Llama")
    logits_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_unknown_families_run_through_the_bridge() -> None:
    model = micro.bridge("Llama")
    model.original_model.config.model_type = "something-new"
    assert not can_unhook(model)
