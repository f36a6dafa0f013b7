"""Memory: estimates per row are upper bounds of actual use, and no call exceeds its budget."""

from __future__ import annotations

import functools
import gc
import random
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.cache_utils import DynamicCache

import sitelens as sl
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import TaskEmbedding, embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.prompting import FewShot, ZeroShot
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.batches import PromptBatch, tokenize
from sitelens.engine.capture import capture_z
from sitelens.engine.forward import HeadEdit, LastToken, full_logits
from sitelens.engine.memory import forward_bytes, prefix_bytes, step_cost
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import Prompt
from sitelens.errors import SitelensWarning
from sitelens.evaluation.evaluate import evaluate
from sitelens.methods.site.config import TrainConfig
from sitelens.methods.site.train import train_selections
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from sitelens.tasks import Example, Task
from tests import micro

MIB = 2**20
LONG, MEDIUM, SHORT = 205, 100, 12  # tokens of a prompt
_COMMON: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 128, "n_head": 8},
    "GPTNeoX": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8},
    "Llama": _COMMON,
    "Mistral": _COMMON | {"sliding_window": micro.WINDOW},
    "Mixtral": _COMMON | {"num_local_experts": 4, "sliding_window": micro.WINDOW},
    "Qwen3": _COMMON | {"head_dim": 32},
    "Gemma3Text": _COMMON | {"head_dim": 32, "sliding_window": micro.WINDOW},
}


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float32, vocabulary: int | None = None, layers: int = 2) -> Bridge:
    """A model whose activations need more memory than anything else; always the same random weights."""
    options = OPTIONS[family] | {"n_layer" if family == "GPT2" else "num_hidden_layers": layers}
    size = vocabulary or len(micro.tokenizer())
    config = getattr(transformers, f"{family}Config")(vocab_size=size, pad_token_id=0, **options)
    name = type(micro.raw(family)).__name__
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # what it generates, and thus the memory it needs, depends on the weights
        network = getattr(transformers, name)(config).to(dtype).eval()
    network.set_attn_implementation("eager")
    model = build_bridge_from_module(network, name, hf_config=config, model_name=family)
    model.requires_grad_(False)
    Model.of(model).use_tokenizer(micro.tokenizer())
    return model


