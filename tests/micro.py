"""Tiny random models of every family, with a word-level tokenizer that is built in memory: no files, no network."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sitelens.engine.network import run_tokens
from sitelens.engine.twins import network_twin
from sitelens.models.model import Bridge, Model
from sitelens.tasks import Task
from tests import paper
from tests.paper import WINDOW

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Every answer must be one known word; two-letter words give enough of them.
WORDS = [first + second for first in LETTERS[:12] for second in LETTERS[:8]]

_COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "GPTNeoX": ("GPTNeoXForCausalLM", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "Llama": ("LlamaForCausalLM", _COMMON),
    "Mistral": ("MistralForCausalLM", _COMMON | {"sliding_window": WINDOW}),
    "Mixtral": ("MixtralForCausalLM", _COMMON | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "Qwen3": ("Qwen3ForCausalLM", _COMMON | {"head_dim": 16}),
    "Gemma3Text": (
        "Gemma3ForCausalLM",
        _COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
                   "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
FAMILIES = list(_FAMILIES)
# For the most extensive tests only: the other model type that runs without its bridge, a single key head, a d_head that
# does not divide d_model, and small versions of the models of the paper.
_FAMILIES |= {
    "Qwen2": ("Qwen2ForCausalLM", _COMMON),
    "MultiQuery": ("LlamaForCausalLM", _COMMON | {"num_key_value_heads": 1}),
    "OddHeads": ("Qwen3ForCausalLM", _COMMON | {"head_dim": 12}),
}
MORE_FAMILIES = [*_FAMILIES, *paper.CONFIGS]


def tokenizer(bos: bool = False) -> Any:
    """A tokenizer of whole words and single characters; a space belongs to the following word, as in byte-level BPE."""
    signs = ["Q", "A", ":", "\n", "\n\n", " ", *"0123456789"]
    entries = ["<pad>", "<bos>", "<eos>", "<unk>", *signs, *WORDS, *(" " + word for word in WORDS)]
    model = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    from tokenizers import Regex, decoders, processors

    pattern = Regex(r"\n\n|\n| ?[a-z]+|[QA:]|[0-9]| ")
    model.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    model.decoder = decoders.Fuse()
    if bos:
        model.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@functools.cache
def _network(family: str, dtype: torch.dtype, seed: int) -> Any:
    words = len(tokenizer())
    name, options = paper.shrunk(family, words) if family in paper.CONFIGS else _FAMILIES[family]
    whole = options if family in paper.CONFIGS else options | {"vocab_size": words}
    config = getattr(transformers, name).config_class(pad_token_id=0, bos_token_id=1, eos_token_id=2, **whole)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = getattr(transformers, name)(config)
    with torch.no_grad():  # larger than a usual initialization, so that every head matters
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return network.to(dtype).eval()


def raw(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A Hugging Face model with eager attention."""
    network = copy.deepcopy(_network(family, dtype, seed))
    network.set_attn_implementation("eager")
    return network


def bridge(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, bos: bool = False) -> Bridge:
    """The same weights as `raw`, as a TransformerBridge with frozen weights and its own tokenizer."""
    return bridged(raw(family, dtype, seed), family, tokenizer(bos))


def bridged(network: Any, name: str, own: Any) -> Bridge:
    """A TransformerBridge with this tokenizer around a raw model, which is modified."""
    model = build_bridge_from_module(network, type(network).__name__, hf_config=network.config, model_name=name)
    model.requires_grad_(False)
    Model.of(model).use_tokenizer(own)
    return model


def lent(family: str, dtype: torch.dtype = torch.float32) -> Iterator[Bridge]:
    """A bridge shared by tests, for a fixture to `yield from`; each test must leave it without hooks."""
    model = _shared_bridge(family, dtype)
    yield model
    left = hooks_left(model)
    model.reset_hooks(including_permanent=True)
    assert not left


_shared_bridge = functools.cache(bridge)


def hooks_left(model: Bridge) -> list[str]:
    """The names of hook points that have hooks."""
    return [name for name, point in model.hook_dict.items() if point.has_hooks() or point._forward_hooks]


def silence(patch: pytest.MonkeyPatch) -> None:
    """From now on, every forward pass by sitelens raises AssertionError "the model was run".

    The model itself is unchanged, because results are not taken from the cache if its `forward` is replaced.
    """

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    for name, module in list(sys.modules.items()):
        if name.startswith("sitelens.") and vars(module).get("run_tokens") is run_tokens:
            patch.setattr(module, "run_tokens", fail)


def output_projections(network: Any) -> list[torch.nn.Module]:
    """The attention output projections of a raw model, one per layer; their input is z with the heads concatenated."""
    ends = ("attn.c_proj", "attention.dense", "self_attn.o_proj")
    return [module for name, module in network.named_modules() if name.endswith(ends)]


def raw_modules(model: Bridge) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of the network by the names that they have without a bridge."""
    yield from network_twin(model).named_modules()


def task(name: str = "shift", n: int = 60, step: int = 1, **options: Any) -> Task:
    """A task on the tokenizer's words; the answer of each word is the word `step` positions later."""
    return Task.from_pairs(name, [(WORDS[i], WORDS[(i + step) % len(WORDS)]) for i in range(n)], **options)
