"""Tiny random models of many architectures, and the output of their heads, computed from the raw models alone.

The configurations differ in attention or in the path from a head to the logits: multipliers, caps, norms of every
kind, parallel blocks, blocks that add the residual stream inside, sinks, windows, latent attention, experts.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sitelens.models.model import Bridge
from tests import micro

B: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_MHA = B | {"num_key_value_heads": 4}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32}  # fmt: skip
_MLA = _MHA | {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "first_k_dense_replace": 2,
               "n_routed_experts": 4, "moe_intermediate_size": 16}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.3, "logits_scaling": 2.0}

# name -> (class, options). Those in FAST always run; the others are as cheap, but numerous.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", B),
    "Llama with biases": ("LlamaForCausalLM", B | {"attention_bias": True, "mlp_bias": True}),
    "Llama with YaRN": ("LlamaForCausalLM", B | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "GPT-2": ("GPT2LMHeadModel", _GPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _MHA),
    "GPT-NeoX, serial": ("GPTNeoXForCausalLM", _MHA | {"use_parallel_residual": False}),
    "GPT-Neo": ("GPTNeoForCausalLM", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                                      "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256}),
    "GPT-J": ("GPTJForCausalLM", _GPT | {"rotary_dim": 8}),
    "CodeGen": ("CodeGenForCausalLM", _GPT | {"rotary_dim": 8}),
    "GPTBigCode": ("GPTBigCodeForCausalLM", _GPT),
    "Gemma": ("GemmaForCausalLM", B | {"head_dim": 16}),
    "Gemma 2": ("Gemma2ForCausalLM", B | _WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 16,
                                                     "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "Gemma 3": ("Gemma3ForCausalLM", B | _WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "SmolLM3": ("SmolLM3ForCausalLM", B | {"no_rope_layers": [1, 0]}),
    "GPT-OSS": ("GptOssForCausalLM", B | _WINDOWS | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi": ("PhiForCausalLM", _MHA),
    "Phi-3": ("Phi3ForCausalLM", B),
    "Phi-3, odd heads": ("Phi3ForCausalLM", B | {"head_dim": 12}),
    "OLMo": ("OlmoForCausalLM", B | {"clip_qkv": 1.0}),
    "OLMo 2": ("Olmo2ForCausalLM", B),
    "OLMo 3": ("Olmo3ForCausalLM", B | _WINDOWS),
    "OLMoE": ("OlmoeForCausalLM", B | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteForCausalLM", B | _GRANITE),
    "GraniteMoE": ("GraniteMoeForCausalLM", B | _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": ("CohereForCausalLM", B | {"logit_scale": 0.25}),
    "Cohere 2": ("Cohere2ForCausalLM", B | _WINDOWS),
    "StableLM": ("StableLmForCausalLM", B),
    "StableLM, parallel": ("StableLmForCausalLM", B | {"use_parallel_residual": True}),
    "StarCoder 2": ("Starcoder2ForCausalLM", B | {"sliding_window": 8}),
    "Qwen2, windows": ("Qwen2ForCausalLM", B | _WINDOWS | {"use_sliding_window": True}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", B | _MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", B | _MOE | {"head_dim": 16}),
    "Mixtral": ("MixtralForCausalLM", B | {"num_local_experts": 4}),
    "BLOOM": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "Falcon": ("FalconForCausalLM", _FALCON | {"multi_query": True}),
    "Falcon, serial": ("FalconForCausalLM", _FALCON | {"multi_query": True, "parallel_attn": False, "bias": True}),
    "OPT": ("OPTForCausalLM", _OPT),
    "GLM": ("GlmForCausalLM", B | {"head_dim": 8}),
    "GLM-4": ("Glm4ForCausalLM", B | {"head_dim": 8}),
    "EXAONE 4": ("Exaone4ForCausalLM", B | _WINDOWS),
    "Nemotron": ("NemotronForCausalLM", B),
    "DeepSeek 2": ("DeepseekV2ForCausalLM", _MLA | {"q_lora_rank": None, "v_head_dim": 8}),
    "DeepSeek 3": ("DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": 8, "v_head_dim": 8}),
    "Apertus": ("ApertusForCausalLM", B),
    "Arcee": ("ArceeForCausalLM", B),
    "Seed-OSS": ("SeedOssForCausalLM", B | {"head_dim": 8}),
    "HunYuan": ("HunYuanDenseV1ForCausalLM", B | {"head_dim": 8}),
    "LFM2, attention only": ("Lfm2ForCausalLM", B | {"layer_types": ["full_attention", "full_attention"]}),
}  # fmt: skip
# Models that must be rejected, with a part of the error message.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # The bridge finds no final norm if embeddings are projected.
    "OPT, projected": ("OPTForCausalLM", _OPT | {"word_embed_proj_dim": 16}, "miss the logits by"),
    # The result of a hook on its last norm loses a dimension.
    "OPT, norms behind": ("OPTForCausalLM", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, "held"),
    "DeepSeek 3, wide values": ("DeepseekV3ForCausalLM", _MLA | {"q_lora_rank": 8, "v_head_dim": 12}, "heads of 8"),
}
FAST = ["Gemma 2", "GPT-OSS", "Granite", "BLOOM"]

PROJECTION = re.compile(r"(attn|attention)\.(c_proj|out_proj|o_proj|dense)$|attn\.attention\.out_proj$")
MLP = re.compile(r"\.(mlp|ffn|feed_forward|fc1|block_sparse_moe)$")
NORMS = re.compile(r"(^|\.)(?!.*(attn|attention)\.)\w*(norm|ln_)\w*$")


@functools.cache
def raw(name: str) -> Any:
    """A raw model with random norms and biases, and with the tokenizer of `micro`."""
    kind, options = (ZOO | {name: (kind, options) for name, (kind, options, _) in REFUSED.items()})[name]
    config = getattr(transformers, kind).config_class(
        vocab_size=len(micro.tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
    )
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        network = getattr(transformers, kind)(config)
        for weight in network.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.mul_(4)
    return network.eval().requires_grad_(False)


@functools.cache
def bridge(name: str) -> Bridge:
    """The same weights as a TransformerBridge."""
    return micro.bridged(copy.deepcopy(raw(name)), name, micro.tokenizer())


def named(network: Any, pattern: re.Pattern[str]) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if pattern.search(name)}


def projections(network: Any) -> list[nn.Module]:
    """The attention output projections, one per layer; their input is z with the heads concatenated."""
    return list(named(network, PROJECTION).values())


def blocks(network: Any) -> list[nn.Module]:
    """The decoder layers."""
    return list(named(network, re.compile(r"\.(h|layers|blocks)\.\d+$")).values())


def outputs(network: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that compute the output of attention and MLP of every layer, before it is added to the stream."""
    inside = {"BloomForCausalLM": "both", "MptForCausalLM": "mlp", "OPTForCausalLM": "mlp"}.get(type(network).__name__)
    attention = projections(network)
    ends = r"\.(dense_4h_to_h|down_proj|fc2)$" if inside else r"\.(mlp|ffn|feed_forward|block_sparse_moe)$"
    return attention, list(named(network, re.compile(ends)).values())


