"""Cache keys: a change of a computation changes its key, other changes do not; a warning says what no key covers."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import sitelens as sl
from sitelens.engine import keys
from sitelens.engine.keys import ResultStore, model_key
from sitelens.errors import SitelensWarning
from sitelens.evaluation.cached import score_conditions
from sitelens.models.facts import BOOKKEEPING, Facts
from sitelens.models.fingerprints import fingerprint
from sitelens.models.identity import accelerator_sums, tensor_sums
from sitelens.models.interference import heard
from sitelens.models.loading import load_model
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from sitelens.store.artifact import Artifact
from tests import micro

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 40, 41, 42, 43]])
TASK = micro.task()
SMALL: dict[str, Any] = {"n_prompts": 2, "n_shots": 2}
ZERO = {"zero-shot": sl.ZeroShot()}


def facts(network: nn.Module) -> tuple[Any, ...]:
    found = Facts.of(network)
    return found.plain, tensor_sums(found.tensors)


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    return network(TOKENS).logits


def entries() -> list[Path]:
    return sorted((settings.cache() / "artifacts").rglob("*.safetensors"))


# Configurations


def others(value: Any) -> list[Any]:
    """Other values for a field of a configuration."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 + 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 3 + 0.25]
    if isinstance(value, str):
        return ["relu"]
    if isinstance(value, list):
        return [value[::-1], value[:1] * len(value)]
    if isinstance(value, dict):
        return [{k: w * 3 if isinstance(w, float) else w for k, w in value.items()}] + [
            value | {k: inner} for k, v in value.items() if isinstance(v, dict) for inner in others(v)
        ]
    return [3, 0.5, True]


def rebuilt(network: Any, field: str, value: Any) -> Any:
    """The network with one configuration field changed and the same weights; None if that is impossible."""
    config = copy.deepcopy(network.config)
    try:
        setattr(config.get_text_config(), field, value)
        new = type(network)(config)
        new.load_state_dict(network.state_dict())
    except Exception:  # invalid value, or weights of another shape
        return None
    new.set_attn_implementation("eager")
    return new.eval()


def walk(network: Any) -> tuple[set[str], set[str]]:
    """The fields that change the logits, and those among them whose change leaves the facts in the key unchanged."""
    before, said = logits(network), facts(network)
    telling: set[str] = set()
    unseen: set[str] = set()
    for field, value in list(vars(network.config.get_text_config()).items()):
        if field.startswith("_"):
            continue
        for other in others(value):
            new = rebuilt(network, field, other)
            if new is None:
                continue
            try:
                changed = not torch.equal(logits(new), before)
            except Exception:  # the network does not run with this value
                continue
            if changed:
                telling.add(field)
                if facts(new) == said:
                    unseen.add(field)
    return telling, unseen


@pytest.mark.parametrize(
    ("family", "some"),
    [
        ("Llama", {"rms_norm_eps", "rope_parameters", "hidden_act"}),
        ("GPT2", {"layer_norm_epsilon", "activation_function", "scale_attn_by_inverse_layer_idx"}),
    ],
)
def test_whatever_field_of_a_configuration_changes_the_logits_changes_the_fingerprint(family: str, some: set[str]):
    telling, unseen = walk(micro.raw(family))
    assert some <= telling and not unseen


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in micro.MORE_FAMILIES if name not in ("Llama", "GPT2")])
def test_so_it_is_in_every_family(family: str):
    telling, unseen = walk(micro.raw(family))
    assert telling and not unseen


def test_bookkeeping_changes_neither_logits_nor_fingerprint():
    bridge = micro.bridge("Llama")
    config, before, said = bridge.original_model.config, fingerprint(bridge), bridge(TOKENS)
    for field in sorted(BOOKKEEPING & set(vars(config))):
        if field not in ("dtype", "torch_dtype", "architectures", "id2label", "label2id", "return_dict"):
            with contextlib.suppress(Exception):  # the field does not accept this value
                setattr(config, field, others(getattr(config, field))[0])
    assert torch.equal(bridge(TOKENS), said) and fingerprint(bridge) == before


def test_models_in_different_folders_have_equal_keys(tmp_path: Path):
    network = micro.raw("Llama")
    for name in ("first", "second"):
        network.save_pretrained(tmp_path / name)
        micro.tokenizer().save_pretrained(tmp_path / name)
    first, second = (load_model(tmp_path / name) for name in ("first", "second"))
    assert model_key(Model.of(first)) == model_key(Model.of(second))


