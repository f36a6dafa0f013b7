"""The list of models: the paper's twelve models compared with their real configurations, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sitelens import list_models
from sitelens.models import catalogue
from sitelens.models.catalogue import NF4_BYTES, PAPER, download_command, weight_bytes
from sitelens.models.gguf.converted import PACKAGED
from sitelens.models.model import Bridge
from sitelens.settings import settings
from tests.paper import CONFIGS

FACTS = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}


def network(name: str) -> Any:
    """The complete model with its configuration on the hub, on the meta device (without weights)."""
    architecture, config = CONFIGS[name]
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        return kind(kind.config_class(**config))


def checkpoints(name: str) -> list[str]:
    """The hub ids of the base model and the instruction-tuned model."""
    wanted = name.lower().split("-")
    return [hub_id for hub_id in PAPER if all(part in hub_id.lower().split("/")[1] for part in wanted)]


def test_every_model_of_the_paper_is_there_once() -> None:
    found = [hub_id for name in CONFIGS for hub_id in checkpoints(name)]
    assert sorted(found) == sorted(PAPER) and len(PAPER) == 12


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_listed_is_what_the_configuration_says(name: str) -> None:
    whole = network(name)
    text = whole.config.get_text_config()
    parameters = sum(weight.numel() for weight in whole.parameters())
    experts = sum(weight.numel() for key, weight in whole.named_parameters() if key.split(".")[-2] == "experts")
    packed = experts + sum(
        module.weight.numel()
        for key, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear) and key != "lm_head"
    )
    for hub_id in checkpoints(name):
        spec = PAPER[hub_id]
        assert {fact: getattr(spec, fact) for fact in FACTS} == {fact: getattr(text, at) for fact, at in FACTS.items()}
        d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        assert (spec.d_head, spec.parameters, spec.plain) == (d_head, parameters, parameters - packed)


def test_rows_say_how_much_memory_and_which_command() -> None:
    with settings.using(memory_budget="1GiB"):
        frame = list_models().set_index("name")
    assert list(frame.index) == [*PACKAGED, *PAPER]
    large = frame.loc["meta-llama/Llama-3.1-70B"].to_dict()
    assert (large["quantize"], large["dtype"], large["d_head"]) == ("nf4", "bfloat16", 128)
    assert large["prefix_kib"] == 2 * 80 * 8 * 128 * 2 / 1024
    assert large["prefix_tokens"] == 2**30 // (320 * 1024)
    assert large["weights_gib"] == round(weight_bytes(PAPER["meta-llama/Llama-3.1-70B"]) / 2**30, 2) < 70.6e9 / 2**30
    assert large["download_command"].startswith("hf auth login && hf download meta-llama/Llama-3.1-70B ")
    assert not large["cached"]
    plain = 'hf download Qwen/Qwen3-8B --exclude "original/*" "consolidated*"'
    assert frame.loc["Qwen/Qwen3-8B", "download_command"] == download_command("Qwen/Qwen3-8B") == plain
    assert frame.loc["Qwen/Qwen3-8B", "weights_gib"] == round(2 * 8_190_735_360 / 2**30, 2)


def test_a_model_is_cached_when_all_its_weights_lie_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def cached_models() -> list[str]:
        cached = list_models().set_index("name")["cached"]
        return list(cached.index[cached & cached.index.str.contains("/")])

    def cached(name: str, file: str) -> str | None:
        return str(tmp_path / file) if name == "Qwen/Qwen3-8B" and (tmp_path / file).exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / "model-1.safetensors").touch()
    assert cached_models() == []  # an interrupted download
    (tmp_path / "model-2.safetensors").touch()
    assert cached_models() == ["Qwen/Qwen3-8B"]


def test_four_bits_take_what_bitsandbytes_takes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64 * 256, 64)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.state2.absmax]
    size = sum(part.numel() * part.element_size() for part in parts)
    assert size == pytest.approx(NF4_BYTES * weight.numel(), rel=1e-3)


@pytest.mark.slow
def test_the_packaged_models_row_is_right(packaged_model: Bridge) -> None:
    spec, text = PACKAGED["smollm2-135m"], packaged_model.original_model.config
    assert {fact: getattr(spec, fact) for fact in FACTS} == {fact: getattr(text, at) for fact, at in FACTS.items()}
    assert spec.parameters == sum({id(p): p.numel() for p in packaged_model.original_model.parameters()}.values())
    assert catalogue.list_models().set_index("name").loc["smollm2-135m", "cached"]
