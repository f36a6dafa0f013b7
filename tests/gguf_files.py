"""Small GGUF files of random networks, in the layout of llama.cpp's converter."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# llama.cpp's architecture -> class of transformers and options of its configuration
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "granite": ("Granite", {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                            "logits_scaling": 4.0}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen2moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
                          "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "gemma3": ("Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 80}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 1e-4}),
    "stablelm": ("StableLm", {"layer_norm_eps": 1e-4, "use_qkv_bias": True}),
}  # fmt: skip
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with three special tokens and a few merges."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.train_from_iterator(
        ["Q: hot\nA: cold\n\nQ: big\nA: small"] * 4,
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def network(arch: str, seed: int = 0, **options: Any) -> Any:
    """A random network of a family, with random norms and biases as well."""
    name, own = FAMILIES[arch]
    torch.manual_seed(seed)
    kind = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    size = {"vocab_size": len(tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    net = kind(kind.config_class(**size, **(COMMON if arch != "gpt2" else {}) | own | options))
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.1))
    return net.eval()


def content(net: Any, arch: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata (keys without the prefix of the architecture) and tensors of a network."""
    c = net.config
    heads = c.num_attention_heads
    values = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers, "attention.head_count": heads,
        "feed_forward_length": getattr(c, "intermediate_size", None) or c.n_inner, "vocab_size": c.vocab_size,
    }  # fmt: skip
    eps = next(getattr(c, n) for n in ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layer_norm_eps")
               if hasattr(c, n))  # fmt: skip
    values["attention.layer_norm_rms_epsilon" if hasattr(c, "rms_norm_eps") else "attention.layer_norm_epsilon"] = eps
    if arch != "gpt2":
        values["attention.head_count_kv"] = c.num_key_value_heads
        rope = c.rope_parameters.get("full_attention", c.rope_parameters)
        values["rope.freq_base"] = float(rope["rope_theta"])
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        if getattr(c, "head_dim", None):
            values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    for key, name in {
        "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling", "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping", "use_parallel_residual": "use_parallel_residual",
    }.items():  # fmt: skip
        if getattr(c, name, None) is not None:
            values[key] = getattr(c, name)
    return values, dict(_tensors(net, arch))


def _tensors(net: Any, arch: str) -> Iterable[tuple[str, np.ndarray]]:
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], net.config.num_hidden_layers)
    for key, tensor in net.state_dict().items():
        if key == "lm_head.weight" and net.config.tie_word_embeddings:
            continue
        array, layer = tensor.float().numpy(), next((part for part in key.split(".") if part.isdigit()), "")
        if "experts.gate_up_proj" in key:
            gate, up = np.split(array, 2, axis=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            continue
        if "experts.down_proj" in key:
            yield f"blk.{layer}.ffn_down_exps.weight", array
            continue
        stem, _, suffix = key.rpartition(".")
        if arch in ("llama", "granite") and ("q_proj" in key or "k_proj" in key):
            n = net.config.num_attention_heads if "q_proj" in key else net.config.num_key_value_heads
            array = array.reshape(n, 2, array.shape[0] // n // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if arch in ("gemma2", "gemma3") and key.endswith("norm.weight"):
            array = array + 1
        if arch == "gpt2" and any(part in stem for part in ("c_attn", "c_proj", "c_fc")) and suffix == "weight":
            array = array.T
        if key.endswith("shared_expert_gate.weight"):
            array = array[0]
        yield f"{names.get_name(stem)}.{suffix}", array


def write(
    path: Path, net: Any, arch: str = "llama", *, change: Change | None = None,
    general: Mapping[str, Any] | None = None, parts: int = 1,
) -> Path:  # fmt: skip
    """Write a GGUF file of a network with the tests' tokenizer; return its path (of the first part if it is split).

    `change` may edit metadata and tensors first; `general` is further metadata with complete keys. Split files have
    the layout of llama.cpp's gguf-split.
    """
    values, tensors = content(net, arch)
    if change is not None:
        change(values, tensors)
    about = {f"{arch}.{key}": value for key, value in values.items()} | _tokens(arch) | dict(general or {})
    files = [path] if parts == 1 else [
        path.with_name(f"{path.stem}-{i + 1:05}-of-{parts:05}.gguf") for i in range(parts)
    ]  # fmt: skip
    for number, names in enumerate(np.array_split(np.array(list(tensors)), parts)):
        writer = gguf.GGUFWriter(str(files[number]), arch)
        for key, value in about.items() if number == 0 else ():
            _add(writer, key, value)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        for name in names:
            writer.add_tensor(str(name), np.ascontiguousarray(tensors[str(name)].astype(np.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def _tokens(arch: str) -> dict[str, Any]:
    own = tokenizer()
    if arch.startswith("gemma"):  # as in sentencepiece, with byte tokens and without a prefix space
        tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", "▁a"]
        tokens += [f"<unused{i}>" for i in range(len(own.get_vocab()) - len(tokens))]
        return {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.token_type": [3] * 3 + [2] + [6] * 256 + [1] * (len(tokens) - 260),
            "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 3,
        }  # fmt: skip
    tokens = [token for token, _ in sorted(own.get_vocab().items(), key=lambda pair: pair[1])]
    merges = json.loads(own.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    kinds[type(value)](key, value)