# Attributes, buffers, weights


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net.model.layers[1].self_attn, "scaling", 0.5),
        lambda net: setattr(net.model.layers[0].input_layernorm, "variance_epsilon", 0.5),
        lambda net: net.model.rotary_emb.inv_freq.data.mul_(0.5),
        lambda net: setattr(net.model.rotary_emb, "attention_scaling", 2.0),
        lambda net: setattr(net.model.layers[1].mlp, "act_fn", nn.ReLU()),
        lambda net: setattr(net.config, "sliding_window", 3),
        lambda net: setattr(net.model.layers[0], "mlp", nn.Identity()),
        lambda net: nn.utils.parametrizations.orthogonal(net.model.layers[0].self_attn.q_proj),
    ],
)
def test_edited_attributes_buffers_and_modules_change_the_facts(edit: Callable[[Any], Any]):
    network = micro.raw("Llama")
    before, said = facts(network), logits(network)
    edit(network)
    assert facts(network) != before
    if getattr(network.config, "sliding_window", None) is None:  # which Llama does not read
        assert not torch.equal(logits(network), said)


def zero_head(weight: torch.Tensor) -> None:
    weight.data[:, 8:16] = 0


def swap_rows(weight: torch.Tensor) -> None:
    weight.data[[3, 4]] = weight.data[[4, 3]]


def swap_heads(weight: torch.Tensor) -> None:
    weight.data = torch.cat([weight.data[:, 8:16], weight.data[:, :8], weight.data[:, 16:]], dim=1)


def negate_two(weight: torch.Tensor) -> None:
    weight.data[2, 3] *= -1
    weight.data[5, 7] *= -1


def one_element(weight: torch.Tensor) -> None:
    weight.data[7, 9] = torch.nextafter(weight.data[7, 9], torch.tensor(9.0))


@pytest.mark.parametrize("edit", [zero_head, swap_rows, swap_heads, negate_two, one_element])
def test_every_edit_through_data_is_seen(edit: Callable[[torch.Tensor], None]):
    bridge = micro.bridge("Llama")
    before = fingerprint(bridge)
    weight: Any = bridge.blocks[1].attn.o.original_component.weight
    kept, sums = weight.detach().clone(), accelerator_sums(weight.detach())
    edit(weight)
    assert fingerprint(bridge) != before and not torch.equal(accelerator_sums(weight.detach()), sums)
    weight.data = kept
    assert fingerprint(bridge) == before and torch.equal(accelerator_sums(weight.detach()), sums)


def test_exchanged_storages_are_seen():
    bridge = micro.bridge("Llama")
    before = fingerprint(bridge)
    first, second = (block.attn.q.original_component.weight for block in bridge.blocks)
    first.data, second.data = second.data, first.data
    assert fingerprint(bridge) != before


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.bool, torch.int8])
def test_sums_on_an_accelerator_take_every_dtype_and_length(kind: torch.dtype):
    for size in (0, 1, 3, 5, 2**20 + 3):
        value = torch.zeros(size).to(kind)
        sums = accelerator_sums(value)
        if size:
            value[-1] = 1
            assert not torch.equal(accelerator_sums(value), sums)


ROTARY = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                 "original_max_position_embeddings": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_embedding_that_follows_the_prompt_keeps_its_fingerprint(kind: str):
    network = micro.raw("Llama")
    config = copy.deepcopy(network.config)
    config.max_position_embeddings, config.rope_parameters = 8, ROTARY[kind]
    bridge = micro.bridged(type(network)(config).eval(), "rotary", micro.tokenizer())
    before, key = fingerprint(bridge), model_key(Model.of(bridge))
    bridge(TOKENS)
    assert fingerprint(bridge) == before
    stretched = model_key(Model.of(bridge))
    assert (stretched != key) == (kind == "dynamic")  # its frequencies stay stretched for medium lengths
    bridge(TOKENS[:, :4])
    assert model_key(Model.of(bridge)) == key


@pytest.mark.parametrize(
    "family",
    [name if name in ("Llama", "GPT2") else pytest.param(name, marks=pytest.mark.slow) for name in micro.MORE_FAMILIES],
)
def test_work_leaves_the_key_as_it_was(family: str):
    bridge = micro.bridge(family)
    before = model_key(Model.of(bridge))
    config = sl.TrainConfig(n_steps=1, eval_every=1)
    sl.train_selection(TASK, bridge, embedding=sl.embed_task(TASK, bridge, **SMALL), config=config)
    sl.evaluate(TASK, ZERO, bridge, n_items=2, metrics=("exact_match",))
    assert model_key(Model.of(bridge)) == before and heard(bridge) is None


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_are_part_of_the_fingerprint():
    peft = pytest.importorskip("peft")
    network = micro.raw("Llama")
    found = [facts(network)]
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}
    model = peft.inject_adapter_in_model(peft.LoraConfig(**options), network, "first")
    peft.inject_adapter_in_model(peft.LoraConfig(**options), network, "second")
    found.append(facts(model))
    layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for turn in (
        lambda layer: layer.set_adapter("first"),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(adapter_names=["first"]),
    ):
        for layer in layers:
            turn(layer)
        found.append(facts(model))
    assert [i for i, one in enumerate(found) if one in found[:i]] == []


