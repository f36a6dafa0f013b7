"""GGUF files: the exact network is loaded or the file is rejected by name; one complete conversion across processes."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sitelens import list_models
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files import folders
from sitelens.models.gguf import converted as conversion
from sitelens.models.gguf.converted import PACKAGED, PackagedModel, gguf_folder, packaged_folder
from sitelens.models.gguf.metadata import config_of
from sitelens.models.loading import load_model
from sitelens.models.model import Model
from sitelens.models.networks import load_network
from sitelens.settings import settings
from tests import gguf_files

TOKENS = torch.arange(3, 63)[None]  # longer than the sliding windows


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def logits(network: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return network(tokens, attention_mask=torch.ones_like(tokens)).logits


def converted(file: Path) -> Any:
    return load_network(gguf_folder(file), dtype=torch.float32).eval()


def assert_same(file: Path, network: Any) -> Any:
    """Assert that the converted file computes what the network computes; return the converted model."""
    found = converted(file)
    torch.testing.assert_close(logits(found), logits(network), rtol=1e-5, atol=1e-5)
    return found


# The content of a file is what is loaded


@pytest.mark.parametrize("arch", gguf_files.FAMILIES)
def test_a_converted_network_computes_what_the_original_does(tmp_path: Path, arch: str):
    network = gguf_files.network(arch)
    assert_same(gguf_files.write(tmp_path / "tiny.gguf", network, arch), network)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
        ("qwen3", {"attention_bias": True}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma3", {"final_logit_softcapping": 5.0}),
        ("phi3", {"sliding_window": 8, "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}}),
        ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
        ("stablelm", {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}}),
        ("starcoder2", {"sliding_window": 8, "rope_parameters": {"rope_theta": 1e5}}),
    ],
    ids=str,
)
def test_what_families_vary_is_rebuilt(tmp_path: Path, arch: str, options: dict[str, Any]):
    network = gguf_files.network(arch, **options)

    def scale(values: dict[str, Any], _: Any) -> None:
        if "query_pre_attn_scalar" in options:
            values["attention.scale"] = options["query_pre_attn_scalar"] ** -0.5

    assert_same(gguf_files.write(tmp_path / "tiny.gguf", network, arch, change=scale), network)


def test_a_mistral_that_is_called_llama_keeps_its_sliding_window(tmp_path: Path):
    network = transformers.MistralForCausalLM(
        transformers.MistralConfig(**gguf_files.COMMON, vocab_size=274, sliding_window=8)
    ).eval()
    found = assert_same(gguf_files.write(tmp_path / "tiny.gguf", network), network)
    assert found.config.model_type == "mistral" and found.config.sliding_window == 8


# Rotary embeddings

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "max_position_embeddings": 131072}  # fmt: skip


def rebuilt(network: Any, arch: str, change: gguf_files.Change) -> Any:
    """The original weights with the configuration that is read from a file's metadata."""
    values, tensors = gguf_files.content(network, arch)
    change(values, tensors)
    whole = {f"{arch}.{key}": value for key, value in values.items()} | {"general.architecture": arch}
    shapes = {name: array.shape for name, array in tensors.items()}
    found = type(network)(config_of("tiny.gguf", whole, shapes, lambda name: tensors[name]))
    found.load_state_dict(network.state_dict())
    return found.eval()


