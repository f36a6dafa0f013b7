"""Forward passes compared with the oracle: every family, both paths, gradients, removal of hooks, shared prefixes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sitelens.conditions.embedding import TaskEmbedding, embed_task, embedding_prompts
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.capture import capture_z
from sitelens.engine.decoding import decode
from sitelens.engine.forward import HeadEdit, LastToken, full_logits
from sitelens.engine.memory import chunks, prefix_bytes
from sitelens.engine.network import Passes, all_positions, run_tokens
from sitelens.engine.prefix import PrefixCache, ReadOnly
from sitelens.engine.prompts import Prompt
from sitelens.errors import SitelensError
from sitelens.models.model import Bridge, Model, z_hook
from sitelens.settings import settings
from tests import micro, oracle

# Lengths of the prompts in a batch: longer than the sliding window, as long, shorter, and a single token.
LENGTHS = (15, 9, micro.WINDOW, 4, 1)
TEXTS = [" ".join(micro.WORDS[17 * i : 17 * i + length]) for i, length in enumerate(LENGTHS)]
AMPLE = 2**30  # bytes: everything fits into one chunk
EXACT = 5e-6  # relative to the scale of logits or gradients; float32 rounding alone gives up to 3.3e-6
MIXINGS = ("convex", "additive")


@functools.cache
def raw(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return micro.raw(family, dtype).requires_grad_(False)


@pytest.fixture
def family(wide_family: str) -> str:
    """All model families: the other tests rely on these."""
    return wide_family


@pytest.fixture
def model(family: str) -> Iterator[Bridge]:
    yield from micro.lent(family)


@pytest.fixture
def llama_bfloat16() -> Iterator[Bridge]:
    yield from micro.lent("Llama", torch.bfloat16)


@pytest.fixture
def gpt2_double() -> Iterator[Bridge]:
    """The only family that computes in float64 throughout."""
    yield from micro.lent("GPT2", torch.float64)


def batch_of(texts: Sequence[str]) -> PromptBatch:
    return tokenize([Prompt(text, ()) for text in texts], micro.tokenizer())


def ids_of(texts: Sequence[str]) -> list[list[int]]:
    return [oracle.encode(text) for text in texts]


def random_mix(model: Bridge, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A separate alpha `[row layer head]` and vectors of the scale of the micro models' z for each row."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, d_head = Model.of(model).shape
    alpha = torch.rand(rows, layers, heads, generator=generator, dtype=dtype)
    return alpha, 0.3 * torch.randn(rows, layers, heads, d_head, generator=generator, dtype=dtype)


def last_logits(model: Bridge, batch: PromptBatch, edit: HeadEdit | None, budget: int = AMPLE) -> Tensor:
    prefix = PrefixCache.of(batch, Model.of(model), budget)
    with torch.no_grad(), LastToken(Model.of(model)) as run:
        return run(prefix, edit)


def hooked_logits(model: Bridge, batch: PromptBatch, hooks: list[Any]) -> Tensor:
    """Logits `[row pos vocab]` of whole prompts by TransformerLens's run_with_hooks."""
    with torch.no_grad():
        return model.run_with_hooks(
            batch.tokens, fwd_hooks=hooks, attention_mask=batch.mask, position_ids=all_positions(batch.mask)
        )


def z_at_the_end(model: Bridge, batch: PromptBatch, hooks: Sequence[Any] = ()) -> Tensor:
    """z at the last token of left-padded prompts after `hooks` have run, `[row layer head d_head]`."""
    seen: list[Tensor] = []
    reading = [
        (z_hook(layer), lambda z, hook: seen.append(z[:, -1].clone())) for layer in range(Model.of(model).shape[0])
    ]
    hooked_logits(model, batch, [*hooks, *reading])
    return torch.stack(seen, dim=1)


def summed_loss(logits: Tensor) -> Tensor:
    answers = torch.arange(len(logits)) + 30
    return torch.nn.functional.cross_entropy(logits, answers, reduction="sum")


def assert_close(found: Tensor, expected: Tensor, share: float = EXACT) -> None:
    """Assert that the maximum deviation is at most a share of the largest expected value."""
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= share


# -- against the oracle --


