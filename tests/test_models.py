"""Models: fingerprints, tokenizers, what can be loaded, what is refused, and the conversion of GGUF files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sitelens import conversion, fingerprints, list_models, models
from sitelens.conversion import PACKAGED, PackagedModel, packaged_folder
from sitelens.defaults import SitelensError, SitelensWarning, settings
from sitelens.embedding import embed_task
from sitelens.fingerprints import fingerprint
from sitelens.models import _tokenizers, check_fit, load_model, own_tokenizer, resolve_model, tokenization
from tests import micro

TOKENS = torch.arange(20, 60)[None]
ROOT = Path(__file__).parents[1]


def saved(folder: Path, family: str = "Llama", seed: int = 0, bos: bool = False) -> Path:
    micro.raw(family, seed=seed).save_pretrained(folder)
    micro.tokenizer(bos).save_pretrained(folder)
    return folder


def bare_bridge(tokenizer: Any = None) -> models.Model:
    """A bridge as a user boots it, without sitelens."""
    network = micro.raw("Llama")
    bridge = build_bridge_from_module(network, type(network).__name__, hf_config=network.config, model_name="bare")
    bridge.tokenizer = tokenizer
    return bridge


def hub_with(home: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A hub cache in which a tiny GPT-2 lies under each of these names."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    for name in names:
        snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        saved(snapshot, "GPT2")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return home / "hub"


def with_code(folder: Path, mark: Path) -> None:
    """Let a model folder bring Python code for its configuration, model and tokenizer that leaves a mark when run."""
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as Own, LlamaForCausalLM as Net\n"
    (folder / "own.py").write_text(code)
    for name, auto in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Net"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Tok", "own.Tok"]}),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = auto
        content |= {"model_type": "unheard-of"} if name == "config.json" else {"tokenizer_class": "Unheard"}
        (folder / name).write_text(json.dumps(content))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Fingerprints


def test_the_same_weights_have_the_same_fingerprint(family: str):
    assert fingerprint(micro.bridge(family)) == fingerprint(micro.bridge(family))


def test_other_weights_or_families_have_other_fingerprints():
    bridges = [micro.bridge("Llama"), micro.bridge("Llama", seed=1), micro.bridge("Mistral"), micro.bridge("Qwen3")]
    assert len({fingerprint(bridge) for bridge in bridges}) == 4


def test_what_is_kept_hangs_on_the_tokenizer_too():
    task = micro.task()
    plain, prepending = (micro.bridge("Llama", bos=bos) for bos in (False, True))
    assert fingerprint(plain) == fingerprint(prepending)
    kept = [embed_task(task, model, n_prompts=2, n_shots=2).mean_z for model in (plain, prepending)]
    with settings.using(cache_dir=settings.cache() / "another"):
        afresh = embed_task(task, prepending, n_prompts=2, n_shots=2).mean_z
    assert torch.equal(kept[1], afresh) and not torch.equal(*kept)


def test_a_tokenizer_is_known_by_its_rules_and_template_and_not_by_how_it_was_called_last():
    first, same, prepending = (micro.bridge("Llama", bos=bos) for bos in (False, False, True))
    known = tokenization(first)
    assert tokenization(same) == known != tokenization(prepending)
    own_tokenizer(first)(["aa", "aa bb"], padding=True, truncation=True, max_length=8)
    assert tokenization(first) == known
    assert own_tokenizer(first).backend_tokenizer.padding is not None  # it is left as it was
    chatty = copy.deepcopy(own_tokenizer(same))
    chatty.chat_template = "{{ messages[0].content }}"
    _tokenizers[same] = same.tokenizer, chatty
    assert tokenization(same) != known
    own = own_tokenizer(first)
    own.add_tokens(["zz"])  # in place
    larger = tokenization(first)
    own.backend_tokenizer.post_processor = own_tokenizer(prepending).backend_tokenizer.post_processor
    assert len({known, larger, tokenization(first)}) == 3


def test_a_fingerprint_is_the_same_in_another_process():
    code = "from tests import micro; from sitelens import fingerprint; print(fingerprint(micro.bridge('Llama')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == fingerprint(micro.bridge("Llama"))


def test_every_edit_in_place_changes_the_fingerprint_and_undoing_it_restores_it(family: str):
    bridge = micro.bridge(family)
    before = fingerprint(bridge)
    for name, weight in bridge.named_parameters():
        old = weight.detach().clone()
        with torch.no_grad():
            weight[(-1,) * weight.ndim] += 1  # a single element
            assert fingerprint(bridge) != before, name
            weight.copy_(old)
        assert fingerprint(bridge) == before, name


def test_every_dense_edit_through_data_changes_the_fingerprint():
    bridge = micro.bridge("GPT2")
    before = fingerprint(bridge)
    for name, weight in bridge.named_parameters():
        old = weight.detach().clone()
        weight.data.mul_(1.5).add_(0.01)
        assert fingerprint(bridge) != before, name
        weight.data.copy_(old)


def test_a_replaced_parameter_changes_the_fingerprint():
    bridge = micro.bridge("Llama")
    before = fingerprint(bridge)
    head = bridge.original_model.get_output_embeddings()
    weight = head.weight if isinstance(head.weight, torch.nn.Parameter) else next(head.parameters())
    weight.data = weight.data + 1
    assert fingerprint(bridge) != before


def test_the_dtype_changes_the_fingerprint():
    kinds = [torch.float32, torch.float64, torch.bfloat16]
    assert len({fingerprint(micro.bridge("Llama", dtype=kind)) for kind in kinds}) == 3


def test_the_sliding_window_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch):
    before = fingerprint(micro.bridge("Mistral"))
    monkeypatch.setitem(micro._FAMILIES["Mistral"][1], "sliding_window", micro.WINDOW // 2)
    micro._network.cache_clear()
    after = fingerprint(micro.bridge("Mistral"))
    micro._network.cache_clear()
    assert after != before


def test_a_sliding_window_set_later_changes_the_fingerprint():
    bridge = micro.bridge("Mistral")
    before, logits = fingerprint(bridge), bridge(TOKENS)
    bridge.original_model.config.sliding_window = micro.WINDOW // 2
    assert not torch.equal(bridge(TOKENS), logits)
    assert fingerprint(bridge) != before


def test_what_is_not_computed_with_does_not_change_the_fingerprint():
    bridge = micro.bridge("Llama")
    before = fingerprint(bridge)
    bridge.cfg.model_name = "other"
    bridge.tokenizer = None
    bridge.requires_grad_(True)
    assert fingerprint(bridge) == before


def test_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch):
    bridge = micro.bridge("Llama")
    first = fingerprint(bridge)

    def fail(_: torch.Tensor) -> list[Any]:
        raise AssertionError("hashed again")

    monkeypatch.setattr(fingerprints, "_tensor_digest", fail)
    bridge(TOKENS)
    assert fingerprint(bridge) == first
    with torch.no_grad():
        next(bridge.parameters()).add_(1)
    with pytest.raises(AssertionError, match="hashed again"):
        fingerprint(bridge)


def test_weights_made_in_inference_mode_have_their_fingerprint():
    with torch.inference_mode():
        bridge = micro.bridge("Llama", seed=3)
        inside = fingerprint(bridge)
    assert fingerprint(bridge) == inside == fingerprint(micro.bridge("Llama", seed=3))


# Tokenizers


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizer_of_a_loaded_model_keeps_its_habit_of_bos(tmp_path: Path, bos: bool):
    folder = saved(tmp_path / "model", bos=bos)
    theirs = TransformerBridge.boot_transformers(str(folder))
    assert theirs.tokenizer("ab")["input_ids"][0] == 1  # TransformerLens adds one in any case
    with contextlib.nullcontext() if bos else pytest.warns(SitelensWarning, match="begins each text with '<bos>'"):
        own_tokenizer(theirs)
    for bridge in (load_model(folder), theirs):  # said once
        assert own_tokenizer(bridge)("ab")["input_ids"] == [1] * bos + micro.tokenizer()("ab")["input_ids"]
    assert load_model(folder).cfg.default_prepend_bos is bos
    assert theirs.tokenizer("ab")["input_ids"][0] == 1  # and the user's own is left as it was


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_bridge_booted_by_a_hub_id_of_any_form_keeps_the_model_s_habit_of_bos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    hub = hub_with(tmp_path, monkeypatch, name)
    bridge = TransformerBridge.boot_transformers(name, device="cpu")
    assert bridge.tokenizer.name_or_path == name and bridge.tokenizer("ab")["input_ids"][0] == 1
    with pytest.warns(SitelensWarning, match=f"tokenizer of the bridge {name} differs from its files"):
        assert own_tokenizer(bridge)("ab")["input_ids"] == micro.tokenizer()("ab")["input_ids"]
    assert hub.is_dir()


def test_what_a_user_edits_in_her_bridge_s_tokenizer_counts_and_is_said(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model")))
    bridge.tokenizer.add_tokens(["[ANS]"])
    bridge.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    bridge.tokenizer.eos_token = "<unk>"
    said = r"its 1 more tokens \('\[ANS\]'\), eos token, chat template are not theirs: the bridge's own counts"
    with pytest.warns(SitelensWarning, match=said):
        own = own_tokenizer(bridge)
    assert own("ab[ANS]")["input_ids"] == [*micro.tokenizer()("ab")["input_ids"], len(own) - 1]
    assert own.chat_template == bridge.tokenizer.chat_template and own.eos_token == "<unk>"


def test_what_a_user_edits_later_counts_too(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model")))
    with pytest.warns(SitelensWarning, match="leaves that out"):
        first = own_tokenizer(bridge)
    assert own_tokenizer(bridge) is first
    bridge.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.warns(SitelensWarning, match="chat template is not theirs"):
        assert own_tokenizer(bridge).chat_template == "{{ messages[0].content }}"


def test_a_bos_that_the_user_takes_away_stays_away(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model", bos=True)))
    bridge.tokenizer.add_bos_token = False
    assert own_tokenizer(bridge) is bridge.tokenizer
    assert own_tokenizer(bridge)("ab")["input_ids"] == micro.tokenizer()("ab")["input_ids"]


def test_a_tokenizer_without_files_is_used_as_it_is():
    tokenizer = micro.tokenizer()
    assert own_tokenizer(bare_bridge(tokenizer)) is tokenizer


def test_a_tokenizer_whose_files_are_gone_is_used_as_it_is_with_a_warning(tmp_path: Path):
    folder = saved(tmp_path / "model")
    bridge = TransformerBridge.boot_transformers(str(folder))
    shutil.rmtree(folder)
    with pytest.warns(SitelensWarning, match="could not be loaded anew from .*may add a BOS token"):
        assert own_tokenizer(bridge) is bridge.tokenizer


def test_code_beside_a_tokenizer_is_not_run_when_it_is_loaded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "model")
    bridge = TransformerBridge.boot_transformers(str(folder))
    with_code(folder, tmp_path / "mark")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.warns(SitelensWarning):
        own_tokenizer(bridge)
    assert not (tmp_path / "mark").exists()


def test_a_model_without_tokenizer_is_refused_until_it_has_one(tmp_path: Path):
    bridge = bare_bridge()
    with pytest.raises(SitelensError, match=r"bare has no tokenizer: set model\.tokenizer"):
        own_tokenizer(bridge)
    bridge.tokenizer = transformers.AutoTokenizer.from_pretrained(saved(tmp_path / "model"))
    assert len(own_tokenizer(bridge)) == len(micro.tokenizer())


def test_a_tokenizer_set_later_is_the_one_used(tmp_path: Path):
    bridge = load_model(saved(tmp_path / "model"))
    before = len(own_tokenizer(bridge))
    larger = micro.tokenizer()
    larger.add_tokens(["zzz"])
    larger.save_pretrained(tmp_path / "larger")
    bridge.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "larger")
    with pytest.warns(SitelensWarning, match="begins each text with"):
        assert len(own_tokenizer(bridge)) == before + 1


# Loading


def test_a_folder_loads_with_the_same_logits_and_fingerprint_as_a_bridge_of_the_user(tmp_path: Path, family: str):
    folder = saved(tmp_path / "model", family)
    ours = load_model(folder)
    theirs = TransformerBridge.boot_transformers(str(folder))
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert torch.allclose(ours(TOKENS), micro.raw(family)(TOKENS).logits, atol=1e-4)
    assert fingerprint(ours) == fingerprint(theirs) == fingerprint(micro.bridge(family))


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tmp_path: Path):
    bridge = load_model(str(saved(tmp_path / "model", "GPT2")))
    assert not any(weight.requires_grad for weight in bridge.parameters())
    assert not bridge.original_model.training
    assert models.head_shape(bridge) == (2, 4, 8)
    assert models.context_length(bridge) == 256
    assert models.model_name(bridge) == str(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_may_be_chosen(tmp_path: Path, dtype: Any):
    folder = saved(tmp_path / "model")
    assert next(load_model(folder).parameters()).dtype == torch.float32
    assert next(load_model(folder, dtype=dtype).parameters()).dtype == torch.bfloat16


def test_a_bridge_is_returned_as_it_is():
    bridge = micro.bridge("Llama")
    assert load_model(bridge) is bridge and resolve_model(bridge) is bridge


def test_a_name_is_resolved_by_loading(tmp_path: Path):
    folder = saved(tmp_path / "model")
    assert fingerprint(resolve_model(folder)) == fingerprint(micro.bridge("Llama"))


@pytest.mark.parametrize(
    ("name", "near"),
    [("smollm2", "smollm2-135m"), ("SmolLM2-135M", "smollm2-135m"), ("gemma3-27m", "gemma3-270m"), ("xyz", "")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str):
    with pytest.raises(SitelensError, match=f"unknown model '{name}': did you mean {near}.*hub id.*folder"):
        load_model(name)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at-all", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name: str):
    with pytest.raises(SitelensError, match=f"unknown model '{name}'"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("owner/none", "hf download owner/none"),
        ("a b/c", "hf download a b/c"),
        ("meta-llama/Llama-3.1-8B", "hf auth login && hf download meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_hub_model_that_cannot_be_had_says_what_to_do(name: str, command: str):
    with pytest.raises(
        SitelensError,
        match=f"model '{name}' could not be loaded: .*`{re.escape(command)} .*licence.*local folder.*smollm2-135m",
    ):
        load_model(name)


def test_an_unknown_dtype_is_refused(tmp_path: Path):
    for dtype in ("float33", "nn"):
        with pytest.raises(SitelensError, match=f"unknown dtype '{dtype}'; write for example 'float32'"):
            load_model(tmp_path, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str):
    with pytest.raises(SitelensError, match=rf"(?i)model'? could not be loaded.*{device[:4]}"):
        load_model(saved(tmp_path / "model"), device=device)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").write_text("rubbish"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
        cut_weights,
        edit_config(model_type="nonsense"),
        edit_config(hidden_size=64),
        edit_config(num_hidden_layers=3),  # a layer of it would be random
    ],
    ids=[
        "no config", "config no JSON", "empty config", "no weights", "empty weights", "tokenizer no JSON",
        "empty tokenizer", "empty folder", "truncated weights", "unknown type", "other shape", "missing layer",
    ],
)  # fmt: skip
def test_a_folder_that_is_no_whole_model_is_refused(tmp_path: Path, damage: Callable[[Path], Any]):
    folder = saved(tmp_path / "model")
    damage(folder)
    with pytest.raises(SitelensError, match=r"model'? could not be loaded"):
        load_model(folder)


def test_an_architecture_without_a_bridge_is_refused(tmp_path: Path):
    sizes = {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2}
    config = transformers.CTRLConfig(vocab_size=len(micro.tokenizer()), **sizes)
    transformers.CTRLLMHeadModel(config).save_pretrained(tmp_path)
    micro.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SitelensError, match="CTRL"):
        load_model(tmp_path)


def test_a_model_without_heads_is_refused(tmp_path: Path):
    config = transformers.MambaConfig(vocab_size=len(micro.tokenizer()), hidden_size=16, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    micro.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SitelensError, match=r"has no hook point blocks\.0\.attn\.hook_z: its heads cannot be patched"):
        load_model(tmp_path)


def test_a_model_in_training_mode_is_refused():
    bridge = micro.bridge("Llama")
    bridge.train()
    with pytest.raises(SitelensError, match=r"Llama is in training mode.*call model\.eval\(\)"):
        resolve_model(bridge)
    assert resolve_model(bridge.eval()) is bridge


# Whether an artifact fits a model


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 8)])
def test_what_was_made_with_the_model_fits(shape: tuple[int, ...]):
    bridge = micro.bridge("Llama")
    check_fit("the selection", fingerprint(bridge), shape, bridge)
    check_fit("the selection", None, shape, bridge)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4), r"the selection has shape \(3, 4\) \(layers, heads\), Llama has \(2, 4\)"),
        ((4, 2), r"\(4, 2\) \(layers, heads\), Llama has \(2, 4\)"),
        ((2, 4, 9), r"\(2, 4, 9\) \(layers, heads, d_head\), Llama has \(2, 4, 8\)"),
    ],
)
def test_another_shape_is_refused(shape: tuple[int, ...], message: str):
    with pytest.raises(SitelensError, match=message):
        check_fit("the selection", None, shape, micro.bridge("Llama"))


def test_another_model_of_the_same_shape_is_refused():
    bridge, other = micro.bridge("Llama"), micro.bridge("Llama", seed=1)
    made, here = fingerprint(other)[:12], fingerprint(bridge)[:12]
    with pytest.raises(SitelensError, match=rf"embedding was made with another model .*{made}.*{here}.*model=None"):
        check_fit("the embedding", fingerprint(other), (2, 4), bridge)


# GGUF files


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


class Reader:
    """Stands in for transformers' reading of GGUF files: all of them hold the micro model. Counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.read: list[str] = []
        self.cache = cache / "models"
        self.seconds = 0.0
        self._divert(monkeypatch, transformers.AutoModelForCausalLM, lambda: micro.raw("Llama"))
        self._divert(monkeypatch, transformers.AutoTokenizer, micro.tokenizer)

    def _divert(self, monkeypatch: pytest.MonkeyPatch, auto: Any, make: Callable[[], Any]) -> None:
        real = auto.from_pretrained

        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            if "gguf_file" not in options:
                return real(*arguments, **options)
            if auto is transformers.AutoModelForCausalLM:
                self.read.append(options["gguf_file"])
                time.sleep(self.seconds)
            return make()

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    def folders(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if not path.name.endswith(".lock")]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Reader:
    return Reader(monkeypatch, own_cache)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"a model")
    return path


