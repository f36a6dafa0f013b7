"""One model, many users: threads, the user's own hooks, interrupts, and state that must be restored."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sitelens as sl
from sitelens.conditions import base as conditions
from sitelens.conditions.adapters import Adapters, LowRank
from sitelens.conditions.embedding import embedding_prompts
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.streams import AddToStream
from sitelens.engine import batches, forward, network, prefix, prompts, twins
from sitelens.methods.site.loop import Run
from sitelens.models.interference import Here
from sitelens.models.model import Bridge, Model, z_hook
from sitelens.tasks import Task
from tests import interruption, micro, oracle

# What is computed with the user's hooks is not cached, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*neither taken from the cache:sitelens.errors.SitelensWarning")
TASK = micro.task(n=30)
CONFIG = sl.TrainConfig(n_steps=3, eval_every=2, n_valid=4)
SMALL: dict[str, dict[str, Any]] = {
    "ManyShot": {"limit": 2},
    "FV": {"n_prompts": 3, "n_shots": 2, "n_effects": 2, "head_counts": (2,)},
    "TV": {"n_sets": 2, "n_shots": 2},
    "ICV": {"n_pairs": 3, "strengths": (0.1,)},
    "MTV": {"n_prompts": 3, "n_shots": 2, "n_steps": 2, "n_masks": 4, "n_draws": 2},
    "I2CL": {"n_demonstrations": 2, "epochs": 2},
    "LTV": {"n_prompts": 3, "n_shots": 2, "n_pool": 4, "pool_shots": 1, "n_steps": 2, "batch_size": 2,
            "learning_rates": (0.1,)},
    "LoFiT": {"epochs": 1, "n_heads": 2},
    "LoRA": {"n_steps": 2, "learning_rates": (1e-3,)},
}  # fmt: skip
Work = Callable[[Bridge], Any]


def whole(model: Bridge, ids: list[int]) -> Tensor:
    """Logits `[vocab]` after one prompt, by the user's own forward pass over the whole prompt with the user's hooks."""
    with torch.no_grad():
        return model.forward(torch.tensor([ids]))[0, -1]


def logprobs(model: Bridge, n: int = 3) -> list[float]:
    """The expected log-probabilities of zero-shot evaluation, from the user's own passes."""
    found = []
    for item in TASK.test[:n]:
        logits = whole(model, oracle.encode(f"Q: {item.input}\nA:")).log_softmax(-1)
        found.append(logits[oracle.encode(" " + item.output)[0]].item())
    return found


def evaluated(model: Bridge, condition: sl.Condition | None = None, n: int = 3) -> list[float]:
    frame = sl.evaluate(TASK, {"c": condition or sl.ZeroShot()}, model, n_items=None)
    return frame["logprob"].tolist()[:n]


def patch(model: Bridge, scope: Any = "prompt") -> PatchHeads:
    layers, heads, d_head = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    generator = torch.Generator().manual_seed(3)
    alpha = torch.rand(layers, heads, generator=generator)
    mean_z = torch.randn(layers, heads, d_head, generator=generator)
    return PatchHeads(sl.HeadSelection(alpha), sl.TaskEmbedding(mean_z, "t", None, 1, 1, 0), scope=scope)


def added(model: Bridge) -> AddToStream:
    vector = torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(4))
    return AddToStream(vector, (0,))


def adapters(model: Bridge) -> LowRank:
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.stack(layers) for name, layers in Adapters(Model.of(model), 2, 4).weights.items()}
    return LowRank({name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}, 4)