def test_texts_have_the_lengths_they_are_named_for() -> None:
    assert batch_of(TEXTS).lengths == list(LENGTHS) == [len(ids) for ids in ids_of(TEXTS)]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_prefix_path_gives_the_oracles_logits_and_gradients(family: str, mixing: Any, watched: bool) -> None:
    """Both without the bridge, if the family allows it, and through the bridge, if there is a hook."""
    model = micro.bridge(family)
    start, vectors = random_mix(model, len(TEXTS))
    untouched = oracle.patched_logits(raw(family), ids_of(TEXTS), 0 * start, vectors)
    alpha, expected_alpha = (start.clone().requires_grad_() for _ in range(2))
    expected = oracle.patched_logits(raw(family), ids_of(TEXTS), expected_alpha, vectors, mixing)
    summed_loss(expected).backward()
    heard: list[Tensor] = []
    listening: list[Any] = [("blocks.1.mlp.hook_in", lambda x, hook: heard.append(x))] if watched else []
    with model.hooks(fwd_hooks=listening):
        assert Passes(Model.of(model)).can_bypass_bridge == (not watched and not family.startswith("GPT"))
        prefix = PrefixCache.of(batch_of(TEXTS), Model.of(model), AMPLE)
        with LastToken(Model.of(model)) as run:
            logits = run(prefix, HeadEdit.mix(alpha, vectors, mixing))
    assert bool(heard) == watched
    summed_loss(logits).backward()
    assert_close(logits.detach(), expected.detach())
    assert alpha.grad is not None and expected_alpha.grad is not None
    assert_close(alpha.grad, expected_alpha.grad)
    assert ((expected - untouched).abs().amax(-1) > 0.05 * expected.abs().max()).all()  # every row was patched


@pytest.mark.parametrize("mixing", MIXINGS)
def test_whole_prompts_under_hooks_give_the_oracles_logits(family: str, model: Bridge, mixing: Any) -> None:
    alpha, vectors = random_mix(model, len(TEXTS), seed=1)
    logits = hooked_logits(model, batch_of(TEXTS), HeadEdit.mix(alpha, vectors, mixing).hooks())[:, -1]
    assert_close(logits, oracle.patched_logits(raw(family), ids_of(TEXTS), alpha, vectors, mixing))


def test_both_paths_agree(model: Bridge) -> None:
    edit = HeadEdit.mix(*random_mix(model, len(TEXTS), seed=2))
    assert_close(last_logits(model, batch_of(TEXTS), edit), hooked_logits(model, batch_of(TEXTS), edit.hooks())[:, -1])


@pytest.mark.parametrize("mixing", MIXINGS)
def test_hooks_of_a_condition_give_the_oracles_logits(family: str, model: Bridge, mixing: Any) -> None:
    alpha, vectors = (tensor[0] for tensor in random_mix(model, 1, seed=3))
    condition = PatchHeads(HeadSelection(alpha), TaskEmbedding(vectors, "random", None, 1, 0, 0), mixing)
    logits = hooked_logits(model, batch_of(TEXTS), condition.fwd_hooks(model))[:, -1]
    rows = len(TEXTS)
    many = alpha.expand(rows, -1, -1), vectors.expand(rows, -1, -1, -1)
    assert_close(logits, oracle.patched_logits(raw(family), ids_of(TEXTS), *many, mixing))


@pytest.mark.parametrize("length", [1, 5])
def test_prompts_of_one_length_need_no_padding(family: str, model: Bridge, length: int) -> None:
    texts = [" ".join(micro.WORDS[i : i + length]) for i in (3, 30, 60)]
    alpha, vectors = random_mix(model, 3, seed=4)
    logits = last_logits(model, batch_of(texts), HeadEdit.mix(alpha, vectors))
    assert_close(logits, oracle.patched_logits(raw(family), ids_of(texts), alpha, vectors))


def test_captured_z_is_what_enters_the_output_projection(family: str, model: Bridge) -> None:
    captured = capture_z(batch_of(TEXTS), Model.of(model))
    assert_close(captured, oracle.head_outputs(raw(family), ids_of(TEXTS), model.cfg.n_heads))


