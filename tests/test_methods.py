"""The methods: conditions compared with raw models, what each fit estimates, and every method on every family."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import sitelens as sl
from sitelens.conditions.adapters import Adapters, LowRank
from sitelens.conditions.base import Condition
from sitelens.conditions.heads import HeadOffsets
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.streams import AddToStream, InContextVector, LinearCombination, ReplaceStream
from sitelens.engine.network import Passes, metered
from sitelens.errors import SitelensError
from sitelens.methods import i2cl, icv, lofit, ltv, mtv
from sitelens.methods.base import Method
from sitelens.methods.i2cl import cosine
from sitelens.methods.items import cap_training_items, prompts_with_answers, shuffled_batches, zero_shot
from sitelens.methods.lofit import MAX_GRAD_NORM
from sitelens.methods.losses import answer_loss
from sitelens.methods.registry import method_named
from sitelens.models.fingerprints import fingerprint
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from sitelens.tasks import Example, Task
from tests import micro, oracle

TASK = micro.task("shift", 40)
TEXTS = [" ".join(micro.WORDS[i : i + n]) for i, n in ((3, 7), (20, 4), (50, 12))]
CLOSE = 2e-5  # relative to the scale of logits
SMALL: dict[str, dict[str, Any]] = {
    "many-shot": {"limit": 4},
    "FV": {"n_prompts": 3, "n_shots": 2, "n_effects": 2, "head_counts": (1, 3)},
    "TV": {"n_sets": 3, "n_shots": 2},
    "ICV": {"n_pairs": 3, "strengths": (0.1, 0.5)},
    "MTV": {"n_prompts": 3, "n_shots": 2, "n_steps": 4, "n_masks": 4, "n_draws": 2},
    "I2CL": {"n_demonstrations": 3, "epochs": 2},
    "LTV": {"n_prompts": 3, "n_shots": 2, "n_pool": 6, "pool_shots": 2, "n_steps": 3, "batch_size": 2,
            "learning_rates": (0.1,)},
    "LoFiT": {"epochs": 1, "n_heads": 2},
    "LoRA": {"n_steps": 3, "learning_rates": (1e-2,)},
    "SITE": {"n_prompts": 3, "n_shots": 2, "n_steps": 3, "n_valid": 4},
}  # fmt: skip


def small(name: str, **changes: Any) -> Method:
    """A method with hyperparameters for a fit that takes only a moment."""
    return method_named(name, SMALL.get(name, {}) | changes)


@pytest.fixture
def model(family: str) -> Iterator[Bridge]:
    yield from micro.lent(family)


def raw(family: str) -> Any:
    return micro.raw(family).requires_grad_(False)


def logits_under(condition: Condition, model: Bridge, text: str) -> Tensor:
    """Logits `[vocab]` after the last token of a whole prompt, by the bridge's own forward pass."""
    with torch.no_grad(), condition.applied(model):
        return model.forward(torch.tensor([oracle.encode(text)]))[0, -1]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, share: float = CLOSE) -> None:
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= share


# -- every method on every family --


QUICK = ("GPT2", "GPTNeoX", "Llama", "Gemma3Text")
SHAPES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in micro.MORE_FAMILIES]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_method_fits_answers_generates_and_comes_back_from_disk(name: str, shape: str, tmp_path: Path) -> None:
    model = micro.bridge(shape)
    before = fingerprint(model)
    condition = small(name).fit(TASK, model)
    assert small(name).n_trained(condition) >= 0
    again = Condition.load(condition.save(tmp_path / "condition.safetensors"))
    assert type(again) is type(condition) and again.scope == condition.scope
    both = {"now": condition, "again": again}
    scores = sl.evaluate(TASK, both, model, n_items=5, metrics=("first_token", "exact_match"), max_new_tokens=3)
    frames = [scores[scores["condition"] == name].drop(columns="condition").reset_index(drop=True) for name in both]
    assert frames[0].equals(frames[1])
    assert fingerprint(model) == before and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_condition(name: str, llama: Bridge) -> None:
    first, second = (small(name).fit(TASK, llama).state() for _ in range(2))
    assert first[1] == second[1]
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


