"""Passes on twins: the model is not modified, the user's hooks run, and the current weights are used."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sitelens.conditions.prompting import ZeroShot
from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.engine.twins import bridge_twin, network_twin
from sitelens.errors import SitelensError
from sitelens.evaluation.evaluate import evaluate, generate
from sitelens.models.model import Bridge, Model, z_hook
from sitelens.tasks import Example
from tests import micro, oracle

IDS = oracle.encode("ab cd ef")


def logits_of(model: Bridge | Passes) -> Tensor:
    tokens = torch.tensor([IDS])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    inside = model if isinstance(model, Passes) else Model.of(model)
    return run_tokens(inside, tokens, mask, all_positions(mask))[0, -1]


def test_a_twin_has_modules_of_its_own_and_the_models_weights(wide_family: str) -> None:
    model = micro.bridge(wide_family)
    config: Any = model.original_model.config
    before = config.to_dict()
    twin, network = bridge_twin(model), network_twin(model, "sdpa")
    own = {id(module) for module in [*model.modules(), *model.original_model.modules()]}
    for other in (twin, twin.original_model, network):
        assert not own & {id(module) for module in other.modules()}
        tensors = {id(tensor) for tensor in [*other.parameters(), *other.buffers()]}
        assert tensors <= {id(t) for t in [*model.original_model.parameters(), *model.original_model.buffers()]} | {
            id(t) for t in [*model.parameters(), *model.buffers()]
        }
    assert network.config._attn_implementation == "sdpa" and config.to_dict() == before
    assert not any("Bridge" in type(module).__name__ for module in network.modules())


def test_twins_compute_what_the_model_does(wide_family: str) -> None:
    model = micro.bridge(wide_family)
    tokens = torch.tensor([IDS])
    expected = model.forward(tokens)
    assert torch.equal(bridge_twin(model).forward(tokens), expected)
    torch.testing.assert_close(network_twin(model)(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_a_twin_are_its_own() -> None:
    model = micro.bridge("Llama")
    before = logits_of(model)
    passes = Passes(Model.of(model), [(z_hook(0), lambda z, hook: 0 * z)])
    assert not torch.allclose(logits_of(passes), before)
    assert torch.equal(logits_of(model), before) and not micro.hooks_left(model)


@pytest.mark.parametrize("where", ["point", "wrapper", "raw", "backward", "permanent", "forward", "method", "global"])
def test_whoever_listens_is_noticed(where: str) -> None:
    model = micro.bridge("Llama")
    model.forward(torch.tensor([IDS]))
    assert Passes(Model.of(model)).can_bypass_bridge and not Passes(Model.of(model)).user_hooked
    point: Any = model.hook_dict["blocks.1.attn.hook_pattern"]
    raw: Any = model.blocks[0].mlp.original_component
    handle: Any = None
    if where == "wrapper":
        handle = model.blocks[0].register_forward_hook(lambda *_: None)
    elif where == "raw":
        handle = raw.register_forward_pre_hook(lambda *_: None)
    elif where == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif where == "forward":
        raw.forward = lambda x: x
    elif where == "method":
        raw.forward = test_whoever_listens_is_noticed.__get__(raw)
    else:
        point.add_hook(lambda x, hook: None, dir="bwd" if where == "backward" else "fwd",
                       is_permanent=where == "permanent")  # fmt: skip
    assert Passes(Model.of(model)).user_hooked and not Passes(Model.of(model)).can_bypass_bridge
    if handle is not None:
        handle.remove()
    elif "forward" in vars(raw):
        del raw.forward
    else:
        point.remove_hooks(dir="both", including_permanent=True)
    assert Passes(Model.of(model)).can_bypass_bridge


@pytest.mark.parametrize("kind", ["lens", "forward", "pre", "keywords"])
def test_a_hook_of_the_users_acts_and_is_told_of_her_own_module(kind: str) -> None:
    model = micro.bridge("Llama")
    before = logits_of(model)
    told: list[Any] = []
    raw: Any = model.blocks[0].mlp.original_component
    if kind == "lens":
        model.add_hook("blocks.0.mlp.hook_out", lambda x, hook: told.append(hook) or 0 * x)
        raw = model.hook_dict["blocks.0.mlp.hook_out"]
    elif kind == "forward":
        raw.register_forward_hook(lambda module, args, output: told.append(module) or 0 * output)
    elif kind == "pre":
        raw.register_forward_pre_hook(lambda module, args: told.append(module) or (0 * args[0],))
    else:
        raw.register_forward_hook(lambda module, args, options, output: told.append(module) or 0 * output,
                                  with_kwargs=True)  # fmt: skip
    found = logits_of(model)
    assert told == [raw]
    torch.testing.assert_close(found, model.forward(torch.tensor([IDS]))[0, -1])
    assert not torch.allclose(found, before)


def test_a_forward_of_the_users_is_run() -> None:
    model = micro.bridge("Llama")
    raw: Any = model.blocks[0].mlp.original_component
    original = raw.forward
    raw.forward = lambda x: 0 * original(x)
    torch.testing.assert_close(logits_of(model), model.forward(torch.tensor([IDS]))[0, -1])


@pytest.mark.parametrize("change", ["in place", "parameter", "module", "attribute"])
def test_the_weights_of_the_moment_count(family: str, change: str) -> None:
    model = micro.bridge(family)
    before = logits_of(model)
    wrapper: Any = model.blocks[1].ln2
    part: Any = wrapper.original_component
    if change == "in place":
        part.weight.mul_(1.5)
    elif change == "parameter":
        part.weight = nn.Parameter(part.weight * 1.5, requires_grad=False)
    elif change == "attribute":
        if family not in ("Llama", "Mistral", "Mixtral", "Qwen3"):
            pytest.skip("the bridge reads another one")
        part.variance_epsilon = 1.0
    else:
        other = copy.deepcopy(part)
        other.weight.mul_(1.5)
        wrapper.set_original_component(other)
    expected = model.forward(torch.tensor([IDS]))[0, -1]
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_replaced_meanwhile_counts() -> None:
    model = micro.bridge("Llama")
    passes = Passes(Model.of(model))
    before = logits_of(passes)
    part: Any = model.blocks[1].ln2.original_component
    part.weight = nn.Parameter(part.weight * 1.5, requires_grad=False)
    assert not torch.allclose(logits_of(passes), before)
    assert torch.equal(logits_of(passes), logits_of(model))


def test_what_is_known_of_a_model_does_not_keep_it_alive() -> None:
    model = micro.bridge("Llama")
    logits_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_unknown_families_run_through_the_bridge() -> None:
    model = micro.bridge("Llama")
    network: Any = model.original_model
    network.config.model_type = "something-new"
    assert not Passes(Model.of(model)).can_bypass_bridge


@pytest.mark.parametrize("whose", ["network", "block"])
def test_hooks_of_ours_act_also_where_the_user_replaced_a_forward(whose: str) -> None:
    """The user's function calls the model's own modules, which a twin cannot change."""
    model = micro.bridge("Llama")
    part: Any = model.original_model if whose == "network" else model.blocks[1].original_component
    original = part.forward
    part.forward = lambda *args, **options: original(*args, **options)
    passes = Passes(Model.of(model), [(z_hook(1), lambda z, hook: 0 * z)])
    expected = model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=[(z_hook(1), lambda z, hook: 0 * z)])[0, -1]
    torch.testing.assert_close(logits_of(passes), expected)
    assert not micro.hooks_left(model)


def test_what_another_thread_caches_is_its_own_passes_only() -> None:
    model = micro.bridge("GPT2")
    seen: list[int] = []

    def ours(block: Any, args: Any) -> None:
        if not seen:
            seen.append(1)
            logits_of(model)  # as another thread might, during the user's pass

    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: None)
    expected = model.run_with_cache(torch.tensor([[5, 6]]))[1]
    model.reset_hooks()
    model.blocks[0].register_forward_pre_hook(ours)  # on the bridge: it runs inside the user's pass
    found = model.run_with_cache(torch.tensor([[5, 6]]))[1]
    assert seen and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_token_that_the_model_does_not_have_is_named() -> None:
    tokenizer, task = micro.tokenizer(), micro.task()
    tokenizer.add_tokens(["zzzz"])
    model = micro.bridged(micro.raw("Llama"), "Llama", tokenizer)
    with pytest.raises(SitelensError, match=r"the token 'zzzz' has the id \d+, but .* has \d+ tokens: resize"):
        evaluate(replace(task, test=(Example("zzzz", "aa"),)), {"zero-shot": ZeroShot()}, model)
    with pytest.raises(SitelensError, match="'zzzz' has the id"):
        generate(["Q: zzzz\nA:"], None, model)