@pytest.mark.parametrize("budget", [1, AMPLE])
def test_embedding_is_the_mean_of_the_oracles_z(family: str, model: Bridge, budget: int) -> None:
    task = micro.task()
    with settings.using(memory_budget=budget):
        embedding = embed_task(task, model, n_prompts=5, n_shots=2)
    texts = [prompt.text for prompt in embedding_prompts(task, micro.tokenizer(), 5, 2, 0)]
    assert_close(embedding.mean_z, oracle.head_outputs(raw(family), ids_of(texts), model.cfg.n_heads).mean(0))


# -- alpha 0 and alpha 1 --


@pytest.mark.parametrize("mixing", MIXINGS)
def test_alpha_zero_is_the_untouched_model_to_the_bit(model: Bridge, mixing: Any) -> None:
    batch = batch_of(TEXTS)
    alpha, vectors = random_mix(model, len(TEXTS))
    edit = HeadEdit.mix(0 * alpha, vectors, mixing)
    prefix = PrefixCache.of(batch, Model.of(model), AMPLE)
    last, cache = prefix.last[:, None], prefix.cache(ReadOnly)
    untouched = run_tokens(Model.of(model), last, prefix.mask, prefix.positions()[:, None], cache)[:, -1]
    assert torch.equal(last_logits(model, batch, edit), last_logits(model, batch, None))
    assert_close(last_logits(model, batch, None), untouched)
    assert torch.equal(hooked_logits(model, batch, edit.hooks()), hooked_logits(model, batch, []))


def test_alpha_one_with_a_prompts_own_z_gives_its_own_head_outputs(family: str, model: Bridge) -> None:
    batch = batch_of(TEXTS)
    own = capture_z(batch, Model.of(model))
    edit = HeadEdit.mix(torch.ones(own.shape[:3]), own)
    assert torch.equal(z_at_the_end(model, batch, edit.hooks()), own)
    assert_close(z_at_the_end(model, batch), own)
    untouched = torch.stack([oracle.logits(raw(family), ids) for ids in ids_of(TEXTS)])
    assert_close(last_logits(model, batch, edit), untouched)


def test_alpha_one_with_another_prompts_z_gives_the_oracles_logits(family: str, model: Bridge) -> None:
    batch = batch_of(TEXTS)
    others = capture_z(batch, Model.of(model)).roll(1, 0)
    ones = torch.ones(others.shape[:3])
    assert torch.equal(z_at_the_end(model, batch, HeadEdit.mix(ones, others).hooks()), others)
    logits = last_logits(model, batch, HeadEdit.mix(ones, others))
    assert_close(logits, oracle.patched_logits(raw(family), ids_of(TEXTS), ones, others))


# -- what an edit does not change --


def test_earlier_positions_and_earlier_layers_stay_the_same_to_the_bit(model: Bridge) -> None:
    alpha, vectors = random_mix(model, len(TEXTS))
    alpha[:, 0] = 0
    seen: dict[str, list[Tensor]] = {}

    def keep(resid: Tensor, hook: Any) -> None:
        seen.setdefault(hook.name, []).append(resid.clone())

    reading = [(f"blocks.{layer}.hook_resid_post", keep) for layer in range(2)]
    hooked_logits(model, batch_of(TEXTS), reading)
    hooked_logits(model, batch_of(TEXTS), [*HeadEdit.mix(alpha, vectors).hooks(), *reading])
    (first, first_edited), (second, second_edited) = seen.values()
    assert torch.equal(first, first_edited)
    assert torch.equal(second[:, :-1], second_edited[:, :-1])
    assert ((second - second_edited)[:, -1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("watched", [False, True])
def test_rows_that_share_a_prompt_give_what_each_gives_alone(model: Bridge, watched: bool) -> None:
    alpha, vectors = random_mix(model, 6)
    alpha.requires_grad_()
    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(model), AMPLE)
    which = torch.tensor([3, 3, 0, 0, 4, 4])
    listening: list[Any] = [("blocks.0.mlp.hook_in", lambda x, hook: x)] if watched else []
    with model.hooks(fwd_hooks=listening), LastToken(Model.of(model)) as run:
        shared = run(prefix.grouped_by_prompt(which), HeadEdit.mix(alpha, vectors))
        edits = [HeadEdit.mix(alpha[i : i + 1], vectors[i : i + 1]) for i in range(6)]
        alone = torch.cat([run(prefix.rows(which[i : i + 1]), edits[i]) for i in range(6)])
    assert prefix.grouped_by_prompt(which).repeats == 2
    assert_close(shared.detach(), alone.detach())
    (one,), (other,) = (torch.autograd.grad(summed_loss(logits), alpha) for logits in (shared, alone))
    assert_close(one, other)


@pytest.mark.parametrize("which", [[0, 1, 1], [1, 0, 1, 0], [2], [0, 1, 2, 3, 4]])
def test_rows_share_only_where_every_prompt_has_as_many(llama: Bridge, which: list[int]) -> None:
    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(llama), AMPLE)
    found, expected = prefix.grouped_by_prompt(torch.tensor(which)), prefix.rows(torch.tensor(which))
    assert found.repeats == 1 and torch.equal(found.last, expected.last)
    assert all(torch.equal(a, b) for a, b in zip(found.layer(0), expected.layer(0), strict=True))