def test_a_gguf_file_is_converted_once_and_loads_as_it_was(reader: Reader, gguf: Path, tmp_path: Path):
    same = tmp_path / "copy.gguf"
    shutil.copy(gguf, same)
    for path in (gguf, gguf, same):
        bridge = load_model(path)
        assert fingerprint(bridge) == fingerprint(micro.bridge("Llama"))
        assert own_tokenizer(bridge)("ab") == micro.tokenizer()("ab")
    assert reader.read == ["tiny.gguf"]
    assert [folder.name for folder in reader.folders()] == [f"gguf-{hashlib.sha256(b'a model').hexdigest()[:16]}"]


def test_another_gguf_file_is_converted_for_itself(reader: Reader, gguf: Path):
    load_model(gguf)
    gguf.write_bytes(b"another model")
    load_model(gguf)
    assert len(reader.read) == len(reader.folders()) == 2


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
    **{
        f"manifest {text!r}": manifest(text)
        for text in ("", "{", "{}", "[]", "null", '{"files": {}}', '{"files": []}', '{"files": {"config.json": 1}}')
    },
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_conversion_is_noticed_and_made_anew(reader: Reader, gguf: Path, damage: Callable[[Path], Any]):
    folder = conversion.gguf_folder(gguf)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    with pytest.warns(SitelensWarning, match=f"{folder.name} is damaged; the model is .*converted anew"):
        assert conversion.gguf_folder(gguf) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert conversion.gguf_folder(gguf) == folder  # no warning
    assert len(reader.read) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(
    reader: Reader, gguf: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def interrupted(_: Any, folder: Path, **__: Any) -> None:
        (Path(folder) / "vocab.json").write_text("half")
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(error):
            load_model(gguf)
    assert reader.folders() == []
    load_model(gguf)  # no warning
    assert len(reader.read) == 2


def test_threads_that_load_at_once_convert_once(reader: Reader, gguf: Path):
    reader.seconds = 0.2
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(conversion.gguf_folder(gguf))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reader.read) == 1 and found == reader.folders() * 4