# Threads


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_threads_and_the_users_own_passes_do_not_disturb_each_other(family: str) -> None:
    """Each thread does different work on the same model; every result is the same as alone."""
    model = micro.bridge(family)
    task = micro.task(n=12)
    ids = oracle.encode("ab cd ef")
    jobs: list[Callable[[], Any]] = [
        lambda: sl.evaluate(task, {"z": sl.ZeroShot(), "p": patch(model)}, model)["logprob"].tolist(),
        lambda: sl.evaluate(task, {"a": added(model)}, model, metrics=("exact_match",), max_new_tokens=3)[
            "logprob"
        ].tolist(),
        lambda: sl.evaluate(task, {"l": adapters(model)}, model)["logprob"].tolist(),
        lambda: sl.generate(["ab cd", "ef"], patch(model, "generation"), model, max_new_tokens=4),
        lambda: [whole(model, ids).tolist() for _ in range(12)],
        lambda: applied(model, ids),
    ]
    expected = [job() for job in jobs]
    found: list[list[Any]] = [[] for _ in jobs]

    def repeat(place: int) -> None:
        for _ in range(2):
            try:
                found[place].append(jobs[place]())
            except BaseException as error:
                found[place].append(repr(error))

    threads = [threading.Thread(target=repeat, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, those in zip(expected, found, strict=True):
        assert those == [one, one]
    assert [job() for job in jobs] == expected and not micro.hooks_left(model)


def applied(model: Bridge, ids: list[int]) -> list[Any]:
    """The user's own passes with conditions applied to the model, in the current thread."""
    results = []
    for condition in (added(model), adapters(model)):
        with condition.applied(model):
            results += [whole(model, ids).tolist() for _ in range(6)]
    return results


def test_an_applied_condition_is_in_effect_in_its_own_thread_only() -> None:
    model = micro.bridge("Llama")
    ids = oracle.encode("ab cd ef")
    before = whole(model, ids)
    elsewhere: list[Tensor] = []
    for condition in (added(model), adapters(model)):
        with condition.applied(model):
            thread = threading.Thread(target=lambda: elsewhere.append(whole(model, ids)))
            thread.start()
            thread.join()
            assert not torch.allclose(whole(model, ids), before)
        assert torch.equal(whole(model, ids), before)
    assert all(torch.equal(one, before) for one in elsewhere) and len(elsewhere) == 2
    assert not micro.hooks_left(model)


# The user's own hooks


def at_the_end(z: Tensor, hook: Any) -> Tensor:
    """A hook written for whole prompts: it edits their last position."""
    z = z.clone()
    z[:, -1] += 1.0
    return z


def at_the_third(z: Tensor, hook: Any) -> Tensor:
    z = z.clone()
    z[:, 2] *= -1.0
    return z


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("edit", [at_the_end, at_the_third])
def test_what_the_users_hook_does_to_whole_prompts_is_what_counts(family: str, edit: Any) -> None:
    model = micro.bridge(family)
    clean = evaluated(model)
    with model.hooks(fwd_hooks=[(z_hook(0), edit)]):
        expected = logprobs(model)
        assert evaluated(model) == pytest.approx(expected, abs=1e-5)
        embedding = sl.embed_task(TASK, model, n_prompts=3, n_shots=2)
        assert torch.allclose(embedding.mean_z, mean_z(model), atol=1e-5)
        texts = ["ab cd ef", "aa ab ac ad"]
        assert sl.generate(texts, None, model, max_new_tokens=4) == [greedy(model, text, 4) for text in texts]
    assert expected != pytest.approx(clean, abs=1e-3)
    assert evaluated(model) == clean


def mean_z(model: Bridge) -> Tensor:
    """The mean of z over the prompts of `embed_task`, each run alone."""
    rows = []
    for prompt in embedding_prompts(TASK, micro.tokenizer(), 3, 2, 0):
        kept: list[Tensor] = []
        hooks: list[Any] = [(z_hook(layer), lambda z, hook: kept.append(z[0, -1].clone())) for layer in range(2)]  # noqa: B023
        with torch.no_grad():
            model.run_with_hooks(torch.tensor([oracle.encode(prompt.text)]), fwd_hooks=hooks)
        rows.append(torch.stack(kept))
    return torch.stack(rows).mean(0)


def greedy(model: Bridge, text: str, new: int) -> str:
    """Greedy decoding that runs the whole text again for each token."""
    ids = oracle.encode(text)
    start = len(ids)
    for _ in range(new):
        ids.append(int(whole(model, ids).argmax()))
    return oracle.text_of(ids[start:])


@pytest.mark.parametrize("make", [patch, lambda model: patch(model, "generation"), added, adapters])
def test_conditions_and_the_users_hooks_act_together(make: Callable[[Bridge], sl.Condition]) -> None:
    """At the last token of the prompt, or also at decoded tokens, as each condition does without other hooks."""
    model = micro.bridge("Llama")
    condition = make(model)
    ids = oracle.encode("Q: ab\nA:")
    model.add_hook(z_hook(1), at_the_third)
    with condition.applied(model):
        expected = whole(model, ids).log_softmax(-1)
    item = sl.Example("ab", "cd")
    task = replace(TASK, test=(item,))
    found = sl.evaluate(task, {"c": condition}, model)["logprob"].tolist()
    assert found == pytest.approx([expected[oracle.encode(" cd")[0]].item()], abs=1e-5)
    # The hook above edits a position of the prompt, so decoding with and without a cache must agree.
    together = sl.generate(["Q: ab\nA:"], condition, model, max_new_tokens=4)
    model.reset_hooks()
    network.Passes(Model.of(model))
    reference = ReferenceHook(condition, model, len(ids))
    assert together == [reference.greedy(ids, 4)]


class ReferenceHook:
    """Generation with TransformerLens's own hooks on the whole text; the condition acts only at its own positions."""

    def __init__(self, condition: sl.Condition, model: Bridge, length: int) -> None:
        self.condition, self.model, self.length = condition, model, length

    def greedy(self, ids: list[int], new: int) -> str:
        text = list(ids)
        for _ in range(new):
            text.append(int(self.logits(text).argmax()))
        return oracle.text_of(text[len(ids) :])

    def logits(self, text: list[int]) -> Tensor:
        ours = [] if isinstance(self.condition, LowRank) else self.condition.fwd_hooks(self.model)
        ends = [self.length] if self.condition.scope == "prompt" else list(range(self.length, len(text) + 1))

        def reaching(act: Any) -> Any:
            def hook(x: Tensor, hook: Any) -> Tensor:
                for end in ends:
                    x = torch.cat([act(x[:, :end], hook=hook), x[:, end:]], dim=1)
                return x

            return hook

        hooks = [(z_hook(1), at_the_third), *((name, reaching(act)) for name, act in ours)]
        with self.model.hooks(fwd_hooks=hooks):
            if isinstance(self.condition, LowRank):
                with self.condition.applied(self.model):
                    return whole(self.model, text)
            return whole(self.model, text)


def test_training_goes_through_whole_prompts_where_the_user_listens() -> None:
    """The user's hook edits the last position of the residual stream before the first layer."""
    model = micro.bridge("Llama", torch.float64)
    embedding = sl.embed_task(TASK, model, n_prompts=3, n_shots=2)
    free = sl.train_selection(TASK, model, embedding=embedding, config=CONFIG)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", at_the_end)]):
        result = sl.train_selection(TASK, model, embedding=replaced(embedding, model), config=CONFIG)
        alpha = torch.full((2, 4), 0.5, dtype=torch.float64)
        run = Run(((0, 0),), CONFIG.seed, 0.5)
        losses = []
        for item in [TASK.train[i] for i in run.draws(TASK, CONFIG)[0]]:
            edit = forward.HeadEdit.mix(alpha[None], embedding.mean_z.double()[None])
            hooks: list[Any] = edit.hooks()
            ids = torch.tensor([oracle.encode(f"Q: {item.input}\nA:")])
            with torch.no_grad():
                logits = model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]
            losses.append(-logits.log_softmax(-1)[oracle.encode(" " + item.output)[0]].item())
    assert result.history["loss"].iloc[0] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert free.history["loss"].iloc[0] != pytest.approx(sum(losses) / len(losses), rel=1e-4)


def replaced(embedding: sl.TaskEmbedding, model: Bridge) -> sl.TaskEmbedding:
    return sl.TaskEmbedding(embedding.mean_z, embedding.task, None, 3, 2, 0)


def test_a_head_cannot_be_attributed_under_the_users_hooks() -> None:
    model = micro.bridge("Llama")
    model.add_hook(z_hook(0), at_the_end)
    with pytest.raises(sl.SitelensError, match="has hooks, or a forward function, of your own"):
        sl.heads.head_attribution(TASK, model, n_items=2, n_shots=1)


# State is restored


@contextmanager
def as_it_was(model: Bridge) -> Iterator[None]:
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        assert after.keys() == before.keys()
        assert [name for name in before if before[name] != after[name]] == []


def snapshot(model: Bridge) -> dict[str, Any]:
    net: Any = model.original_model
    tok: Any = model.tokenizer
    modules = dict(twins_modules(model))
    backend = tok.backend_tokenizer
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items() if name},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [list(getattr(module, kind).values()) for kind in twins.HOOKS if not is_the_bridges(module)]
            for name, module in modules.items()
        },
        "parameters": {name: (id(p), p.requires_grad, id(p.grad), p._version) for name, p in net.named_parameters()},
        "buffers": {name: (id(b), b._version) for name, b in net.named_buffers()},
        "config": copy.deepcopy(net.config.to_dict()),
        "attention": net.config._attn_implementation,
        "generation": copy.deepcopy(net.generation_config.to_dict()),
        "tokenizer": (tok.padding_side, tok.truncation_side, backend.padding, backend.truncation),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "random": (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # type: ignore[union-attr]
        "settings": repr(sl.settings),
    }