def test_apply_does_not_write_to_its_input(llama: Bridge) -> None:
    alpha, vectors = random_mix(llama, 2)
    for positions in (1, 3):
        z = torch.randn(2, positions, *vectors.shape[2:])
        before = z.clone()
        edited = HeadEdit.mix(alpha, vectors).apply(z, 1)
        assert torch.equal(z, before)
        assert torch.equal(edited[:, :-1], before[:, :-1])
        torch.testing.assert_close(edited[:, -1], oracle.mixed(before[:, -1], alpha[:, 1], vectors[:, 1]))


def test_prefix_is_never_written_to(model: Bridge) -> None:
    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(model), AMPLE)
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values, prefix.mask, prefix.last)]
    alpha, vectors = random_mix(model, len(TEXTS))
    with LastToken(Model.of(model)) as run:
        first = run(prefix, HeadEdit.mix(alpha.requires_grad_(), vectors))
        first.sum().backward()
        logits, cache = run.step(prefix, HeadEdit.mix(alpha.detach(), vectors))
        decode(Model.of(model), logits, cache, prefix.mask, micro.tokenizer(), 5, {2})
        again = run(prefix, HeadEdit.mix(alpha.detach(), vectors))
    assert cache.get_seq_length() > prefix.keys[0].shape[2]
    after = (*prefix.keys, *prefix.values, prefix.mask, prefix.last)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert torch.equal(first, again)