class Allocations(TorchDispatchMode):
    """Bytes of live tensors that were created inside the block: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := self._key(leaf)) not in self._live and key not in given:
                storage = leaf.untyped_storage()
                self._live[key] = weakref.ref(storage, functools.partial(self._freed, key, storage.nbytes()))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _freed(self, key: int, size: int, reference: Any) -> None:
        del self._live[key]
        self.now -= size


def peak(action: Callable[[], object]) -> int:
    """Peak bytes of the tensors created by `action`."""
    with warnings.catch_warnings(), Allocations() as allocations:
        warnings.filterwarnings("ignore", "the mode Allocations", SitelensWarning)  # it causes a warning, like any mode
        action()
    return allocations.peak


def test_live_bytes_are_counted_as_worked_out_by_hand() -> None:
    start, size = torch.randn(100, 100, requires_grad=True), 4 * 100 * 100

    def chain() -> Tensor:
        hidden = start.tanh().tanh()  # both are kept for the backward pass
        return torch.autograd.grad(hidden.sum(), start)[0]

    assert peak(lambda: start.detach().t()) == 0  # a view
    assert peak(lambda: start.detach().clone().clone().clone()) == 2 * size  # each lives until the next one exists
    assert 4 * size <= peak(chain) <= 4 * size + 8  # two kept tensors, an incoming and an outgoing gradient


def prompts(rows: int, length: int, model: Bridge) -> PromptBatch:
    rng = random.Random(length)
    texts = ["Q: " + " ".join(rng.choices(micro.WORDS, k=length - 5)) + "\nA:" for _ in range(rows)]
    batch = tokenize([Prompt(text, (f" {micro.WORDS[0]}",)) for text in texts], model.tokenizer)
    assert set(batch.lengths) == {length}
    return batch


class TestEstimates:
    """Each estimate, multiplied by the rows of a batch, is an upper bound of the memory that running it needs."""

    rows = 4

    @pytest.fixture(params=[SHORT, LONG])
    def length(self, request: pytest.FixtureRequest) -> int:
        return request.param

    def test_a_prefix_takes_exactly_what_is_said(self, family: str, length: int) -> None:
        model = model_of(family)
        prefix = PrefixCache.of(prompts(self.rows, length, model), Model.of(model), 10**9)
        taken = sum(tensor.nbytes for tensor in (*prefix.keys, *prefix.values))
        assert taken == self.rows * prefix_bytes(Model.of(model), length)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_full_forward(self, family: str, length: int, dtype: torch.dtype) -> None:
        model = model_of(family, dtype)
        batch = prompts(self.rows, length, model)
        bound = self.rows * forward_bytes(Model.of(model), length)
        assert peak(lambda: capture_z(batch, Model.of(model))) <= bound
        assert peak(lambda: full_logits(batch, Model.of(model), DynamicCache())) <= bound

    def test_the_attention_of_a_deep_model(self, family: str) -> None:
        model = model_of(family, layers=8)
        batch = prompts(2, 400, model)
        assert peak(lambda: capture_z(batch, Model.of(model))) <= 2 * forward_bytes(Model.of(model), 400)

    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_prefixes_of_a_deep_model_take_their_budget_beside_themselves(self, family: str) -> None:
        model = model_of(family, layers=24)
        batch = prompts(self.rows, SHORT, model)
        budget = self.rows // 2 * forward_bytes(Model.of(model), SHORT)
        prefixes = self.rows * prefix_bytes(Model.of(model), SHORT)
        assert peak(lambda: PrefixCache.of(batch, Model.of(model), budget)) <= budget + prefixes

    def test_a_forward_leaves_nothing_behind(self, family: str) -> None:
        model = model_of(family)
        batch = prompts(1, LONG, model)
        with Allocations() as allocations:
            full_logits(batch, Model.of(model))
            gc.collect()
            # For models with fused projections the bridge keeps the attention weights of one layer.
            fused = family in ("GPT2", "GPTNeoX")
            assert allocations.now <= fused * 4 * model.cfg.n_heads * LONG**2 * model.cfg.n_layers

    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_step(self, family: str, gradient: bool, dtype: torch.dtype) -> None:
        self.check_step(model_of(family, dtype), LONG, gradient)

    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_step_into_a_large_vocabulary(self, gradient: bool, dtype: torch.dtype) -> None:
        self.check_step(model_of("Llama", dtype, vocabulary=100_000), SHORT, gradient)

    def check_step(self, model: Bridge, length: int, gradient: bool) -> None:
        batch = prompts(self.rows, length, model)
        prefix = PrefixCache.of(batch, Model.of(model), 10**9)
        shape = self.rows, model.cfg.n_layers, model.cfg.n_heads
        vectors = torch.randn(*shape, model.cfg.d_head)

        def step() -> None:
            alpha = torch.full(shape, 0.5, requires_grad=gradient)
            with torch.set_grad_enabled(gradient):
                logits = last_token(prefix.rows(torch.arange(self.rows)), HeadEdit.mix(alpha, vectors))
                loss = torch.nn.functional.cross_entropy(logits.float(), batch.answer, reduction="sum")
            if gradient:
                torch.autograd.grad(loss, alpha)

        with LastToken(Model.of(model)) as last_token:
            assert peak(step) <= self.rows * step_cost(Model.of(model), gradient)(length)


def task_of(name: str, length: int, n: int = 24) -> Task:
    """A task whose zero-shot prompts have `length` tokens."""
    rng = random.Random(name)
    items = [Example(" ".join(rng.choices(micro.WORDS, k=length - 5)), micro.WORDS[i]) for i in range(n)]
    return Task(name, "own", tuple(items), tuple(items[:8]), tuple(items))


def vectors_of(model: Bridge, name: str) -> TaskEmbedding:
    shape = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    return TaskEmbedding(torch.randn(shape), name, None, 1, 0, 0)


def conditions_of(model: Bridge, n: int) -> Mapping[str, Condition]:
    """`n` conditions with patched heads, and zero-shot."""
    embedding, shape = vectors_of(model, "any"), (model.cfg.n_layers, model.cfg.n_heads)
    patched = {f"patched {i}": PatchHeads(HeadSelection(torch.rand(shape)), embedding) for i in range(n)}
    return {"zero-shot": ZeroShot(), **patched}


class TestBudget:
    """Without a limit a call needs more than the budget; with the budget it does not."""

    def check(self, call: Callable[[], object], budget: int) -> None:
        with settings.using(memory_budget=2**40):
            assert peak(call) > budget
        with settings.using(memory_budget=budget):
            assert peak(call) <= budget

    @pytest.mark.parametrize(
        ("family", "n_tasks", "length", "batch_size", "budget"),
        [("Llama", 2, MEDIUM, 4, 9 * MIB), ("Llama", 11, MEDIUM, 2, 10 * MIB), ("Llama", 2, MEDIUM, 50, 7 * MIB),
         ("GPT2", 3, LONG, 4, 32 * MIB), ("Gemma3Text", 3, LONG, 4, 21 * MIB)],
    )  # fmt: skip
    def test_training(self, family: str, n_tasks: int, length: int, batch_size: int, budget: int) -> None:
        model = model_of(family)
        tasks = [task_of(f"task {i}", length, n=80) for i in range(n_tasks)]
        embeddings = {task.name: vectors_of(model, task.name) for task in tasks}
        seeds = iter(range(100))

        def train() -> None:
            config = TrainConfig(n_steps=2, eval_every=1, batch_size=batch_size, n_valid=4)
            options = {"seeds": (next(seeds),), "config": config}
            train_selections(tasks, model, embeddings=embeddings, **options)

        self.check(train, budget)

    def test_training_of_a_shared_alpha(self) -> None:
        model, tasks = model_of("Llama"), [task_of(f"task {i}", MEDIUM) for i in range(11)]
        embeddings = {task.name: vectors_of(model, task.name) for task in tasks}
        seeds = iter(range(100))

        def train() -> None:  # all validation prefixes together need more than half of it
            options = {"seeds": (next(seeds),), "config": TrainConfig(n_steps=1, n_valid=8)}
            train_selections(tasks, model, embeddings=embeddings, shared=True, **options)

        self.check(train, 9 * MIB)

    @pytest.mark.parametrize(("n_conditions", "length"), [(1, LONG), (12, LONG)])
    def test_evaluation_of_patched_heads(self, n_conditions: int, length: int) -> None:
        model, task = model_of("Llama"), task_of("any", length, n=40)
        conditions = conditions_of(model, n_conditions)
        self.check(lambda: evaluate(task, conditions, model), 21 * MIB)

    @pytest.mark.parametrize(("length", "budget"), [(LONG, 16 * MIB), (SHORT, MIB // 2)])
    def test_evaluation_with_generation(self, length: int, budget: int) -> None:
        model, task = model_of("Llama"), task_of("any", length, n=16)
        options: dict[str, Any] = {"metrics": ("first_token", "exact_match"), "max_new_tokens": 4}
        conditions = conditions_of(model, 2)
        self.check(lambda: evaluate(task, conditions, model, **options), budget)

    @pytest.mark.parametrize("metric", ["first_token", "exact_match"])
    def test_evaluation_of_whole_prompts(self, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FewShot, "patch", lambda condition, model: None)
        model, task = model_of("Llama"), task_of("any", LONG)
        options: dict[str, Any] = {"metrics": (metric,), "max_new_tokens": 4}
        self.check(lambda: evaluate(task, {"": ZeroShot()}, model, **options), 14 * MIB)

    @pytest.mark.parametrize("shared_prefix", [True, False])
    def test_evaluation_over_a_large_vocabulary(self, shared_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not shared_prefix:
            monkeypatch.setattr(FewShot, "patch", lambda condition, model: None)
        model, task = model_of("Llama", vocabulary=100_000), task_of("any", SHORT, n=16)
        self.check(lambda: evaluate(task, {"": ZeroShot()}, model), 16 * MIB)

    def test_learned_task_vectors(self) -> None:
        model, task = model_of("Llama"), task_of("any", 40)
        seeds = iter(range(100))

        def fit() -> None:
            sizes: dict[str, Any] = {"n_prompts": 4, "n_shots": 1, "n_pool": 24, "pool_shots": 4, "batch_size": 24}
            method = sl.methods.LTV(**sizes, n_steps=1, learning_rates=(0.1, 0.01))
            method.fit(task, model, seed=next(seeds))

        self.check(fit, 10 * MIB)

    def test_an_embedding(self) -> None:
        model, task = model_of("Llama"), task_of("any", 40)
        seeds = iter(range(100))

        def embed() -> None:
            embed_task(task, model, n_prompts=24, n_shots=4, seed=next(seeds))

        self.check(embed, 16 * MIB)