def is_the_bridges(module: nn.Module) -> bool:
    """Whether a module has hooks that the bridge adds itself, to the norms of blocks, in its first pass."""
    return any("transformer_lens" in hook.__module__ for hook in module._forward_pre_hooks.values())


def twins_modules(model: Bridge) -> Iterator[tuple[str, nn.Module]]:
    yield from ((f"bridge.{name}", module) for name, module in model.named_modules())
    yield from ((f"network.{name}", module) for name, module in model.original_model.named_modules())


def fit(name: str) -> Work:
    return lambda model: getattr(sl.methods, name)(**SMALL[name]).fit(TASK, model)


def trained(model: Bridge) -> Any:
    vector = sl.embed_task(TASK, model, n_prompts=3, n_shots=2)
    return sl.train_selection(TASK, model, embedding=vector, config=CONFIG)


CALLS: dict[str, Work] = {
    "evaluate": lambda model: sl.evaluate(TASK, {"z": sl.ZeroShot(), "p": patch(model), "a": added(model)}, model,
                                          n_items=3, metrics=("first_token", "exact_match"), max_new_tokens=3),
    "generate": lambda model: sl.generate(["ab cd", "ef"], patch(model, "generation"), model, max_new_tokens=3),
    "train": trained,
    "attention": lambda model: sl.heads.attention_roles(TASK, [(0, 1)], model, n_prompts=2, n_shots=2),
    "induction": lambda model: sl.heads.induction_scores(model, n_rows=2, length=4),
    "attribution": lambda model: sl.heads.head_attribution(TASK, model, n_items=2, n_shots=1),
    "effects": lambda model: sl.heads.indirect_effects(
        TASK, model, embedding=sl.embed_task(TASK, model, n_prompts=3, n_shots=2), n_prompts=2, n_shots=2
    ),
} | {name: fit(name) for name in SMALL}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("Llama", name) for name in CALLS), *(("GPT2", name) for name in ("evaluate", "train", "LoRA"))],
)
def test_every_call_leaves_all_as_it_was(family: str, name: str, unchecked: None) -> None:
    """Even if weights are trainable and have gradients, and the caller has set a mode."""
    model = micro.bridge(family)
    model.forward(torch.tensor([[5, 6]]))  # after this the bridge has installed its own hooks
    for place, weight in enumerate(model.original_model.parameters()):
        if weight.is_floating_point() and place % 2:
            weight.requires_grad_(True)
            weight.grad = torch.zeros_like(weight)
    model.tokenizer.backend_tokenizer.no_padding()
    with torch.no_grad(), as_it_was(model):
        CALLS[name](model)