def test_compatibility_mode_changes_the_key():
    bridge = micro.bridge("GPT2")
    before = model_key(Model.of(bridge))
    bridge.enable_compatibility_mode()
    after = model_key(Model.of(bridge))
    assert after["model"] != before["model"] and after["setting"] != before["setting"]


# The setting


@contextlib.contextmanager
def default_dtype(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def result_switch(bridge: Bridge) -> Iterator[None]:
    bridge.cfg.use_attn_result = True
    try:
        yield
    finally:
        bridge.cfg.use_attn_result = False


@pytest.mark.parametrize(
    "other",
    [
        lambda bridge: torch.autocast("cpu", torch.bfloat16),
        lambda bridge: default_dtype(torch.float64),
        lambda bridge: precision("medium"),
        result_switch,
    ],
)
def test_the_setting_is_part_of_the_key_and_not_of_the_model(other: Any, llama: Bridge):
    before = model_key(Model.of(llama))
    with other(llama):
        within = model_key(Model.of(llama))
    assert within["setting"] != before["setting"] and within["model"] == before["model"]
    assert model_key(Model.of(llama)) == before


@pytest.mark.parametrize("library", ["torch", "transformers", "transformer_lens"])
def test_versions_are_part_of_the_key(library: str, llama: Bridge, monkeypatch: pytest.MonkeyPatch):
    before, real = model_key(Model.of(llama)), keys._version
    monkeypatch.setattr(keys, "_version", lambda name: "0.0" if name == library else real(name))
    assert model_key(Model.of(llama)) != before


def test_results_under_autocast_are_kept_apart(llama: Bridge):
    clean = sl.embed_task(TASK, llama, **SMALL).mean_z
    with torch.autocast("cpu", torch.bfloat16):
        within = sl.embed_task(TASK, llama, **SMALL).mean_z
    assert not torch.equal(within, clean) and torch.equal(sl.embed_task(TASK, llama, **SMALL).mean_z, clean)


def test_generated_scores_hang_on_the_tokens_that_end_a_text():
    bridge = micro.bridge("Llama")
    network: Any = bridge.original_model
    for metric, kinds in (("exact_match", 2), ("first_token", 3)):
        for end in (2, [2, 9]):
            network.generation_config.eos_token_id = end
            score_conditions(TASK, ZERO, Model.of(bridge), n_items=2, metrics=(metric,))
        assert len(entries()) == kinds


# What no key covers


def change(*args: Any, **options: Any) -> None:
    """A hook without effect; its effect cannot be known in advance."""


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced(owner: Any, name: str) -> Iterator[None]:
    """A context manager that replaces an attribute by an equivalent function of the user's."""
    before, own = getattr(owner, name), name in vars(owner)

    def mine(*args: Any, **options: Any) -> Any:
        return before(*args, **options)

    setattr(owner, name, mine)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def own_module(bridge: Bridge) -> Iterator[None]:
    class Mine(nn.SiLU):
        pass

    block: Any = bridge.blocks[0]
    mlp = block.mlp.original_component
    before, mlp.act_fn = mlp.act_fn, Mine()
    try:
        yield
    finally:
        mlp.act_fn = before


def norm(bridge: Bridge) -> Any:
    return bridge.blocks[0].ln1.original_component


INTERFERENCE: dict[str, Callable[[Bridge], Any]] = {
    "a forward hook on blocks.0.attn.hook_z": lambda b: b.hooks(fwd_hooks=[("blocks.0.attn.hook_z", change)]),
    "a backward hook on blocks.1.hook_resid_post": lambda b: b.hooks(bwd_hooks=[("blocks.1.hook_resid_post", change)]),
    "a forward hook on blocks.0.ln1": lambda b: removed(norm(b).register_forward_hook(change)),
    "a forward pre-hook on": lambda b: removed(norm(b).register_forward_pre_hook(change)),
    "a backward hook on": lambda b: removed(norm(b).register_full_backward_hook(change)),
    "a state-dict hook on": lambda b: removed(norm(b).register_state_dict_post_hook(change)),
    "on the bridge": lambda b: removed(b.register_forward_hook(change)),
    "on the network": lambda b: removed(b.original_model.register_forward_hook(change)),
    "all modules": lambda b: removed(nn.modules.module.register_module_forward_hook(change)),
    "a replaced forward of the network": lambda b: replaced(b.original_model, "forward"),
    "a replaced forward of blocks.0.ln1": lambda b: replaced(norm(b), "forward"),
    "a replaced LlamaRMSNorm.forward": lambda b: replaced(type(norm(b)), "forward"),
    "apply_rotary_pos_emb": lambda b: replaced(__import__(
        "transformers.models.llama.modeling_llama", fromlist=["x"]), "apply_rotary_pos_emb"),
    "torch.nn.functional.silu": lambda b: replaced(nn.functional, "silu"),
    "class": own_module,
    "the mode Mode": lambda b: Mode(),
}  # fmt: skip


@pytest.mark.parametrize("what", INTERFERENCE)
def test_what_a_key_cannot_name_is_heard_once_and_closes_the_store(what: str, monkeypatch: pytest.MonkeyPatch):
    bridge = micro.bridge("Llama")
    sl.embed_task(TASK, bridge, **SMALL)
    before = entries()
    with INTERFERENCE[what](bridge):
        with pytest.warns(SitelensWarning, match="neither taken from the cache nor put there") as warned:
            sl.embed_task(TASK, bridge, **SMALL)
        assert what in str(warned[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sl.embed_task(TASK, bridge, **SMALL)  # warned once
            micro.silence(monkeypatch)
            with pytest.raises(AssertionError, match="the model was run"):
                sl.embed_task(TASK, bridge, **SMALL)
    assert entries() == before and heard(bridge) is None
    sl.embed_task(TASK, bridge, **SMALL)  # from the cache again


def test_an_ablated_model_never_takes_nor_leaves_what_a_clean_one_computes():
    config = sl.TrainConfig(n_steps=3, eval_every=1)

    def results(bridge: Bridge) -> list[torch.Tensor]:
        embedding = sl.embed_task(TASK, bridge, **SMALL)
        scores = score_conditions(TASK, ZERO, Model.of(bridge), n_items=5)
        method = sl.methods.I2CL(epochs=1).measured_fit(TASK, Model.of(bridge)).condition.state()[0]
        alpha = sl.train_selection(TASK, bridge, embedding=embedding, config=config).selection.alpha
        return [embedding.mean_z, torch.tensor(scores["logprob"].to_numpy()), alpha, *method.values()]

    def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return z.index_fill(2, torch.tensor([1]), 0.0)

    bridge = micro.bridge("Llama")
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", ablate)]), pytest.warns(SitelensWarning):
        ablated = results(bridge)
    assert entries() == []
    clean = results(bridge)
    assert entries() and all(not torch.equal(one, other) for one, other in zip(ablated, clean, strict=True))
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", ablate)]):
        again = results(bridge)
    assert all(torch.equal(one, other) for one, other in zip(again, ablated, strict=True))


def test_nothing_is_kept_of_work_during_which_a_hook_came(llama: Bridge):
    store = ResultStore(Model.of(llama), [TASK])
    artifact = Artifact("embedding", store.key, {"x": torch.zeros(1)})
    with llama.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: None)]), pytest.warns(SitelensWarning):
        store.put(artifact)
    assert entries() == []
    store.put(artifact)
    assert len(entries()) == 1