def divisors(network: Any) -> np.ndarray:
    """The rope_freqs of llama.cpp's converter: standard frequencies divided by those of the network."""
    plain = network.config.rope_parameters["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
    return plain / network.model.rotary_emb.inv_freq.double().numpy()


@pytest.mark.parametrize(
    "changes",
    [{}, {"factor": 8.0}, {"factor": 16.0, "original_max_position_embeddings": 4096},
     {"low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 5000, "factor": 11.0}],
    ids=str,
)  # fmt: skip
def test_llama_3s_frequencies_are_rebuilt(tmp_path: Path, changes: dict[str, Any]):
    network = gguf_files.network("llama", **WIDE, rope_parameters=LLAMA3 | changes)

    def scale(_: Any, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = divisors(network)

    found = assert_same(gguf_files.write(tmp_path / "tiny.gguf", network, change=scale), network)
    assert found.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, network.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    if "low_freq_factor" not in changes:
        assert found.config.rope_parameters == LLAMA3 | changes


def test_any_other_frequencies_are_kept_one_by_one():
    network = gguf_files.network("llama", **WIDE)
    own = np.linspace(1.0, 3.0, 32)

    def scale(_: Any, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = own

    found = rebuilt(network, "llama", scale)
    expected = network.model.rotary_emb.inv_freq / torch.tensor(own, dtype=torch.float32)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, expected, rtol=1e-5, atol=0)
    network.model.rotary_emb.inv_freq = expected
    torch.testing.assert_close(logits(found), logits(network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"rope.scaling.factor": 4.0, "rope.scaling.finetuned": True}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
             "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_scaled_rotary_embeddings_are_rebuilt(arch: str, keys: dict[str, Any], rope: dict[str, Any]):
    theta = {"rope_theta": 20000.0}
    local = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    options = local | {"full_attention": theta | rope} if arch == "gemma3" else theta | rope
    network = gguf_files.network(arch, rope_parameters=options)
    found = rebuilt(network, arch, lambda values, _: values.update(keys))
    torch.testing.assert_close(logits(found), logits(network), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [TOKENS[:, :30], TOKENS], ids=["short", "long"])
def test_factors_by_length_are_rebuilt(tokens: torch.Tensor):
    short, long = [1.0, 1.5], [2.0, 7.25]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
            "partial_rotary_factor": 0.5, "original_max_position_embeddings": 40}  # fmt: skip
    network = gguf_files.network("phi3", rope_parameters=rope, original_max_position_embeddings=40)

    def scale(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors |= {"rope_factors_short.weight": np.array(short), "rope_factors_long.weight": np.array(long)}
        values["rope.scaling.original_context_length"] = 40
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(256 / 40) / math.log(40))

    found = rebuilt(network, "phi3", scale)
    torch.testing.assert_close(logits(found, tokens), logits(network, tokens), rtol=1e-5, atol=1e-5)


# What cannot be rebuilt is rejected by name


REFUSED: dict[str, Any] = {
    "rope.scaling.type": "ntk", "rope.scaling.attn_factor": 2.0, "rope.scaling.alpha": 1000.0,
    "rope.dimension_count": 4, "rope.dimension_sections": [2, 2, 2, 2], "rope.freq_base_swa": 5e3,
    "attention.scale": 0.5, "attention.clamp_kqv": 8.0, "attention.max_alibi_bias": 8.0, "attention.causal": False,
    "attention.value_length": 16, "logit_scale": 0.25, "residual_scale": 0.5, "embedding_scale": 12.0,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "expert_count": 8, "expert_used_count": 2,
    "expert_weights_scale": 2.5, "pooling_type": 1, "use_parallel_residual": True, "never.heard.of": 7,
    "attention.layer_norm_epsilon": 0.1, "attention.head_count_kv": [1, 2], "attention.key_length": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata (with complete keys) and tensor shapes of a Llama."""
    values, tensors = gguf_files.content(gguf_files.network("llama"), "llama")
    whole = {f"llama.{key}": value for key, value in values.items()} | {"general.architecture": "llama"}
    return whole, {name: array.shape for name, array in tensors.items()}


def configured(plain: tuple[dict[str, Any], dict[str, tuple[int, ...]]], keys: dict[str, Any]) -> Any:
    values, shapes = plain
    return config_of("tiny.gguf", values | {f"llama.{key}": value for key, value in keys.items()}, shapes, np.ones)


@pytest.mark.parametrize("key", REFUSED)
def test_metadata_that_change_the_computation_are_refused_by_name(plain: Any, key: str):
    named = "attention.value_length" if key == "attention.key_length" else key
    with pytest.raises(SitelensError, match=rf"tiny\.gguf: its metadata llama\.{named} = .*original Hugging Face"):
        configured(plain, {key: REFUSED[key]})


def test_a_refused_file_leaves_nothing(tmp_path: Path, own_cache: Path):
    file = gguf_files.write(
        tmp_path / "t.gguf", gguf_files.network("llama"), change=lambda values, _: values.update({"logit_scale": 0.5})
    )
    with pytest.raises(SitelensError, match=r"t\.gguf: its metadata llama\.logit_scale = 0\.5"):
        load_model(file)
    assert [name for name in files(own_cache / "models") if not name.endswith(".lock")] == []


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.finetuned": False, "rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.0},
        {"attention.scale": 8**-0.5, "logit_scale": 1.0, "residual_scale": 1.0, "expert_count": 0},
        {"attention.sliding_window": 0, "attention.causal": True, "tensor_data_layout": "Meta AI original pth"},
        {"attention.key_length": 8, "attention.value_length": 8, "attention.head_count_kv": [2, 2]},
    ],
    ids=str,
)
def test_metadata_that_change_nothing_are_borne(plain: Any, keys: dict[str, Any]):
    assert configured(plain, keys).to_dict() == configured(plain, {}).to_dict()


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"general.type": "adapter"}, "of type adapter"),
        ({"general.type": "mmproj"}, "of type mmproj"),
        ({"general.architecture": "falcon"}, "architecture 'falcon', which is not converted.*original Hugging Face"),
    ],
)
def test_what_is_no_language_model_of_a_known_kind_is_refused(plain: Any, general: dict[str, str], message: str):
    values, shapes = plain
    with pytest.raises(SitelensError, match=message):
        config_of("tiny.gguf", values | general, shapes, np.ones)


def drop(*names: str) -> gguf_files.Change:
    return lambda _, tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blk.1.attn_q.weight"), "lacks the tensors blk.1.attn_q.weight"),
        (drop("output_norm.weight"), "lacks the tensors output_norm.weight"),
        (drop("token_embd.weight"), "lacks the tensors token_embd.weight"),
        (lambda values, _: values.update(block_count=3), "lacks the tensors blk.2.* and 6 more"),
        (lambda values, _: values.update(block_count=1), "no place for, .*: blk.1.*and 6 more"),
        (lambda _, tensors: tensors.update({"blk.0.attn_sinks.weight": np.ones(4)}), "no place for.*blk.0.attn_sinks"),
        (lambda _, tensors: tensors.update({"blk.0.attn_q_norm.weight": np.ones(8)}), "no place for.*attn_q_norm"),
        (lambda values, _: values.update({"feed_forward_length": 40}), "tensor blk.0.ffn_gate.weight has shape"),
        (lambda values, _: values.update({"embedding_length": 64}), "tensor token_embd.weight has shape"),
        (
            lambda _, tensors: tensors["blk.0.ffn_up.weight"].fill(np.nan),
            "blk.0.ffn_up.weight holds numbers that are not",
        ),
        (lambda _, tensors: tensors.update({"rope_freqs.weight": np.ones(3)}), "rope_freqs.weight does not hold 4"),
        (
            lambda _, tensors: tensors.update({"rope_factors_long.weight": np.ones(4)}),
            "only one of the tensors rope_fac",
        ),
        (lambda values, _: values.pop("context_length"), "no metadata llama.context_length"),
    ],
)
def test_tensors_that_are_missing_left_over_or_wrong_are_named(tmp_path: Path, change: gguf_files.Change, message: str):
    network = gguf_files.network("llama")
    file = gguf_files.write(tmp_path / "tiny.gguf", network, change=change)
    with pytest.raises(SitelensError, match=rf"(?s)tiny\.gguf.*{message}"):
        load_model(file)


# Split files


def test_the_parts_of_a_split_file_are_joined(tmp_path: Path):
    network = gguf_files.network("llama")
    first = gguf_files.write(tmp_path / "tiny.gguf", network, parts=3)
    assert first.name == "tiny-00001-of-00003.gguf"
    assert_same(first, network)
    assert gguf_folder(tmp_path / "tiny-00003-of-00003.gguf") == gguf_folder(first)


def test_a_model_is_another_where_any_part_is(tmp_path: Path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        gguf_files.write(tmp_path / str(seed) / "tiny.gguf", gguf_files.network("llama", seed), parts=2)
    before = gguf_folder(tmp_path / "0" / "tiny-00001-of-00002.gguf")
    second = "tiny-00002-of-00002.gguf"
    shutil.copy(tmp_path / "1" / second, tmp_path / "0" / second)
    assert gguf_folder(tmp_path / "0" / "tiny-00001-of-00002.gguf") != before


@pytest.mark.parametrize(("given", "missing"), [(1, [2]), (1, [2, 3]), (2, [1, 3])])
def test_parts_that_are_not_there_are_named(tmp_path: Path, given: int, missing: list[int]):
    gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), parts=3)
    for number in missing:
        (tmp_path / f"tiny-0000{number}-of-00003.gguf").unlink()
    named = ", ".join(f"tiny-0000{number}-of-00003.gguf" for number in missing)
    with pytest.raises(
        SitelensError, match=f"tiny-0000{given}-of-00003.gguf is part {given} of 3 of a model, and {named}"
    ):
        load_model(tmp_path / f"tiny-0000{given}-of-00003.gguf")


def test_a_part_under_another_name_is_refused(tmp_path: Path):
    first = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), parts=2)
    with pytest.raises(
        SitelensError, match=r"model\.gguf is part 1 of 2 of a model: name it NAME-00001-of-00002\.gguf"
    ):
        load_model(first.rename(tmp_path / "model.gguf"))


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path):
    first = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), parts=2)
    shutil.copy(first, tmp_path / "tiny-00002-of-00002.gguf")
    with pytest.raises(SitelensError, match=r"tiny-00002-of-00002\.gguf says that it is part 1 of 2"):
        load_model(first)


# Tokenizers


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path, bos: bool, eos: bool):
    general = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    bridge = load_model(gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), general=general))
    plain = gguf_files.tokenizer()("Q: hot")["input_ids"]
    assert Model.of(bridge).tokenizer("Q: hot")["input_ids"] == [1] * bos + plain + [2] * eos


def test_the_chat_template_and_all_end_tokens_are_kept(tmp_path: Path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    general = {"tokenizer.chat_template": template, "tokenizer.ggml.eot_token_id": 7}
    bridge = load_model(gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), general=general))
    assert Model.of(bridge).tokenizer.chat_template == template
    network: Any = bridge.original_model
    assert network.generation_config.eos_token_id == [2, 7]


def test_tokenizer_files_beside_the_model_are_not_mixed_in(tmp_path: Path):
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another", "add_bos_token": true}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert Model.of(load_model(file)).tokenizer.chat_template is None


def test_an_unknown_rule_for_cutting_texts_is_said(tmp_path: Path):
    general = {"tokenizer.ggml.pre": "unheard-of"}
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.network("llama"), general=general)
    with pytest.warns(SitelensWarning, match=r"tiny\.gguf: .*rule 'unheard-of'"):
        gguf_folder(file)


# Invalid files


@pytest.mark.parametrize("name", ["nowhere.gguf", "~/nowhere.gguf"])
def test_a_gguf_file_that_is_not_there_is_named(name: str):
    with pytest.raises(SitelensError, match=r"there is no file .*nowhere\.gguf"):
        load_model(name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no GGUF at all" * 9,
        b"GGUF" + bytes(200),
        b"GGUF\3\0\0\0" + bytes(16),
        b"GGUF\3\0\0\0" + b"\xff" * 16,
        b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\5" + bytes(7) + b"cut",
    ],
    ids=["empty", "text", "version 0", "nothing in it", "absurd sizes", "cut"],
)
def test_a_gguf_file_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path: Path, own_cache: Path, content: bytes):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(SitelensError, match=r"bad\.gguf could not be read as a GGUF language model"):
        load_model(tmp_path / "bad.gguf")
    assert [name for name in files(own_cache / "models") if not name.endswith(".lock")] == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float):
    file = gguf_files.write(tmp_path / "cut.gguf", gguf_files.network("llama"))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(SitelensError, match=r"cut\.gguf could not be read as a GGUF language model"):
        load_model(file)


# Converted once


class Conversions:
    """Counts conversions per file, and can slow them down or make them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.read: list[str] = []
        self.cache = cache / "models"
        self.seconds = 0.0
        real = conversion._convert

        def convert(parts: tuple[Path, ...], work: Path, sha256: str) -> Path:
            self.read.append(parts[0].name)
            time.sleep(self.seconds)
            return real(parts, work, sha256)

        monkeypatch.setattr(conversion, "_convert", convert)

    def folders(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if not path.name.endswith(".lock")]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Conversions:
    return Conversions(monkeypatch, own_cache)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_files.write(file, gguf_files.network("llama")).read_bytes()


@pytest.fixture
def gguf(tmp_path: Path, model_bytes: bytes) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model_bytes)
    return path


@pytest.fixture(scope="module")
def converted_bytes(model_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the file is converted to."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "tiny.gguf").write_bytes(model_bytes)
    with settings.using(cache_dir=folder):
        return gguf_folder(folder / "tiny.gguf")


@pytest.fixture
def whole(converted_bytes: Path, own_cache: Path) -> Path:
    """The converted model in the test's own cache."""
    target = own_cache / "models" / converted_bytes.name
    shutil.copytree(converted_bytes, target)
    return target


def test_a_gguf_file_is_converted_once_and_loads_as_it_was(reader: Conversions, gguf: Path, tmp_path: Path):
    same = tmp_path / "copy.gguf"
    shutil.copy(gguf, same)
    for path in (gguf, gguf, same):
        bridge = load_model(path)
        torch.testing.assert_close(bridge(TOKENS, return_type="logits"), logits(gguf_files.network("llama")))
        assert Model.of(bridge).tokenizer("Q: hot") == gguf_files.tokenizer()("Q: hot")
    assert reader.read == ["tiny.gguf"]
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert [folder.name for folder in reader.folders()] == [f"gguf-{sha256[:16]}"]


def test_another_gguf_file_is_converted_for_itself(reader: Conversions, gguf: Path):
    load_model(gguf)
    gguf_files.write(gguf, gguf_files.network("llama", seed=1))
    load_model(gguf)
    assert len(reader.read) == len(reader.folders()) == 2


def test_what_an_older_converter_wrote_is_made_anew_but_for_packaged_models(
    reader: Conversions, gguf: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = gguf_folder(gguf)
    content = json.loads((folder / "sitelens.json").read_text())
    del content["converter"]
    (folder / "sitelens.json").write_text(json.dumps(content))
    with monkeypatch.context() as packaged:
        packaged.setattr(conversion, "FIRST_EDITION", {content["gguf_sha256"]})
        assert gguf_folder(gguf) == folder and len(reader.read) == 1
    assert gguf_folder(gguf) == folder and len(reader.read) == 2  # without a warning: nothing is damaged


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def manifest(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "sitelens.json").write_text(text)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "changed weights": lambda folder: flip(folder / "model.safetensors"),
    "changed config": lambda folder: flip(folder / "config.json"),
    "cut weights": cut_weights,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no manifest": lambda folder: (folder / "sitelens.json").unlink(),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}
MANIFESTS = ("", "{", "{}", "[]", "null", '{"files": {}}', '{"files": []}', '{"files": {"config.json": 1}}')


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_says_nothing_makes_no_whole_model(tmp_path: Path, text: str):
    manifest(text)(tmp_path)
    assert not conversion.is_whole(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_conversion_is_noticed_and_made_anew(
    reader: Conversions, whole: Path, gguf: Path, damage: Callable[[Path], Any]
):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    damage(whole)
    with pytest.warns(SitelensWarning, match=f"{whole.name} is damaged; the model is .*converted again"):
        assert gguf_folder(gguf) == whole
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert gguf_folder(gguf) == whole  # no warning
    assert len(reader.read) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(
    reader: Conversions, gguf: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def interrupted(_: Any, folder: Path, **__: Any) -> None:
        (Path(folder) / "vocab.json").write_text("half")
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises((error, SitelensError)):
            load_model(gguf)
    assert reader.folders() == []
    load_model(gguf)  # no warning
    assert len(reader.read) == 2


def test_threads_that_load_at_once_convert_once(reader: Conversions, gguf: Path):
    reader.seconds = 0.2
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf_folder(gguf))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reader.read) == 1 and found == reader.folders() * 4


# Unreadable files are not treated as damaged; failed writes lose nothing


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: int) -> list[str]:
    """From now on, files with this name cannot be opened for reading. Returns the list of failed attempts."""
    real, asked = builtins.open, []

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if Path(str(file)).name == name and "r" in mode:
            asked.append(str(file))
            raise OSError(error, os.strerror(error), str(file))
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opened)
    return asked


@pytest.mark.parametrize("name", ["sitelens.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_model_that_cannot_be_read_is_left_as_it_is(
    reader: Conversions, whole: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
):
    folder = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as broken:
        assert failing(broken, name, error) == []
        with pytest.raises(SitelensError, match=f"{name} cannot be read: {os.strerror(error)}.*left unchanged"):
            gguf_folder(gguf)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert gguf_folder(gguf) == folder and reader.read == []


def test_one_stale_handle_is_nothing(reader: Conversions, whole: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch):
    folder, real, first = whole, builtins.open, []

    def opened(file: Any, *arguments: Any, **options: Any) -> Any:
        if Path(str(file)).name == "sitelens.json" and not first:
            first.append(file)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opened)
    assert gguf_folder(gguf) == folder and first and reader.read == []


def test_a_folder_where_a_file_was_is_not_removed(whole: Path, gguf: Path):
    folder = whole
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(SitelensError, match=r"model\.safetensors cannot be read: it is a folder, not a file"):
        gguf_folder(gguf)
    assert (folder / "config.json").exists()


def test_a_damaged_model_stays_until_the_new_one_is_whole(
    reader: Conversions, whole: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = whole
    flip(folder / "model.safetensors")

    def refuses(*_: Any) -> None:
        raise SitelensError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(conversion, "_convert", refuses)
        with pytest.warns(SitelensWarning, match="damaged"), pytest.raises(SitelensError, match="no network"):
            gguf_folder(gguf)
    assert (folder / "model.safetensors").exists()
    assert reader.folders() == [folder]


@pytest.mark.parametrize("step", ["rename", "mkdir"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_costs_no_model(
    reader: Conversions, gguf: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: int
):
    def refuses(*arguments: Any, **options: Any) -> None:
        place = str(arguments[-1] if step == "rename" else arguments[0])
        if str(reader.cache) in place:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    monkeypatch.setattr(conversion, "_elsewhere", {})
    owner = os if step == "rename" else Path
    real = getattr(owner, step)
    monkeypatch.setattr(owner, step, refuses)
    with pytest.warns(
        SitelensWarning, match=rf"models cannot be written \({os.strerror(error)}\): tiny\.gguf was conv"
    ):
        folder = gguf_folder(gguf)
    assert reader.cache not in folder.parents and conversion.is_whole(folder)
    n = len(reader.read)
    assert gguf_folder(gguf) == folder and len(reader.read) == n  # kept for this process, with one warning


def test_a_whole_model_needs_no_lock(whole: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "locked", None)
    assert gguf_folder(gguf) == whole


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_model_is_converted_all_the_same(gguf: Path, monkeypatch: pytest.MonkeyPatch, error: int):
    def refuses(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    lock = conversion.folder_of(hashlib.sha256(gguf.read_bytes()).hexdigest()).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))  # left by an earlier process
    monkeypatch.setattr(fcntl, "flock", refuses)
    assert conversion.is_whole(gguf_folder(gguf))


def test_waiting_for_a_lock_is_said_and_ends(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(folders, "REPORT_AFTER", 0.05)
    monkeypatch.setattr(folders, "GIVE_UP_AFTER", 0.3)
    lock = conversion.folder_of(hashlib.sha256(gguf.read_bytes()).hexdigest()).with_suffix(".lock")
    with (
        folders.locked(lock, "converting it"),
        pytest.raises(SitelensError, match=f"process {os.getpid()}.*{lock.name}"),
    ):
        gguf_folder(gguf)
    assert f"waiting for another process (process {os.getpid()}" in capsys.readouterr().err
    assert conversion.is_whole(gguf_folder(gguf))


def test_what_killed_conversions_left_is_swept_and_live_work_is_not(reader: Conversions, gguf: Path):
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    left = [reader.cache / f"{folders.WORK}killed", reader.cache / f"gguf-{sha256[:16]}.abc.tmp"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    with folders.work_folder(reader.cache) as live:
        whole = gguf_folder(gguf)
        assert sorted(reader.folders()) == sorted([live, whole])
    assert reader.folders() == [whole]


def test_permissions_follow_the_umask(reader: Conversions, gguf: Path):
    before = os.umask(0o002)
    try:
        folder = gguf_folder(gguf)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o664"}
    assert {oct(path.stat().st_mode & 0o777) for path in (folder, reader.cache)} == {"0o775"}
    assert oct(folder.with_suffix(".lock").stat().st_mode & 0o777) == "0o664"


@pytest.mark.parametrize("there", [True, False], ids=["a link", "a dangling link"])
def test_a_cache_behind_a_link_works(reader: Conversions, gguf: Path, tmp_path: Path, there: bool):
    target = tmp_path / "disk"
    if there:
        target.mkdir()
    reader.cache.parent.mkdir()
    reader.cache.symlink_to(target)
    assert conversion.is_whole(gguf_folder(gguf))
    assert reader.cache.is_symlink() and len(list(target.glob("gguf-*[0-9a-f]"))) == 1


@pytest.mark.parametrize("damaged", [True, False])
def test_a_model_that_is_a_link_is_used_and_its_target_never_removed(
    reader: Conversions, gguf: Path, tmp_path: Path, damaged: bool
):
    folder = gguf_folder(gguf)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert gguf_folder(gguf) == folder and len(reader.read) == 1
    if damaged:
        flip(tmp_path / "elsewhere" / "model.safetensors")
        with pytest.warns(SitelensWarning, match="damaged"):
            assert gguf_folder(gguf) == folder
    else:
        shutil.rmtree(tmp_path / "elsewhere")  # the link is dangling
        assert gguf_folder(gguf) == folder
    assert conversion.is_whole(folder) and (tmp_path / "elsewhere").exists() is damaged


# Packaged models


@pytest.fixture
def parts(model_bytes: bytes) -> tuple[bytes, bytes]:
    half = len(model_bytes) // 2
    return model_bytes[:half], model_bytes[half:]


TINY = PackagedModel(
    parts=(("sitelens-tiny-a==1.0", "sitelens_tiny_a", "d/a"), ("sitelens-tiny-b==1.0", "sitelens_tiny_b", "d/b")),
    sha256="", layers=2, heads=4, kv_heads=1, d_head=8, parameters=1, license="MIT",
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, reader: Conversions, model_bytes: bytes) -> Conversions:
    """A packaged model in two parts, neither of which is installed."""
    spec = dataclasses.replace(TINY, sha256=hashlib.sha256(model_bytes).hexdigest())
    monkeypatch.setitem(PACKAGED, "tiny", spec)
    return reader


def install(folder: Path, parts: tuple[bytes, ...]) -> None:
    for (_, module, file), content in zip(TINY.parts, parts, strict=True):
        path = folder / module / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        (folder / module / "__init__.py").touch()


def write_wheels(folder: Path, parts: tuple[bytes, ...]) -> None:
    folder.mkdir(exist_ok=True)
    for (requirement, module, file), content in zip(TINY.parts, parts, strict=True):
        name = requirement.partition("=")[0].replace("-", "_")
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "")
            wheel.writestr(f"{module}/{file}", content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


class Pip:
    """A replacement for pip that copies wheels from a folder, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wheels: Path | None = None, error: str = "") -> None:
        self.asked: list[str] = []
        self._wheels, self._error = wheels, error
        monkeypatch.setattr(subprocess, "run", self._run)
        if importlib.util.find_spec("pip") is None:
            real = importlib.util.find_spec
            found = importlib.util.find_spec("json")
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "pip" else real(name))

    def _run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        requirement, target = command[-1], Path(command[command.index("--dest") + 1])
        self.asked.append(requirement)
        if self._wheels is not None and not self._error:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(next(self._wheels.glob(f"{requirement.partition('=')[0].replace('-', '_')}-*.whl")), target)
        return subprocess.CompletedProcess(command, 1 if self._error else 0, "", self._error)


def test_installed_packages_are_joined_in_order(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    pip = Pip(monkeypatch)
    install(tmp_path / "site", parts)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert load_model("tiny").cfg.n_layers == 2
    assert packaged_folder("tiny") in tiny.folders()
    assert tiny.read == ["tiny.gguf"] and pip.asked == []


def test_packages_that_are_not_installed_are_downloaded_once(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    write_wheels(tmp_path / "wheels", parts)
    pip = Pip(monkeypatch, tmp_path / "wheels")
    for _ in range(2):
        assert packaged_folder("tiny") in tiny.folders()
    assert pip.asked == ["sitelens-tiny-a==1.0", "sitelens-tiny-b==1.0"]
    assert len(tiny.folders()) == 1  # wheels and parts are removed


@pytest.mark.slow
def test_pip_itself_finds_the_wheels(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here")
    write_wheels(tmp_path / "wheels", parts)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert packaged_folder("tiny") in tiny.folders()


def test_an_installed_package_of_another_version_is_not_used(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    install(tmp_path / "site", (parts[0], b"another second half"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    write_wheels(tmp_path / "wheels", parts)
    pip = Pip(monkeypatch, tmp_path / "wheels")
    with pytest.warns(SitelensWarning, match="installed file of tiny is not the expected one"):
        packaged_folder("tiny")
    assert len(pip.asked) == 2 and tiny.read == ["tiny.gguf"]


def test_a_download_of_another_content_is_refused_and_leaves_nothing(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    write_wheels(tmp_path / "wheels", (parts[1], parts[0]))
    Pip(monkeypatch, tmp_path / "wheels")
    found = hashlib.sha256(parts[1] + parts[0]).hexdigest()
    with pytest.raises(
        SitelensError, match=f"file of tiny is not the expected one: SHA-256 {found}, .*{PACKAGED['tiny'].sha256}"
    ):
        load_model("tiny")
    assert tiny.folders() == [] and tiny.read == []


@pytest.mark.parametrize(
    ("error", "reason"), [("ERROR: x\nERROR: No matching", "ERROR: No matching"), ("", "no wheel")]
)
def test_a_failing_download_gives_pip_s_reason_and_a_command(
    tiny: Conversions, monkeypatch: pytest.MonkeyPatch, error: str, reason: str
):
    Pip(monkeypatch, error=error)
    with pytest.raises(
        SitelensError, match=f"pip could not download sitelens-tiny-a==1.0: {reason}.*uv pip install .*sitelens-tiny-b"
    ):
        load_model("tiny")
    assert tiny.folders() == []


def test_without_pip_the_message_has_the_command(tiny: Conversions, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(
        SitelensError,
        match=r"tiny comes in .*pip is not installed: .*"
        r"`uv pip install --no-deps sitelens-tiny-a==1\.0 sitelens-tiny-b==1\.0`",
    ):
        load_model("tiny")
    assert tiny.folders() == []


def test_list_models_says_what_is_cached(
    tiny: Conversions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, bytes]
):
    assert list_models().set_index("name")["cached"][list(PACKAGED)].to_dict() == dict.fromkeys(PACKAGED, False)
    install(tmp_path / "site", parts)
    monkeypatch.syspath_prepend(tmp_path / "site")
    packaged_folder("tiny")
    row = list_models().set_index("name").loc["tiny"].to_dict()
    assert row["cached"]
    assert row["download_command"] == "pip install --no-deps sitelens-tiny-a==1.0 sitelens-tiny-b==1.0"
    assert [row[name] for name in ("layers", "heads", "d_head", "license")] == [2, 4, 8, "MIT"]
    assert len(tiny.read) == 1


def test_packaged_models_are_pinned():
    for spec in PACKAGED.values():
        assert len(spec.sha256) == 64
        assert all("==" in requirement for requirement, _, _ in spec.parts)
        assert dataclasses.is_dataclass(spec) and spec.license