def test_decoding_goes_on_until_a_row_is_complete(llama: Bridge) -> None:
    class Fused:
        """A tokenizer in which every token is a text that contains a newline."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return "no\nyes" * len(ids)

    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(llama), AMPLE)
    with LastToken(Model.of(llama)) as run, torch.no_grad():
        for enough in (1, 2, 9):
            logits, cache = run.step(prefix, None)
            given = Model.of(llama), logits, cache, prefix.mask, Fused(), 3, ()
            texts = decode(*given, lambda _, s: s.count("\n") >= enough)  # noqa: B023
            assert texts == ["no\nyes" * min(enough, 3)] * len(TEXTS)


# -- hooks are removed --


def test_hooks_are_gone_afterwards(model: Bridge) -> None:
    batch = batch_of(TEXTS)
    before = full_logits(batch, Model.of(model))
    edit = HeadEdit.mix(*random_mix(model, len(TEXTS)))
    patched = last_logits(model, batch, edit)
    hooked_logits(model, batch, edit.hooks())
    capture_z(batch, Model.of(model))
    assert not torch.equal(before, patched)
    assert not micro.hooks_left(model)
    assert torch.equal(full_logits(batch, Model.of(model)), before)


def fail_in_the_body(model: Bridge, batch: PromptBatch) -> None:
    prefix = PrefixCache.of(batch, Model.of(model), AMPLE)
    with LastToken(Model.of(model)) as run:
        run(prefix, HeadEdit.mix(*random_mix(model, len(batch))))
        raise RuntimeError("of our own")


def fail_in_a_step(model: Bridge, batch: PromptBatch) -> None:
    last_logits(model, batch, HeadEdit.mix(*random_mix(model, len(batch) - 1)))


def fail_in_a_whole_prompt(model: Bridge, batch: PromptBatch) -> None:
    hooked_logits(model, batch, HeadEdit.mix(*random_mix(model, len(batch) - 1)).hooks())


def fail_while_applied(model: Bridge, batch: PromptBatch) -> None:
    alpha, vectors = (tensor[0] for tensor in random_mix(model, 1))
    with PatchHeads(HeadSelection(alpha), TaskEmbedding(vectors, "random", None, 1, 0, 0)).applied(model):
        full_logits(batch, Model.of(model))
        raise RuntimeError("of our own")


@pytest.mark.parametrize("fail", [fail_in_the_body, fail_in_a_step, fail_in_a_whole_prompt, fail_while_applied])
def test_hooks_are_gone_after_an_error(llama: Bridge, fail: Callable[[Bridge, PromptBatch], None]) -> None:
    batch = batch_of(TEXTS)
    before = full_logits(batch, Model.of(llama))
    with pytest.raises(RuntimeError):
        fail(llama, batch)
    assert not micro.hooks_left(llama)
    assert torch.equal(full_logits(batch, Model.of(llama)), before)


def test_an_edit_does_not_outlive_the_step_that_failed(llama: Bridge) -> None:
    batch = batch_of(TEXTS)
    untouched = last_logits(llama, batch, None)
    prefix = PrefixCache.of(batch, Model.of(llama), AMPLE)
    with torch.no_grad(), LastToken(Model.of(llama)) as run:
        with pytest.raises(RuntimeError):
            run(prefix, HeadEdit.mix(*random_mix(llama, len(batch) - 1)))
        assert torch.equal(run(prefix), untouched)
        run(prefix, HeadEdit.mix(*random_mix(llama, len(batch))))
        assert torch.equal(run(prefix), untouched)


def test_runs_nest_without_touching_each_other(llama: Bridge) -> None:
    batch = batch_of(TEXTS)
    outer_edit, inner_edit = (HeadEdit.mix(*random_mix(llama, len(batch), seed)) for seed in (0, 1))
    expected = [last_logits(llama, batch, edit) for edit in (outer_edit, inner_edit)]
    prefix = PrefixCache.of(batch, Model.of(llama), AMPLE)
    with torch.no_grad(), LastToken(Model.of(llama)) as outer:
        with LastToken(Model.of(llama)) as inner:
            found = [outer(prefix, outer_edit), inner(prefix, inner_edit)]
        found_after = outer(prefix, outer_edit)
    assert not torch.equal(*expected)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found_after, expected[0])


def test_running_out_of_memory_names_the_budget_and_leaves_no_hook(llama: Bridge) -> None:
    def exhaust(z: Tensor, hook: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with (
        llama.hooks(fwd_hooks=[(z_hook(1), exhaust)]),
        pytest.raises(SitelensError, match=r"out of memory.*memory_budget"),
    ):
        last_logits(llama, batch_of(TEXTS), None)
    assert not micro.hooks_left(llama)


# -- rows, order, chunks --


@pytest.mark.parametrize("index", [[4, 0, 2, 1, 3], [1, 1, 3, 1], [3], [4, 4]], ids=str)
def test_chosen_rows_give_their_own_logits(model: Bridge, index: list[int]) -> None:
    batch = batch_of(TEXTS)
    edit = HeadEdit.mix(*random_mix(model, len(batch)))
    whole = last_logits(model, batch, edit)
    chosen = torch.tensor(index)
    prefix = PrefixCache.of(batch, Model.of(model), AMPLE).rows(chosen)
    with torch.no_grad(), LastToken(Model.of(model)) as run:
        assert_close(run(prefix, edit.rows(chosen)), whole[chosen])
    assert prefix.mask.shape[1] == max(LENGTHS[i] for i in index)
    assert prefix.positions().tolist() == [LENGTHS[i] - 1 for i in index]


def test_stacked_edits_act_row_by_row(llama: Bridge) -> None:
    edits = [HeadEdit.mix(*random_mix(llama, rows, seed)) for seed, rows in enumerate((2, 3))]
    stacked = last_logits(llama, batch_of(TEXTS), HeadEdit.stack(edits))
    apart = [last_logits(llama, batch_of(part), edit) for part, edit in zip((TEXTS[:2], TEXTS[2:]), edits, strict=True)]
    assert_close(stacked, torch.cat(apart))


@pytest.mark.parametrize("budget", [1, 30_000, AMPLE])
def test_prefix_does_not_depend_on_the_chunks(model: Bridge, budget: int) -> None:
    batch = batch_of(TEXTS)
    alone = [PrefixCache.of(batch.rows([i]), Model.of(model), AMPLE) for i in range(len(batch))]
    whole = PrefixCache.of(batch, Model.of(model), budget)
    for row, length in enumerate(LENGTHS):
        for layer in range(len(alone[row].keys)):
            for found, single in ((whole.keys, alone[row].keys), (whole.values, alone[row].values)):
                real = found[layer][row, :, found[layer].shape[2] - (length - 1) :]
                assert_close(real, single[layer][0])


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]], ids=str)
@pytest.mark.parametrize("budget", [1, 30_000, AMPLE])
def test_order_and_chunks_do_not_matter_in_float64(gpt2_double: Bridge, order: list[int], budget: int) -> None:
    edit = HeadEdit.mix(*random_mix(gpt2_double, len(TEXTS), dtype=torch.float64))
    expected = last_logits(gpt2_double, batch_of(TEXTS), edit)
    shuffled = batch_of([TEXTS[i] for i in order])
    assert_close(last_logits(gpt2_double, shuffled, edit.rows(torch.tensor(order)), budget), expected[order], 1e-13)


def test_rows_alone_give_the_same_logits_and_gradients_in_float64(gpt2_double: Bridge) -> None:
    start, vectors = random_mix(gpt2_double, len(TEXTS), dtype=torch.float64)
    whole, alone = (start.clone().requires_grad_() for _ in range(2))
    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(gpt2_double), AMPLE)
    with LastToken(Model.of(gpt2_double)) as run:
        together = run(prefix, HeadEdit.mix(whole, vectors))
        apart = [
            run(prefix.rows(torch.tensor([i])), HeadEdit.mix(alone[i : i + 1], vectors[i : i + 1]))
            for i in range(len(TEXTS))
        ]
    summed_loss(together).backward()
    summed_loss(torch.cat(apart)).backward()
    assert_close(torch.cat(apart).detach(), together.detach(), 1e-13)
    assert alone.grad is not None and whole.grad is not None
    assert_close(alone.grad, whole.grad, 1e-13)


def test_padded_rows_are_the_oracles_in_float64(llama_double: Bridge) -> None:
    alpha, vectors = random_mix(llama_double, len(TEXTS), dtype=torch.float64)
    expected = oracle.patched_logits(raw("Llama", torch.float64), ids_of(TEXTS), alpha, vectors)
    assert_close(last_logits(llama_double, batch_of(TEXTS), HeadEdit.mix(alpha, vectors)), expected, 1e-6)


def test_embedding_does_not_depend_on_the_memory_budget(gpt2_double: Bridge, tmp_path: Any) -> None:
    found = []
    for budget in (1, 200_000, AMPLE):
        with settings.using(cache_dir=tmp_path / str(budget), memory_budget=budget):
            found.append(embed_task(micro.task(), gpt2_double, n_prompts=6, n_shots=3).mean_z)
    assert_close(found[0], found[2], 1e-7)  # stored as float32
    assert_close(found[1], found[2], 1e-7)


def test_prefix_bytes_are_what_a_prefix_takes(model: Bridge) -> None:
    prefix = PrefixCache.of(batch_of([TEXTS[0], TEXTS[0]]), Model.of(model), AMPLE)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*prefix.keys, *prefix.values))
    assert held == 2 * prefix_bytes(Model.of(model), LENGTHS[0])


# -- numbers --


@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradient_of_the_loss_passes_gradcheck(gpt2_double: Bridge, mixing: Any) -> None:
    alpha, vectors = random_mix(gpt2_double, 2, dtype=torch.float64)
    prefix = PrefixCache.of(batch_of([TEXTS[1], TEXTS[3]]), Model.of(gpt2_double), AMPLE)
    with LastToken(Model.of(gpt2_double)) as run:
        assert torch.autograd.gradcheck(
            lambda a: summed_loss(run(prefix, HeadEdit.mix(a, vectors, mixing))), alpha.requires_grad_()
        )


def test_bfloat16_paths_agree_within_its_own_noise_and_alpha_stays_float32(family: str) -> None:
    model = micro.bridge(family, torch.bfloat16)
    alpha, vectors = random_mix(model, len(TEXTS))
    edit = HeadEdit.mix(alpha.requires_grad_(), vectors)
    prefix = PrefixCache.of(batch_of(TEXTS), Model.of(model), AMPLE)
    with LastToken(Model.of(model)) as run:
        fast = run(prefix, edit)
    summed_loss(fast.float()).backward()
    full = torch.cat([hooked_logits(model, batch_of([text]), edit.rows(torch.tensor([row])).hooks())[:, -1]
                      for row, text in enumerate(TEXTS)])  # fmt: skip
    assert fast.dtype == full.dtype == torch.bfloat16
    assert alpha.grad is not None and edit.keep.dtype == alpha.grad.dtype == torch.float32
    exact = oracle.patched_logits(raw(family), ids_of(TEXTS), alpha.detach(), vectors)
    scale = exact.abs().max()
    noise = (full.float() - exact).abs().max() / scale
    assert noise < 2**-4
    assert (fast.detach().float() - full.float()).abs().max() / scale <= noise + 2**-8


def test_bfloat16_is_mixed_in_float32_and_rounded_once(llama_bfloat16: Bridge) -> None:
    alpha, vectors = random_mix(llama_bfloat16, 3)
    z = torch.randn(3, 1, *vectors.shape[2:]).bfloat16()
    expected = oracle.mixed(z[:, 0].float(), alpha[:, 0], vectors[:, 0]).bfloat16()
    in_bfloat16 = oracle.mixed(z[:, 0], alpha[:, 0].bfloat16(), vectors[:, 0].bfloat16())
    assert torch.equal(HeadEdit.mix(alpha, vectors).apply(z, 0)[:, 0], expected)
    assert not torch.equal(in_bfloat16, expected)


# -- chunks --

SIZES = st.lists(st.integers(1, 40), max_size=30)
LIMITS = {
    "budget": st.integers(1, 400),
    "max_rows": st.integers(1, 12),
    "max_tokens": st.integers(1, 120),
    "same_length": st.booleans(),
}


def cost(length: int) -> int:
    return 3 * length + 2


@given(lengths=SIZES, **LIMITS)
def test_chunks_hold_every_row_once_shortest_first(lengths: list[int], **limits: Any) -> None:
    parts = chunks(lengths, cost, **limits)
    assert [i for part in parts for i in part] == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    assert all(parts)


def fits(lengths: list[int], budget: int, max_rows: int, max_tokens: int, same_length: bool) -> bool:
    """Whether rows padded to the longest fit into one chunk."""
    rows, longest = len(lengths), max(lengths)
    if same_length and min(lengths) < longest:
        return False
    return rows * cost(longest) <= budget and rows <= max_rows and rows * longest <= max_tokens


@given(lengths=SIZES, **LIMITS)
def test_chunks_stay_within_their_limits_or_are_one_row(lengths: list[int], **limits: Any) -> None:
    for part in chunks(lengths, cost, **limits):
        assert len(part) == 1 or fits([lengths[i] for i in part], **limits)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"budget": 3 * cost(4)}, [3, 2]),
        ({"budget": 3 * cost(4) - 1}, [2, 2, 1]),
        ({"budget": AMPLE, "max_rows": 3}, [3, 2]),
        ({"budget": AMPLE, "max_tokens": 12}, [3, 2]),
        ({"budget": AMPLE, "max_tokens": 11}, [2, 2, 1]),
    ],
)
def test_chunks_reach_their_limits(limits: dict[str, Any], sizes: list[int]) -> None:
    assert [len(part) for part in chunks([4] * 5, cost, **limits)] == sizes


@given(lengths=SIZES, **LIMITS)
def test_chunks_are_not_split_without_need(lengths: list[int], **limits: Any) -> None:
    parts = chunks(lengths, cost, **limits)
    for part, following in itertools.pairwise(parts):
        assert not fits([lengths[i] for i in [*part, following[0]]], **limits)