def test_the_libraries_own_hooks_do_not_count():
    bridge = micro.bridge("Llama")
    bridge.original_model(TOKENS, output_hidden_states=True)
    nn.utils.parametrizations.orthogonal(bridge.blocks[0].attn.q.original_component)
    assert heard(bridge) is None


# Artifacts from elsewhere


def test_an_artifact_of_the_same_weights_fits_where_only_libraries_or_settings_differ() -> None:
    here, elsewhere, other = micro.bridge("Llama"), micro.bridge("Llama"), micro.bridge("Llama", seed=1)
    rotary: Any = next(module for module in elsewhere.original_model.modules() if hasattr(module, "inv_freq"))
    with torch.no_grad():
        rotary.inv_freq[0] = torch.nextafter(rotary.inv_freq[0], torch.tensor(2.0))  # rounding as on another processor
    assert (
        sl.fingerprint(here) != sl.fingerprint(elsewhere)
        and Model.of(here).weights_digest() == Model.of(elsewhere).weights_digest()
    )
    embedding = sl.embed_task(micro.task(), here, n_prompts=2, n_shots=1)
    with pytest.warns(sl.SitelensWarning, match="same weights under another configuration or with other versions"):
        embedding.check_fits(elsewhere)
    with pytest.raises(sl.SitelensError, match="another model"):
        embedding.check_fits(other)