@pytest.mark.parametrize("name", ["evaluate", "train", "LoRA", "LTV", "I2CL", "MTV", "attribution"])
def test_a_failing_call_leaves_all_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """The second forward pass runs out of memory."""
    model = micro.bridge("Llama")
    model.forward(torch.tensor([[5, 6]]))
    kind: Any = type(model.original_model)
    original, left = kind.forward, 2

    def forward(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise torch.OutOfMemoryError
        return original(*args, **options)

    monkeypatch.setattr(kind, "forward", forward)
    with as_it_was(model), pytest.raises(sl.SitelensError, match="out of memory"):
        CALLS[name](model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, lambda: torch.set_grad_enabled(False)) for name in ("train", "MTV", "LoRA")),
        *((name, torch.inference_mode) for name in ("train", *SMALL) if name != "ManyShot"),
    ],
)
def test_fits_work_whatever_the_gradient_mode(name: str, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    model = micro.bridge("Llama")
    expected = numbers(CALLS[name](model))
    with sl.settings.using(cache_dir=sl.settings.cache() / "other"), mode():
        result = CALLS[name](model)
    assert torch.equal(expected, numbers(result))
    assert not any(tensor.is_inference() for tensor in tensors_of(result))


def numbers(result: Any) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors_of(result)])


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, sl.TrainResult):
        return [result.selection.alpha]
    tensors, _ = result.state()
    return [tensor for _, tensor in sorted(tensors.items())]


