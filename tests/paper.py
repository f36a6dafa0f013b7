"""The configurations of the paper's models, as in their hub repositories, and smaller versions of them."""

from __future__ import annotations

import copy
from typing import Any

WINDOW = 8  # tokens of a shrunk sliding window, shorter than most prompts

_LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "sliding_window": 1024,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    },
}  # fmt: skip
_GEMMA_VISION: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
# The class and the configuration of a checkpoint, the same for base and instruction-tuned models.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("LlamaForCausalLM", _LLAMA),
    "Llama-3.1-70B": (
        "LlamaForCausalLM",
        _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "Mistral-7B": ("MistralForCausalLM", _MISTRAL),
    "Mixtral-8x7B": (
        "MixtralForCausalLM",
        _MISTRAL | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "Qwen3-8B": ("Qwen3ForCausalLM", _QWEN),
    "Qwen3-32B": (
        "Qwen3ForCausalLM",
        _QWEN | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    ),
    "gemma-3-4b": (
        "Gemma3ForConditionalGeneration",
        {"text_config": _GEMMA, "vision_config": _GEMMA_VISION, "mm_tokens_per_image": 256},
    ),
}


def shrunk(name: str, vocab: int) -> tuple[str, dict[str, Any]]:
    """The configuration with a quarter of the heads and a sixteenth of d_head and of the layers, keeping all ratios.

    Gemma keeps one whole period of its layers (five with a sliding window, one without).
    """
    architecture, config = copy.deepcopy(CONFIGS[name])
    text = config.get("text_config", config)
    heads, d_head = text["num_attention_heads"], text.get("head_dim", 128)
    parts = 4 if heads > 8 else 2
    width = heads * d_head // (parts * 16)
    text |= {
        "vocab_size": vocab,
        "num_attention_heads": heads // parts,
        "num_key_value_heads": text["num_key_value_heads"] // parts,
        "head_dim": d_head // 16,
        "hidden_size": width * text["hidden_size"] // (heads * d_head),
        "intermediate_size": width * text["intermediate_size"] // (heads * d_head),
        "num_hidden_layers": 6 if "text_config" in config else text["num_hidden_layers"] // 16,
        "max_position_embeddings": 256,
    }
    if text.get("sliding_window"):
        text["sliding_window"] = WINDOW
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = d_head // 16
    if "original_max_position_embeddings" in text["rope_parameters"]:
        text["rope_parameters"]["original_max_position_embeddings"] = 64
    if "vision_config" in config:
        config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                    "num_attention_heads": 2, "image_size": 28}  # fmt: skip
        config |= {"mm_tokens_per_image": 4, "image_token_index": 0, "boi_token_index": 0, "eoi_token_index": 0}
    return architecture, config
