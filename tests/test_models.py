"""Models: fingerprints, tokenizers, what can be loaded, and what is rejected."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sitelens.conditions.embedding import embed_task
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models import identity
from sitelens.models.fingerprints import fingerprint
from sitelens.models.loading import load_model, resolve_model
from sitelens.models.model import Bridge, Model, check_fit
from sitelens.models.sources import check_device, hub_id
from sitelens.settings import settings
from tests import micro

TOKENS = torch.arange(20, 60)[None]
ROOT = Path(__file__).parents[1]


def saved(folder: Path, family: str = "Llama", seed: int = 0, bos: bool = False) -> Path:
    micro.raw(family, seed=seed).save_pretrained(folder)
    micro.tokenizer(bos).save_pretrained(folder)
    return folder


def bare_bridge(tokenizer: Any = None) -> Bridge:
    """A bridge as users create it, without sitelens."""
    network = micro.raw("Llama")
    bridge = build_bridge_from_module(network, type(network).__name__, hf_config=network.config, model_name="bare")
    bridge.tokenizer = tokenizer
    return bridge


def hub_with(home: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A hub cache that contains a tiny GPT-2 under each of these names."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    for name in names:
        snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        saved(snapshot, "GPT2")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return home / "hub"


def with_code(folder: Path, mark: Path) -> None:
    """Add Python code for configuration, model and tokenizer to a model folder; running it would create `mark`."""
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ValueError('enough')\n")
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
    known = Model.of(first).tokenization()
    assert Model.of(same).tokenization() == known != Model.of(prepending).tokenization()
    Model.of(first).tokenizer(["aa", "aa bb"], padding=True, truncation=True, max_length=8)
    assert Model.of(first).tokenization() == known
    assert Model.of(first).tokenizer.backend_tokenizer.padding is not None  # it is unchanged
    chatty = copy.deepcopy(Model.of(same).tokenizer)
    chatty.chat_template = "{{ messages[0].content }}"
    Model.of(same)._memory.tokenizer = same.tokenizer, chatty, None
    assert Model.of(same).tokenization() != known
    own = Model.of(first).tokenizer
    own.add_tokens(["zz"])  # in place
    larger = Model.of(first).tokenization()
    own.backend_tokenizer.post_processor = Model.of(prepending).tokenizer.backend_tokenizer.post_processor
    assert len({known, larger, Model.of(first).tokenization()}) == 3


@pytest.mark.slow
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
    network: Any = bridge.original_model
    head = network.get_output_embeddings()
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
    network: Any = bridge.original_model
    network.config.sliding_window = micro.WINDOW // 2
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

    def fail(_: torch.Tensor) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(identity, "content_digest", fail)
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
    assert theirs.tokenizer("ab")["input_ids"][0] == 1  # TransformerLens always adds one
    with contextlib.nullcontext() if bos else pytest.warns(SitelensWarning, match="begins each text with '<bos>'"):
        _ = Model.of(theirs).tokenizer
    for bridge in (load_model(folder), theirs):  # warned once
        assert Model.of(bridge).tokenizer("ab")["input_ids"] == [1] * bos + micro.tokenizer()("ab")["input_ids"]
    assert load_model(folder).cfg.default_prepend_bos is bos
    assert theirs.tokenizer("ab")["input_ids"][0] == 1  # and the user's own tokenizer is unchanged


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_bridge_booted_by_a_hub_id_of_any_form_keeps_the_model_s_habit_of_bos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    hub = hub_with(tmp_path, monkeypatch, name)
    bridge = TransformerBridge.boot_transformers(name, device="cpu")
    assert bridge.tokenizer.name_or_path == name and bridge.tokenizer("ab")["input_ids"][0] == 1
    with pytest.warns(SitelensWarning, match=f"tokenizer of the bridge {name} differs from its files"):
        assert Model.of(bridge).tokenizer("ab")["input_ids"] == micro.tokenizer()("ab")["input_ids"]
    assert hub.is_dir()


def test_what_a_user_edits_in_her_bridge_s_tokenizer_counts_and_is_said(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model")))
    bridge.tokenizer.add_tokens(["[ANS]"])
    bridge.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    bridge.tokenizer.eos_token = "<unk>"
    said = r"its 1 more tokens \('\[ANS\]'\), eos token, chat template are not theirs: the bridge's own counts"
    with pytest.warns(SitelensWarning, match=said):
        own = Model.of(bridge).tokenizer
    assert own("ab[ANS]")["input_ids"] == [*micro.tokenizer()("ab")["input_ids"], len(own) - 1]
    assert own.chat_template == bridge.tokenizer.chat_template and own.eos_token == "<unk>"


def test_what_a_user_edits_later_counts_too(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model")))
    with pytest.warns(SitelensWarning, match="leaves that out"):
        first = Model.of(bridge).tokenizer
    assert Model.of(bridge).tokenizer is first
    bridge.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.warns(SitelensWarning, match="chat template is not theirs"):
        assert Model.of(bridge).tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_bos_that_the_user_takes_away_stays_away(tmp_path: Path):
    bridge = TransformerBridge.boot_transformers(str(saved(tmp_path / "model", bos=True)))
    bridge.tokenizer.add_bos_token = False
    assert Model.of(bridge).tokenizer is bridge.tokenizer
    assert Model.of(bridge).tokenizer("ab")["input_ids"] == micro.tokenizer()("ab")["input_ids"]


def test_a_tokenizer_without_files_is_used_as_it_is():
    tokenizer = micro.tokenizer()
    assert Model.of(bare_bridge(tokenizer)).tokenizer is tokenizer


def test_a_tokenizer_whose_files_are_gone_is_used_as_it_is_with_a_warning(tmp_path: Path):
    folder = saved(tmp_path / "model")
    bridge = TransformerBridge.boot_transformers(str(folder))
    shutil.rmtree(folder)
    with pytest.warns(SitelensWarning, match="could not be loaded anew from .*may add a BOS token"):
        assert Model.of(bridge).tokenizer is bridge.tokenizer


def test_code_beside_a_tokenizer_is_not_run_when_it_is_loaded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "model")
    bridge = TransformerBridge.boot_transformers(str(folder))
    with_code(folder, tmp_path / "mark")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.warns(SitelensWarning):
        _ = Model.of(bridge).tokenizer
    assert not (tmp_path / "mark").exists()


def test_a_model_without_tokenizer_is_refused_until_it_has_one(tmp_path: Path):
    bridge = bare_bridge()
    with pytest.raises(SitelensError, match=r"bare has no tokenizer: set model\.tokenizer"):
        _ = Model.of(bridge).tokenizer
    bridge.tokenizer = transformers.AutoTokenizer.from_pretrained(saved(tmp_path / "model"))
    assert len(Model.of(bridge).tokenizer) == len(micro.tokenizer())


@pytest.mark.parametrize("cached", ["gpt2", "openai-community/gpt2"])
def test_gpt2_and_its_other_names_are_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: str):
    hub_with(tmp_path, monkeypatch, cached)
    for name in ("gpt2", "GPT2-small", cached):
        bridge = load_model(name)
        assert bridge.cfg.model_name == cached and Model.of(bridge).tokenizer("ab") == micro.tokenizer()("ab")


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("gpt2-medium", "gpt2-medium"),
        ("gpt2-xs", "distilgpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("EleutherAI/pythia-19m", "EleutherAI/pythia-70m"),
        ("Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("owner/model", "owner/model"),
    ],
)
def test_names_that_transformerlens_knows_are_hub_ids(name: str, official: str):
    assert hub_id(name) == official


def test_a_name_of_weights_that_lie_on_no_hub_says_what_to_do():
    for name in ("llama-7b", "llama-7b-hf"):
        with pytest.raises(SitelensError, match="llama-7b-hf are weights that Meta hands out: convert them"):
            load_model(name)


def test_a_misspelled_name_gets_the_nearest_of_all():
    with pytest.raises(SitelensError, match=r"unknown model 'pythia-70': did you mean pythia-\d+m"):
        load_model("pythia-70")


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1), "mps"])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded(device: Any):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SitelensError, match=r"device.*: there is cpu$"):
        load_model(device=device)
    for device_map in (device, {"": device}):
        with pytest.raises(SitelensError, match=r"device.*: there is cpu$"):
            load_model(device_map=device_map)


def test_fewer_gpus_than_asked_for_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(SitelensError, match=r"no device 'cuda:2' here: there is cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "cpu:q", object()])
def test_a_device_that_is_none_is_refused(device: Any):
    with pytest.raises(SitelensError, match=r"device .*: there is cpu"):
        load_model(device=device)


def test_layers_may_be_spread_by_any_map_that_transformers_takes():
    for device_map in ("auto", "balanced_low_0", "cpu", {"model.layers.0": "cpu", "lm_head": "disk"}):
        check_device(None, device_map)


def test_code_in_a_model_folder_is_run_when_it_is_asked_for_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, mark = saved(tmp_path / "model"), tmp_path / "mark"
    with_code(folder, mark)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(
        SitelensError, match=r"brings Python code of its own.*trust_remote_code=True.*--trust-remote-code"
    ):
        load_model(folder)
    assert not mark.exists()
    said = "Python code that comes with the model .* is run"
    with pytest.warns(SitelensWarning, match=said), contextlib.suppress(SitelensError):
        load_model(folder, trust_remote_code=True)
    assert mark.exists()


def test_code_beside_a_model_of_a_known_kind_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, mark = saved(tmp_path / "model"), tmp_path / "mark"
    plain = {name: (folder / name).read_text() for name in ("config.json", "tokenizer_config.json")}
    with_code(folder, mark)
    for name, text in plain.items():  # except for auto_map
        own = json.loads((folder / name).read_text())["auto_map"]
        (folder / name).write_text(json.dumps(json.loads(text) | {"auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert fingerprint(load_model(folder)) == fingerprint(micro.bridge("Llama"))
    assert not mark.exists()


def test_a_tokenizer_set_later_is_the_one_used(tmp_path: Path):
    bridge = load_model(saved(tmp_path / "model"))
    before = len(Model.of(bridge).tokenizer)
    larger = micro.tokenizer()
    larger.add_tokens(["zzz"])
    larger.save_pretrained(tmp_path / "larger")
    bridge.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "larger")
    with pytest.warns(SitelensWarning, match="begins each text with"):
        assert len(Model.of(bridge).tokenizer) == before + 1


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
    assert Model.of(bridge).shape == (2, 4, 8)
    assert Model.of(bridge).context_length == 256
    assert Model.of(bridge).name == str(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_may_be_chosen(tmp_path: Path, dtype: Any):
    folder = saved(tmp_path / "model")
    assert next(load_model(folder).parameters()).dtype == torch.float32
    assert next(load_model(folder, dtype=dtype).parameters()).dtype == torch.bfloat16


def test_the_default_dtype_is_a_setting(tmp_path: Path):
    folder = saved(tmp_path / "model")
    with settings.using(dtype="bfloat16"):
        assert next(load_model(folder).parameters()).dtype == torch.bfloat16
        assert resolve_model(folder).dtype == torch.bfloat16
        assert next(load_model(folder, dtype="float64").parameters()).dtype == torch.float64
    assert next(load_model(folder).parameters()).dtype == torch.float32


def test_a_model_knows_its_bridge_and_shares_what_is_known_of_it():
    bridge = micro.bridge("Llama")
    model = resolve_model(bridge)
    assert model.bridge is bridge and resolve_model(model) is model
    assert model == resolve_model(bridge) != Model.of(micro.bridge("Llama"))
    assert {model: 1}[Model.of(bridge)] == 1
    assert model.once("name", object) is Model.of(bridge).once("name", object)
    assert model.shape == (2, 4, 8) and model.shape.heads == 4 and model.d_model == 32
    assert repr(model) == "Model(Llama: 2 layers x 4 heads, float32)"


def test_a_bridge_is_returned_as_it_is():
    bridge = micro.bridge("Llama")
    assert load_model(bridge) is bridge and resolve_model(bridge) == Model.of(bridge)


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
        match=f"model '{name}' could not be loaded: .*`{re.escape(command)} .*license.*local folder.*smollm2-135m",
    ):
        load_model(name)


def test_an_unknown_dtype_is_refused(tmp_path: Path):
    for dtype in ("float33", "nn", "int8", torch.int64):
        with pytest.raises(SitelensError, match=f"unknown dtype {dtype!r}; write for example 'float32'"):
            load_model(tmp_path, dtype=dtype)


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
        edit_config(num_hidden_layers=3),  # one of its layers would be random
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


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors") -> None:
    """Change the weights in a folder."""
    content = load_file(folder / name)
    change(content)
    save_file(content, folder / name, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "no weights model.layers.1.mlp.up_proj.weight"),
        (lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
         "no place for its weights model.layers.0.self_attn.q_proj.bias"),
        (lambda state: state.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
         "no place for its weights model.layers.2.input_layernorm.weight"),
        (lambda state: state.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight|mismatch|size"),
        (lambda state: [state.clear(), state.update({"base_model.model.layers.0.lora_A.weight": torch.ones(2, 2)})],
         "no weights .* and 1[0-9] more"),
    ],
    ids=["missing", "a bias", "another layer", "another size", "an adapter alone"],
)  # fmt: skip
def test_weights_that_do_not_match_the_configuration_are_named(tmp_path: Path, change: Any, message: str):
    folder = saved(tmp_path / "model")
    weights(folder, change)
    with pytest.raises(SitelensError, match=rf"(?s)could not be loaded: .*{message}"):
        load_model(folder)


def test_what_a_network_computes_itself_may_lie_in_its_checkpoint(tmp_path: Path):
    folder = saved(tmp_path / "model")
    weights(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert fingerprint(load_model(folder)) == fingerprint(micro.bridge("Llama"))


def test_half_of_a_checkpoint_in_parts_is_refused(tmp_path: Path):
    folder = tmp_path / "model"
    micro.raw("Llama").save_pretrained(folder, max_shard_size="20KB")
    micro.tokenizer().save_pretrained(folder)
    assert fingerprint(load_model(folder)) == fingerprint(micro.bridge("Llama"))
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(SitelensError, match="could not be loaded"):
        load_model(folder)


def test_an_architecture_without_a_bridge_is_refused(tmp_path: Path):
    sizes: dict[str, Any] = {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2}
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
    assert resolve_model(bridge.eval()).bridge is bridge


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