def test_weights_of_inference_mode_cannot_be_trained_through() -> None:
    with torch.inference_mode():
        model = micro.bridge("Llama")
        for module in model.original_model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    module._parameters[name] = nn.Parameter(weight.clone(), requires_grad=False)
    with pytest.raises(sl.SitelensError, match=r"made under torch.inference_mode\(\).*load the model outside"):
        trained(model)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_dropout_in_training_mode_is_noticed_in_any_module(family: str) -> None:
    model = micro.bridge(family)
    net: Any = model.original_model
    part = next(m for m in net.modules() if isinstance(m, nn.Dropout)) if family == "GPT2" else None
    if part is None:
        part = model.blocks[1].attn.original_component
        part.attention_dropout = 0.5
    else:
        part.p = 0.5
    evaluated(model)
    part.training = True
    with pytest.raises(sl.SitelensError, match=r"(drop|self_attn) of .* is in training mode, where its dropout"):
        evaluated(model)


# Interrupts


@pytest.mark.slow
def test_an_interrupt_at_any_line_does_no_harm(llama: Bridge) -> None:
    """Ctrl-C at every line of forward passes and of the code that adds and removes the user's hooks."""
    ids = oracle.encode("ab cd ef")
    llama.forward(torch.tensor([ids]))
    before = whole(llama, ids)
    heard: list[int] = []
    batch = batches.tokenize([prompts.Prompt("ab cd", ())], micro.tokenizer(), None, "t")
    with llama.hooks(fwd_hooks=[("blocks.1.mlp.hook_out", lambda x, hook: heard.append(1))]):
        left = micro.hooks_left(llama)

        def own() -> None:
            with added(llama).applied(llama):
                pass

        def adapted() -> None:
            with adapters(llama).applied(llama):
                pass

        def ours() -> None:
            with conditions.in_effect(added(llama), Model.of(llama)) as passes:
                forward.full_logits(batch, passes)
            cache = prefix.PrefixCache.of(batch, Model.of(llama), 10**9)
            with forward.LastToken(Model.of(llama)) as run:
                patched = patch(llama).patch(llama)
                assert patched is not None
                run(cache, patched.edit(llama))

        outer, loop = [twins.hooked_here, Here], [twins._remove]
        runs = [(own, outer, 1), (own, loop, 53), (adapted, outer, 1), (adapted, loop, 53)]
        for work, where, step in [*runs, (ours, [network, conditions.in_effect], 2)]:
            for _ in interruption.at_every_line(work, where, step):
                assert micro.hooks_left(llama) == left
                assert not any(m._forward_hooks for m in llama.original_model.modules() if isinstance(m, nn.Linear))
            heard.clear()
            assert torch.equal(whole(llama, ids), before) and heard == [1]


def test_an_adapter_of_peft_stays_as_it_is(unchecked: None) -> None:
    peft = pytest.importorskip("peft")
    network = micro.raw("Llama")
    peft_config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    network = peft.inject_adapter_in_model(peft_config, network, "own")
    model = micro.bridged(network.eval(), "Llama", micro.tokenizer())
    layer: Any = model.blocks[0].attn.q.original_component
    bare = evaluated(micro.bridge("Llama"))
    before = evaluated(model)
    state = (layer.active_adapters, dict(layer.scaling), sorted(layer.lora_A), layer.disable_adapters)
    with as_it_was(model):
        condition: Any = sl.methods.LoRA(n_steps=2, learning_rates=(0.5,)).fit(TASK, model)
        under = evaluated(model, condition)
    assert (layer.active_adapters, dict(layer.scaling), sorted(layer.lora_A), layer.disable_adapters) == state
    assert evaluated(model) == before != bare
    nothing = LowRank({name: 0 * w for name, w in condition.weights.items()}, condition.alpha)
    assert evaluated(model, nothing) == pytest.approx(before, abs=1e-5)  # on top of the adapter, not instead of it
    assert under != pytest.approx(before, abs=1e-5)


def test_the_task_is_not_too_small() -> None:
    assert isinstance(TASK, Task) and len(TASK.test) >= 3