# Packaged models

PARTS = (b"first half of a model, ", b"second half")
TINY = PackagedModel(
    parts=(("sitelens-tiny-a==1.0", "sitelens_tiny_a", "d/a"), ("sitelens-tiny-b==1.0", "sitelens_tiny_b", "d/b")),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    layers=2, heads=4, kv_heads=1, d_head=8, parameters=1, licence="MIT",
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> Reader:
    """A packaged model of two parts, neither installed."""
    monkeypatch.setitem(PACKAGED, "tiny", TINY)
    return reader


def install(folder: Path, parts: tuple[bytes, ...] = PARTS) -> None:
    for (_, module, file), content in zip(TINY.parts, parts, strict=True):
        path = folder / module / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        (folder / module / "__init__.py").touch()


def write_wheels(folder: Path, parts: tuple[bytes, ...] = PARTS) -> None:
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
    """Stands in for pip: hands out wheels from a folder, or fails."""

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


def test_installed_packages_are_joined_in_order(tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = Pip(monkeypatch)
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fingerprint(load_model("tiny")) == fingerprint(micro.bridge("Llama"))
    assert packaged_folder("tiny") in tiny.folders()
    assert tiny.read == ["tiny.gguf"] and pip.asked == []


def test_packages_that_are_not_installed_are_downloaded_once(
    tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_wheels(tmp_path / "wheels")
    pip = Pip(monkeypatch, tmp_path / "wheels")
    for _ in range(2):
        assert packaged_folder("tiny") in tiny.folders()
    assert pip.asked == ["sitelens-tiny-a==1.0", "sitelens-tiny-b==1.0"]
    assert len(tiny.folders()) == 1  # wheels and parts are gone


def test_pip_itself_finds_the_wheels(tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here")
    write_wheels(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert packaged_folder("tiny") in tiny.folders()


def test_an_installed_package_of_another_version_is_not_used(
    tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path / "site", (PARTS[0], b"another second half"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    write_wheels(tmp_path / "wheels")
    pip = Pip(monkeypatch, tmp_path / "wheels")
    with pytest.warns(SitelensWarning, match="installed file of tiny is not the expected one"):
        packaged_folder("tiny")
    assert len(pip.asked) == 2 and tiny.read == ["tiny.gguf"]


def test_a_download_of_another_content_is_refused_and_leaves_nothing(
    tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_wheels(tmp_path / "wheels", (PARTS[1], PARTS[0]))
    Pip(monkeypatch, tmp_path / "wheels")
    found = hashlib.sha256(PARTS[1] + PARTS[0]).hexdigest()
    with pytest.raises(SitelensError, match=f"file of tiny is not the expected one: SHA-256 {found}, .*{TINY.sha256}"):
        load_model("tiny")
    assert tiny.folders() == [] and tiny.read == []


@pytest.mark.parametrize(
    ("error", "reason"), [("ERROR: x\nERROR: No matching", "ERROR: No matching"), ("", "no wheel")]
)
def test_a_failing_download_gives_pip_s_reason_and_a_command(
    tiny: Reader, monkeypatch: pytest.MonkeyPatch, error: str, reason: str
):
    Pip(monkeypatch, error=error)
    with pytest.raises(
        SitelensError, match=f"pip could not download sitelens-tiny-a==1.0: {reason}.*uv pip install .*sitelens-tiny-b"
    ):
        load_model("tiny")
    assert tiny.folders() == []


def test_without_pip_the_message_has_the_command(tiny: Reader, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(
        SitelensError,
        match=r"tiny comes in .*no pip here: .*`uv pip install --no-deps sitelens-tiny-a==1\.0 sitelens-tiny-b==1\.0`",
    ):
        load_model("tiny")
    assert tiny.folders() == []


def test_list_models_says_what_is_ready(tiny: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert list_models().set_index("name")["ready"][list(PACKAGED)].to_dict() == dict.fromkeys(PACKAGED, False)
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    packaged_folder("tiny")
    row = list_models().set_index("name").loc["tiny"]
    assert row["ready"] and row["get"] == "pip install --no-deps sitelens-tiny-a==1.0 sitelens-tiny-b==1.0"
    assert row[["layers", "heads", "d_head", "licence"]].tolist() == [2, 4, 8, "MIT"]
    assert len(tiny.read) == 1


def test_packaged_models_are_pinned():
    for spec in PACKAGED.values():
        assert len(spec.sha256) == 64
        assert all("==" in requirement for requirement, _, _ in spec.parts)
        assert dataclasses.is_dataclass(spec) and spec.licence