@pytest.mark.parametrize("name", [name for name in SMALL if name != "many-shot"])
def test_test_items_are_not_looked_at(name: str, llama: Bridge) -> None:
    other = replace(TASK, test=(Example("aa", "ab"),))
    first, second = (small(name).fit(task, llama).state()[0] for task in (TASK, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_method_sees_more_than_two_hundred_training_items() -> None:
    many = Task("many", "own", tuple(Example(f"a{i}", f"b{i}") for i in range(500)), TASK.valid, TASK.test)
    seen = cap_training_items(many)
    assert len(seen.train) == 200 and len(set(seen.train)) == 200
    assert seen == cap_training_items(many) and cap_training_items(TASK) == TASK
    with pytest.raises(SitelensError, match="no valid items"):
        cap_training_items(replace(TASK, valid=()))


@pytest.mark.slow
def test_a_saved_method_is_known_where_no_method_was_imported(tmp_path: Path) -> None:
    path = AddToStream(torch.ones(1, 32), (0,)).save(tmp_path / "one.safetensors")
    code = f"import sitelens as sl; print(type(sl.Condition.load({str(path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "AddToStream\n"


def test_site_patches_as_it_was_trained(llama: Bridge) -> None:
    for changes, mixing in (({"mixing": "additive"}, "additive"), ({}, "convex")):
        condition = small("SITE", **changes).fit(TASK, llama)
        assert isinstance(condition, PatchHeads) and condition.mixing == mixing


# -- conditions against raw models --


@pytest.mark.parametrize("family", micro.FAMILIES)
@pytest.mark.parametrize("scope", ["prompt", "generation"])
def test_a_vector_in_the_stream_acts_as_a_raw_hook_and_in_every_step_if_asked(family: str, scope: Any) -> None:
    model, network, vector = micro.bridge(family), raw(family), normal(32, scale=8)
    condition = AddToStream(vector[None], (0,), fingerprint(model), scope)
    for text in TEXTS:
        ids = oracle.encode(text)
        with oracle.added_to_stream(network, vector, slice(-1, None)):
            expected = oracle.logits(network, ids)
        assert_close(logits_under(condition, model, text), expected)
    found = sl.generate(TEXTS, condition, model, max_new_tokens=4)
    reach = [
        slice(len(oracle.encode(text)) - 1, None if scope == "generation" else len(oracle.encode(text)))
        for text in TEXTS
    ]
    expected_texts = []
    for text, where in zip(TEXTS, reach, strict=True):
        with oracle.added_to_stream(network, vector, where):
            expected_texts.append(oracle.text_of(oracle.greedy(network, oracle.encode(text), 4)))
    assert found == expected_texts


@contextmanager
def replaced(network: Any, layer: int, vector: Tensor) -> Iterator[None]:
    """A context manager that replaces a layer's output at the last position, by a hook on the raw model."""
    ends = (f".h.{layer}", f".layers.{layer}")

    def act(module: Any, args: Any, output: Any) -> Any:
        resid = (output if isinstance(output, Tensor) else output[0]).clone()
        resid[:, -1] = vector
        return resid if isinstance(output, Tensor) else (resid, *output[1:])

    handle = next(m for name, m in network.named_modules() if name.endswith(ends)).register_forward_hook(act)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_task_vector_replaces_the_state_as_a_raw_hook_does(family: str, model: Bridge, layer: int) -> None:
    network, vector = raw(family), normal(32, seed=layer)
    condition = ReplaceStream(vector[None], (layer,), fingerprint(model))
    for text in TEXTS:
        with replaced(network, layer, vector):
            expected = oracle.logits(network, oracle.encode(text))
        assert_close(logits_under(condition, model, text), expected)


def test_last_token_conditions_over_a_prefix_score_as_whole_prompts(model: Bridge) -> None:
    """Evaluation with shared prefixes compared with a condition that claims to edit all positions."""

    class Anywhere(AddToStream):
        positions = "all"

    vector, made_for = normal(1, 32, scale=3), fingerprint(model)
    both = {"prefix": AddToStream(vector, (0,), made_for), "whole": Anywhere(vector, (0,), made_for)}
    scores = sl.evaluate(TASK, both, model, metrics=("first_token", "exact_match"), n_items=6, max_new_tokens=3)
    one, other = (scores[scores["condition"] == name].reset_index(drop=True) for name in both)
    assert one["predicted"].tolist() == other["predicted"].tolist()
    torch.testing.assert_close(torch.tensor(one["logprob"]), torch.tensor(other["logprob"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["I2CL", "LoFiT", "ICV", "LoRA", "FV"])
def test_what_changes_nothing_leaves_the_model_as_it_is(name: str, family: str, model: Bridge) -> None:
    layers, heads, d_head = Model.of(model).shape
    shape = (layers, 2)
    nothing: dict[str, Callable[[], Condition]] = {
        "I2CL": lambda: LinearCombination(normal(*shape, 32), torch.zeros(shape), torch.ones(shape)),
        "LoFiT": lambda: HeadOffsets(torch.zeros(layers, heads, d_head)),
        "ICV": lambda: InContextVector(normal(layers, 32), 0.0),
        "LoRA": lambda: untrained(model),
        "FV": lambda: AddToStream(torch.zeros(1, 32), (1,)),
    }
    for text in TEXTS:
        assert_close(logits_under(nothing[name](), model, text), oracle.logits(raw(family), oracle.encode(text)))


def untrained(model: Bridge) -> LowRank:
    weights = {name: torch.stack(layers) for name, layers in Adapters(Model.of(model), 2, 2).weights.items()}
    return LowRank({name: w if name.endswith("B") else normal(*w.shape).to(w) for name, w in weights.items()}, 2)


def test_in_context_vectors_turn_and_keep_the_length() -> None:
    x, v = normal(2, 3, 16, seed=1), torch.nn.functional.normalize(normal(1, 16, seed=2), dim=-1)
    condition = InContextVector(v, 0.4)
    turned = condition._turn(x, direction=v[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    for row, before in zip(turned.reshape(-1, 16), x.reshape(-1, 16), strict=True):
        unit = before / before.norm()
        u = unit + 0.4 * (1 + max(0.0, float(-(unit @ v[0])))) * v[0]
        torch.testing.assert_close(row, before.norm() * u / u.norm())
        assert torch.cosine_similarity(row, v[0], dim=0) > torch.cosine_similarity(before, v[0], dim=0)


def test_the_direction_is_mean_plus_first_component_by_hand() -> None:
    axis = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # all directions in which the differences vary
    mean = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    differences = torch.stack([mean + t * axis for t in (-1.0, 0.0, 1.0)])
    expected = torch.tensor([[3.0, 5.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(icv.direction(differences), expected / expected.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(icv.direction(differences[:1]), torch.nn.functional.normalize(differences[0], dim=-1))


def test_linear_combination_and_offsets_do_what_their_formulas_say(llama: Bridge) -> None:
    context, a, b = normal(2, 2, 32), normal(2, 2, seed=1), normal(2, 2, seed=2)
    seen: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.{part}.hook_out" for layer in range(2) for part in ("attn", "mlp")]
    ids = torch.tensor([oracle.encode(TEXTS[0])])
    with torch.no_grad():
        llama.run_with_hooks(ids, fwd_hooks=[(names[0], lambda x, hook: seen.update(before=x.clone()))])
        with LinearCombination(context, a, b).applied(llama):
            llama.run_with_hooks(ids, fwd_hooks=[(names[0], lambda x, hook: seen.update(after=x.clone()))])
    torch.testing.assert_close(seen["after"], b[0, 0] * seen["before"] + a[0, 0] * context[0, 0])
    offsets = normal(2, 4, 8)
    with torch.no_grad():
        llama.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: seen.update(before=z.clone()))])
        with HeadOffsets(offsets).applied(llama):
            llama.run_with_hooks(
                ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: seen.update(after=z.clone()))]
            )
    torch.testing.assert_close(seen["after"], seen["before"] + offsets[0])


def test_adapters_are_the_weights_that_peft_says_and_are_gone_afterwards(family: str) -> None:
    model = micro.bridge(family)
    weights = {
        name: normal(*w.shape, seed=i, scale=0.3) for i, (name, w) in enumerate(untrained(model).weights.items())
    }
    condition = LowRank(weights, 4)
    before, modules = fingerprint(model), [id(m) for m in model.modules()]
    found = logits_under(condition, model, TEXTS[0])
    assert fingerprint(model) == before and [id(m) for m in model.modules()] == modules
    merged = micro.bridge(family)
    for layer in range(2):
        for name in ("q", "v"):
            block: Any = merged.blocks[layer]
            linear = getattr(block.attn, name).original_component
            delta = 4 / 2 * weights[f"{name}.B"][layer] @ weights[f"{name}.A"][layer]
            linear.weight += delta.T if linear.weight.shape != delta.shape else delta
    expected = merged.forward(torch.tensor([oracle.encode(TEXTS[0])]))[0, -1]
    assert not torch.allclose(found, logits_under(sl.ZeroShot(), model, TEXTS[0]), atol=1e-3)
    assert_close(found, expected)


def test_adapters_go_when_something_fails_in_between(llama: Bridge) -> None:
    before = [id(m) for m in llama.modules()]

    def failing() -> None:
        with untrained(llama).applied(llama):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert [id(m) for m in llama.modules()] == before
    with pytest.raises(SitelensError, match="changes weights"):
        untrained(llama).fwd_hooks(llama)


@pytest.mark.parametrize("scope", ["prompt", "generation"])
def test_a_full_mask_is_patching_with_alpha_one(llama: Bridge, scope: Any) -> None:
    embedding = sl.embed_task(TASK, llama, n_prompts=3, n_shots=2)
    full = PatchHeads(sl.HeadSelection(torch.ones(2, 4)), embedding, scope=scope)
    network = raw("Llama")
    for text in TEXTS:
        ids = oracle.encode(text)
        alpha = torch.ones(1, 2, 4)
        at_once = oracle.patched_logits(network, [ids], alpha, embedding.mean_z[None])[0]
        assert_close(logits_under(full, llama, text), at_once)
        said: list[int] = []
        for step in range(3):
            at = len(ids) - 1 if scope == "prompt" else None
            if at is None:  # earlier steps were patched as well
                with patched_everywhere(network, embedding.mean_z, len(ids) - 1):
                    said.append(int(oracle.logits(network, [*ids, *said]).argmax()))
            else:
                said = oracle.patched_greedy(network, ids, step + 1, alpha[0], embedding.mean_z)
        assert sl.generate([text], full, llama, max_new_tokens=3) == [oracle.text_of(said)]


@contextmanager
def patched_everywhere(network: Any, mean_z: Tensor, start: int) -> Iterator[None]:
    """A context manager that replaces z from position `start` on, by hooks on the raw output projections."""

    def hook(vector: Tensor) -> Callable[..., Any]:
        def act(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[:, start:] = vector.flatten()
            return (z, *args[1:])

        return act

    handles = [
        module.register_forward_pre_hook(hook(vector))
        for module, vector in zip(micro.output_projections(network), mean_z, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- what fits estimate --


def test_the_policy_gradient_is_that_of_the_expected_loss() -> None:
    """Compared with the exact expectation over all masks of three heads."""
    logits = torch.tensor([[-0.5, 0.3, 0.8]])
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))[:, None]
    losses = torch.tensor([2.0, 0.5, 1.0, 3.0, 0.2, 1.5, 0.7, 2.5])
    free = logits.clone().requires_grad_()
    p = torch.sigmoid(free)
    chances = (every * p + (1 - every) * (1 - p)).prod(-1)[:, 0]
    mean = (chances * losses).sum()
    (exact,) = torch.autograd.grad(mean, free, retain_graph=True)
    spread = (chances * (losses - mean) ** 2).sum().sqrt().detach()
    masks = mtv.draw(logits, 400_000, torch.Generator().manual_seed(0))
    codes = (masks[:, 0] @ torch.tensor([4.0, 2.0, 1.0])).long()
    torch.testing.assert_close(mtv.policy_gradient(logits, masks, losses[codes]), exact / spread, rtol=0, atol=4e-3)


def test_chances_are_clamped_and_equal_losses_weigh_nothing() -> None:
    logits = torch.tensor([[-12.0, 12.0, 0.3]])
    masks = mtv.draw(logits, 100_000, torch.Generator().manual_seed(0), mtv.FLOOR)
    assert masks[:, 0, 0].mean() == pytest.approx(0.001, abs=3e-4)
    assert masks[:, 0, 1].mean() == pytest.approx(0.999, abs=3e-4)
    assert mtv.draw(logits, 1000, torch.Generator().manual_seed(0))[:, 0, :2].std(0).eq(0).all()
    few = masks[:32]
    gradient = mtv.policy_gradient(logits, few, torch.linspace(0, 1, 32))
    assert gradient[0, :2].tolist() == [0, 0] and gradient[0, 2] != 0
    losses = torch.tensor([1.0, 1.0 + 1e-3]).repeat(16)  # as small as the floor: weight one half, not amplified
    weights = (losses - losses.mean()) / (losses.std() + 1e-3)
    expected = (weights * (few[:, 0, 2] - torch.sigmoid(logits[0, 2]))).mean()
    torch.testing.assert_close(mtv.policy_gradient(logits, few, losses)[0, 2], expected)


def test_the_policy_learns_which_head_matters() -> None:
    logits = torch.full((1, 4), -1.0)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        masks = mtv.draw(logits, 32, generator)
        logits.grad = mtv.policy_gradient(logits, masks, 1 - masks[:, 0, 2] + 0.3 * masks[:, 0, 0])
        optimizer.step()
    assert logits[0, 2] > 2 and logits[0, 0] < -2


def test_weighted_writes_add_up_to_what_the_heads_write(model: Bridge) -> None:
    """With weights 1 and a prompt's own z: the attention layer's output (after its norm, if any) minus its bias."""
    from sitelens.engine.capture import capture_z
    from sitelens.heads.attribution import head_outputs

    batch = zero_shot(TASK, TASK.train[:1], Model.of(model))
    seen: list[Tensor] = []
    point = "ln1_post" if "blocks.0.ln1_post.hook_out" in model.hook_dict else "attn"
    hooks: list[Any] = [
        (f"blocks.{layer}.{point}.hook_out", lambda x, hook: seen.append(x[0, -1])) for layer in range(2)
    ]
    with torch.no_grad():
        model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
    writes = head_outputs(capture_z(batch, Model.of(model))[0], Model.of(model), batch)
    found = ltv.summed(torch.ones(writes.shape[:2]), writes)
    bias = [getattr(block.attn, "b_O", None) for block in model.blocks]
    expected = torch.stack([x - (0 if b is None else b) for x, b in zip(seen, bias, strict=True)])
    assert_close(found, expected)


def test_answers_are_scored_as_whole_texts_by_the_raw_model(family: str, model: Bridge) -> None:
    rows = prompts_with_answers(TASK, TASK.train[:3], Model.of(model))
    found = answer_loss(rows, Model.of(model))
    losses = []
    for ids, n in rows:
        logits = raw(family)(torch.tensor([ids])).logits[0]
        losses += torch.nn.functional.cross_entropy(
            logits[-n - 1 : -1], torch.tensor(ids[-n:]), reduction="none"
        ).tolist()
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_of_rows_of_all_lengths_are_those_of_each_alone(family: str, dtype: torch.dtype) -> None:
    if family == "Mixtral":  # its experts do not support float64
        dtype = torch.float32 if dtype == torch.float64 else dtype
    model = micro.bridge(family, dtype)
    rows = [(oracle.encode(text), n) for text, n in zip(TEXTS, (1, 3, 2), strict=True)]
    assert len({len(ids) for ids, _ in rows}) == 3
    alone = [n * answer_loss([(ids, n)], Model.of(model)) for ids, n in rows]
    together = answer_loss(rows, Model.of(model))
    assert together.item() == pytest.approx(
        (torch.stack(alone).sum() / 6).item(), rel=0.02 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("name", ["I2CL", "LoFiT", "LoRA"])
def test_training_in_float64_gives_numbers(name: str) -> None:
    model = micro.bridge("Llama", torch.float64)
    items = tuple(Example(" ".join(micro.WORDS[: 2 + i % 4]), micro.WORDS[i]) for i in range(12))
    method = small(name, **({"batch_size": 4} if name == "LoRA" else {}))
    tensors, _ = method.fit(replace(TASK, train=items), model).state()
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_loss_that_is_no_number_ends_the_training(llama: Bridge) -> None:
    with pytest.raises(SitelensError, match="the loss is not finite"):
        sl.methods.LoRA(n_steps=20, learning_rates=(1e30,)).fit(TASK, llama)


def test_offsets_train_as_transformers_trainer_does() -> None:
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    assert defaults["max_grad_norm"] == MAX_GRAD_NORM and defaults["weight_decay"] == 0


def test_offsets_take_five_epochs_of_all_items_in_clipped_steps(llama: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TASK, train=TASK.train[:9])
    norms: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            (group,) = self.param_groups
            assert group["weight_decay"] == 0
            norms.append(group["params"][0].grad.norm().item())
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(lofit, "MAX_GRAD_NORM", 0.3)
    sl.methods.LoFiT(n_heads=1, batch_size=4).fit(task, llama)
    assert len(norms) == 2 * 5 * 3
    assert max(norms) == pytest.approx(0.3, rel=1e-3) and 0 < min(norms) < 0.29


def test_noise_has_no_gradient_of_its_own() -> None:
    a, b = (torch.full((1, 2), value, requires_grad=True) for value in (0.1, 1.0))
    context, out = normal(1, 2, 8, seed=1), normal(2, 3, 8, seed=2)
    ((_, hook), _) = i2cl.combining(context, a, b, noise=0.5, generator=torch.Generator().manual_seed(0))
    plain = out.sum().item(), 6 * context[0, 0].sum().item()
    of_b, of_a = (torch.autograd.grad(hook(out).sum(), side, retain_graph=True)[0][0, 0].item() for side in (b, a))
    assert (of_b, of_a) == pytest.approx(plain, rel=1e-4)


def test_learned_task_vectors_are_the_same_under_any_memory_budget(llama: Bridge) -> None:
    method = small("LTV", n_steps=9)
    sl.embed_task(TASK, llama, n_prompts=3, n_shots=2)  # cached for both
    with metered() as spent:
        whole: Any = method.fit(TASK, llama)
    with metered() as in_parts, settings.using(memory_budget=1):
        parts: Any = method.fit(TASK, llama)
    assert in_parts.forward > spent.forward and in_parts.backward == spent.backward
    assert_close(parts.vectors, whole.vectors)


def test_function_vectors_run_their_prompts_once(llama: Bridge) -> None:
    tokens = []
    for correct_only in (True, False):
        with settings.using(cache_dir=None), metered() as spent:
            small("FV", correct_only=correct_only).fit(TASK, llama)
        tokens.append(spent.forward)
    assert tokens[0] == tokens[1]


def test_a_task_vector_needs_items_enough(llama: Bridge) -> None:
    with pytest.raises(SitelensError, match="too few training items for 5 shots and a dummy query: 5 items"):
        sl.methods.TV().fit(replace(TASK, train=TASK.train[:5]), llama)


def test_items_come_again_only_when_all_have_come() -> None:
    batches = list(shuffled_batches("abcde", 4, 2, "x"))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:5]) == list(range(5)) and batches == list(shuffled_batches("abcde", 4, 2, "x"))


def test_demonstrations_are_five_of_each_label_or_ten_in_all() -> None:
    labelled = replace(TASK, train=tuple(Example(f"x{i}", "yes" if i % 3 else "no") for i in range(40)))
    chosen = [item.output for item in i2cl.demonstrations(labelled, None, 0)]
    assert sorted(chosen) == ["no"] * 5 + ["yes"] * 5
    assert len(set(i2cl.demonstrations(TASK, None, 0))) == 10
    assert i2cl.demonstrations(TASK, 3, 0) == i2cl.demonstrations(TASK, None, 0)[:3]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [cosine(step, 2, 12) for step in range(13)]
    assert rates[:3] == [0, 0.5, 1] and rates[6] == pytest.approx(0.5) and rates[12] == pytest.approx(0)
    assert rates[3] == pytest.approx((1 + math.cos(math.pi * 3 / 12)) / 2)  # of all steps, not of the remaining ones
    assert all(b < a for a, b in itertools.pairwise(rates[2:]))
    assert cosine(0, 0, 12) == 1


def test_many_shot_prompts_fit_the_context(llama: Bridge) -> None:
    condition = sl.methods.ManyShot().fit(TASK, llama)
    assert condition.n_shots > 10
    sl.evaluate(TASK, {"many-shot": condition}, llama)  # none is too long


def test_many_shot_prompts_fit_whichever_items_are_drawn(llama: Bridge) -> None:
    task = replace(TASK, train=tuple(Example(f"{a} {b}", a) for a in micro.WORDS[:16] for b in micro.WORDS[:16]))
    shown = set(cap_training_items(task).train)
    assert len(shown) == 200
    longer = [one if one in shown else replace(one, input=" ".join([one.input] * 6)) for one in task.train]
    task = replace(task, train=tuple(longer))
    assert set(cap_training_items(task).train) == shown  # none of the long ones
    sl.evaluate(task, {"many-shot": sl.methods.ManyShot().fit(task, llama)}, llama)


def test_many_shot_prompts_leave_out_what_equals_the_query(llama: Bridge) -> None:
    twins = replace(TASK, train=TASK.train[:8], test=(TASK.train[0],))
    twins = replace(twins, train=(*twins.train, twins.test[0], twins.test[0]))
    condition = sl.methods.ManyShot().fit(twins, llama)
    assert condition.n_shots == 7
    sl.evaluate(twins, {"many-shot": condition}, llama)
    assert sl.methods.ManyShot(limit=0).fit(twins, llama).n_shots == 0
    with pytest.raises(SitelensError, match="at least 0"):
        sl.methods.ManyShot(limit=-1)


def test_tokens_are_counted_forward_and_backward(llama: Bridge) -> None:
    rows = prompts_with_answers(TASK, TASK.train[:2], Model.of(llama))
    width = max(len(ids) for ids, _ in rows)
    offsets = torch.zeros(Model.of(llama).shape, requires_grad=True)
    from sitelens.conditions.heads import changing

    passes = Passes(Model.of(llama), changing(lambda z, layer: z + offsets[layer], 2))
    with metered() as spent:
        answer_loss(rows, passes).backward()
        with torch.no_grad():
            answer_loss(rows, passes)
    assert (spent.forward, spent.backward) == (2 * 2 * width, 2 * width)


@pytest.mark.parametrize(
    "condition",
    [AddToStream(torch.zeros(1, 5), (0,)), InContextVector(torch.zeros(2, 5), 0.1), HeadOffsets(torch.zeros(3, 4, 8)),
     AddToStream(torch.zeros(1, 32), (0,), "another"), HeadOffsets(torch.zeros(2, 4, 8), "another")],
)  # fmt: skip
def test_a_condition_for_another_model_is_refused(condition: Condition, llama: Bridge) -> None:
    where: AbstractContextManager[Any] = nullcontext()
    with where, pytest.raises(SitelensError, match=r"shape|entries|another model"):
        condition.fwd_hooks(llama)