@torch.no_grad()
def logits_with_outputs(name: str, ids: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits `[vocab]` after the last token of the raw model, with the outputs of some modules changed."""

    def hook(module: nn.Module, args: Any, y: Any) -> Any:
        return (changes[module](y[0]), *y[1:]) if isinstance(y, tuple) else changes[module](y)

    handles = [module.register_forward_hook(hook) for module in changes]
    try:
        return raw(name)(ids, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attentions(name: str, ids: Tensor) -> list[Tensor]:
    """Attention weights `[row head pos pos]` of every layer, as the raw model returns them."""
    network = copy.deepcopy(raw(name))
    network.set_attn_implementation("eager")
    return network(ids, output_attentions=True, use_cache=False).attentions


def frozen(norm: Any, name: str, x: Tensor, architecture: str) -> Callable[[Tensor], Tensor]:
    """A norm with its scale fixed at x, from its weights: Gemma and Nemotron store them minus 1, OLMo has none."""
    weight = getattr(norm, "weight", None)
    weight = torch.ones(x.shape[-1]) if weight is None else weight
    if architecture.startswith(("Gemma", "Nemotron")):
        weight = 1 + weight
    bias = getattr(norm, "bias", None)
    centered = "RMS" not in type(norm).__name__ and "LayerNorm" in type(norm).__name__
    eps = next((float(getattr(norm, name)) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), 1e-5)
    center = x - x.mean(-1, keepdim=True) if centered else x
    scale = (center.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def held(x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True) if centered else x) / scale * weight
        return y if bias is None else y + bias

    return held


class Held:
    """One prompt of a raw model, in which everything at the last token except the heads can be held fixed."""

    def __init__(self, name: str, ids: Sequence[int]) -> None:
        self.name, self.network, self.ids = name, raw(name), torch.tensor([list(ids)])
        self.z: dict[nn.Module, Tensor] = {}
        self.mlps: dict[nn.Module, Tensor] = {}
        self.norms: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        names = {module: key for key, module in self.network.named_modules()}

        def keep(module: nn.Module, args: tuple[Tensor, ...], kept: dict[nn.Module, Tensor]) -> None:
            kept[module] = args[0].clone()

        def freeze(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            held = frozen(module, names[module], args[0], name)
            torch.testing.assert_close(held(args[0]), y, rtol=1e-4, atol=1e-4)
            self.norms[module] = held

        pre: list[tuple[nn.Module, Any]] = []
        for kept, pattern in ((self.z, PROJECTION), (self.mlps, MLP)):
            pre += [(m, functools.partial(keep, kept=kept)) for m in named(self.network, pattern).values()]
        with self._hooked(pre, [(m, freeze) for m in named(self.network, NORMS).values()]):
            self.unembedded, self.logits = self._run()
        self.heads = bridge(name).cfg.n_heads

    def without(self, layer: int, head: int, z: Tensor | None = None) -> Tensor:
        """The unembedding's result if the output of a head at the last token is `z` (None: zero)."""
        module = list(self.z)[layer]
        edited = self.z[module].clone()
        own = edited[0, -1].view(self.heads, -1)
        own[head] = 0 if z is None else z
        return self._with({module: edited})

    def writes(self, layer: int, head: int, z: Tensor, behind: nn.Module) -> Tensor:
        """The change in the output of a block at the last token, if the output of a head is `z` instead of zero."""
        module = list(self.z)[layer]
        states = []
        for value in (z, torch.zeros_like(z)):
            edited = self.z[module].clone()
            edited[0, -1].view(self.heads, -1)[head] = value
            kept: list[Tensor] = []

            def keep(module: Any, inputs: Any, output: Any, kept: list[Tensor] = kept) -> None:
                kept.append(output[0] if isinstance(output, tuple) else output)

            handle = behind.register_forward_hook(keep)
            try:
                self._with({module: edited})
            finally:
                handle.remove()
            states.append(kept[0][0, -1])
        return states[0] - states[1]

    def _with(self, edited: dict[nn.Module, Tensor]) -> Tensor:
        z, mlps = {**self.z, **edited}, self.mlps
        pre = [(m, lambda module, args, held=held: (held, *args[1:])) for m, held in (z | mlps).items()]
        post = [(m, lambda module, args, y: self.norms[module](args[0])) for m in self.norms]
        with self._hooked(pre, post):
            return self._run()[0]

    @torch.no_grad()
    def _run(self) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        handle = self.network.get_output_embeddings().register_forward_hook(lambda m, a, y: kept.append(y))
        try:
            logits = self.network(self.ids, use_cache=False).logits
        finally:
            handle.remove()
        return kept[0][0, -1], logits[0, -1]

    @contextmanager
    def _hooked(self, pre: Sequence[tuple[nn.Module, Any]], post: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(hook) for module, hook in pre]
        handles += [module.register_forward_hook(hook) for module, hook in post]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
