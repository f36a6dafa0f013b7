"""4-bit weights on the CPU: every family loads, trains and answers; both paths agree; 8-bit weights are rejected."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import sitelens as sl
from sitelens.engine.batches import tokenize
from sitelens.engine.forward import HeadEdit, LastToken, full_logits
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import Prompt
from sitelens.models import quantization
from sitelens.models.catalogue import PAPER
from sitelens.models.fingerprints import fingerprint
from sitelens.models.loading import load_model, resolve_model
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from tests import micro, oracle, paper

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
PACKED = ["Llama-3.1-70B", "Mixtral-8x7B", "Qwen3-32B"]  # the families that the paper loads in 4 bits
TEXTS = ["Q: ab\nA:", "Q: ab cd ef gh ba\nA:", "Q: gh\nA: ha\n\nQ: ab\nA:"]
CLOSE = 0.02  # relative to the scale of the logits: bfloat16 has 8 bits, and z and logits are rounded several times


def folder(place: Path, family: str) -> Path:
    micro.raw(family, torch.bfloat16).save_pretrained(place)
    micro.tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Bridge:
    return load_model(folder(tmp_path / "model", request.param), quantize="nf4")


@needs_bitsandbytes
@pytest.mark.parametrize("packed", [*PACKED, "Mistral", "Gemma3Text"], indirect=True)
def test_a_model_in_four_bits_does_everything(packed: Bridge) -> None:
    network: Any = packed.original_model
    assert network.is_loaded_in_4bit
    wide = [name for name, weight in network.named_parameters() if weight.ndim > 1 and weight.is_floating_point()]
    assert all(name.split(".")[-2] in ("embed_tokens", "lm_head", "gate", "_original_component") for name in wide)
    assert sum(weight.dtype == torch.uint8 for weight in network.parameters()) >= 4 * packed.cfg.n_layers
    before = fingerprint(packed)
    task = micro.task()
    embedding = sl.embed_task(task, packed, n_prompts=3, n_shots=2)
    result = sl.train_selection(
        task, packed, embedding=embedding, config=sl.TrainConfig(n_steps=6, eval_every=3, n_valid=3)
    )
    alpha = result.selection.alpha
    assert alpha.dtype == torch.float32 and (alpha - 0.5).abs().max() > 0.1
    site = sl.PatchHeads(result.selection, embedding)
    scores = sl.evaluate(task, {"zero-shot": sl.ZeroShot(), "SITE": site}, packed, n_items=4, metrics=("exact_match",))
    assert scores["logprob"].notna().all()
    assert fingerprint(packed) == before  # no forward pass has repacked a weight
    vector = sl.methods.FV(n_prompts=2, n_effects=1, n_shots=2, head_counts=(2,)).fit(task, packed)
    assert len(sl.generate(TEXTS, vector, packed, max_new_tokens=2)) == 3
    assert sl.heads.head_attribution(task, packed, n_items=2, n_shots=2)["attribution"].notna().all()


@needs_bitsandbytes
@pytest.mark.parametrize("packed", PACKED, indirect=True)
def test_the_cached_path_gives_the_logits_of_whole_prompts(packed: Bridge) -> None:
    batch = tokenize([Prompt(text, ()) for text in TEXTS], micro.tokenizer())
    layers, heads, d_head = packed.cfg.n_layers, packed.cfg.n_heads, packed.cfg.d_head
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(1, layers, heads, generator=generator)
    edit = HeadEdit.mix(alpha, torch.randn(1, layers, heads, d_head, generator=generator))
    with torch.no_grad(), LastToken(Model.of(packed)) as run:
        fast = run(PrefixCache.of(batch, Model.of(packed), 2**30), edit.rows(torch.zeros(3, dtype=torch.long)))
    for row in range(3):
        with packed.hooks(fwd_hooks=edit.hooks()):
            whole = full_logits(batch.rows([row]), Model.of(packed))[0]
        assert (fast[row] - whole).abs().max() <= CLOSE * whole.abs().max()


@needs_bitsandbytes
@pytest.mark.parametrize("packed", ["Mixtral-8x7B"], indirect=True)
def test_experts_are_packed_to_what_bitsandbytes_makes_of_them(packed: Bridge) -> None:
    from bitsandbytes import functional

    plain = micro.raw("Mixtral-8x7B", torch.bfloat16).model.layers[1].mlp.experts
    mlp: Any = packed.original_model.get_submodule("model.layers.1.mlp")
    found: Any = mlp.original_component.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(plain, name).data
        parts, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        assert torch.equal(getattr(found, name), functional.dequantize_4bit(parts, state).reshape(weight.shape))


@needs_bitsandbytes
@pytest.mark.parametrize("family", PACKED)
def test_packed_weights_give_what_they_unpack_to(family: str, tmp_path: Path) -> None:
    """Logits and gradients of alpha compared with a plain float32 model with the unpacked weights."""
    from bitsandbytes import functional

    packed = load_model(folder(tmp_path / "model", family), quantize="nf4", dtype="float32")
    plain = micro.raw(family).requires_grad_(False)
    found: dict[str, Any] = dict(micro.raw_modules(packed))
    for name, module in plain.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            other = getattr(found[name], key)
            state = getattr(other, "quant_state", None)
            weight.copy_(other if state is None else functional.dequantize_4bit(other.data, state))
    ids = [oracle.encode(text) for text in TEXTS]
    layers, heads, d_head = packed.cfg.n_layers, packed.cfg.n_heads, packed.cfg.d_head
    vectors = torch.randn(layers, heads, d_head, generator=torch.Generator().manual_seed(0))
    alphas = [torch.full((layers, heads), 0.3, requires_grad=True) for _ in range(2)]
    expected = oracle.patched_logits(plain, ids, [alphas[0]] * len(ids), [vectors] * len(ids))
    batch = tokenize([Prompt(text, ()) for text in TEXTS], micro.tokenizer())
    edit = HeadEdit.mix(alphas[1].expand(3, -1, -1), vectors.expand(3, -1, -1, -1))
    with LastToken(Model.of(packed)) as run:
        logits = run(PrefixCache.of(batch, Model.of(packed), 2**30), edit)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.detach().abs().max().item())
    for found_logits in (expected, logits):
        found_logits.square().sum().backward()
    grad, expected_grad = (alpha.grad for alpha in alphas[::-1])
    assert grad is not None and expected_grad is not None
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4 * expected_grad.abs().max().item())


@needs_bitsandbytes
@pytest.mark.parametrize("packed", ["Mixtral-8x7B"], indirect=True)
def test_no_unpacked_expert_is_kept_for_the_gradient(packed: Bridge) -> None:
    task = micro.task()
    embedding = sl.embed_task(task, packed, n_prompts=2, n_shots=2)
    largest = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor.is_floating_point() and not tensor.is_leaf else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sl.train_selection(task, packed, embedding=embedding, config=sl.TrainConfig(n_steps=2, eval_every=2, n_valid=2))
    experts = micro.raw("Mixtral-8x7B").model.layers[0].mlp.experts
    assert 0 < largest < experts.down_proj[0].numel()


@pytest.mark.parametrize("name", ["int8", "8bit"])
def test_eight_bits_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match=r"8-bit weights are refused.*cached prefix.*nf4"):
        load_model(tmp_path, quantize=name)


def test_a_bridge_in_eight_bits_is_refused() -> None:
    model = micro.bridge("Llama")
    network: Any = model.original_model
    network.is_loaded_in_8bit = True
    with pytest.raises(sl.SitelensError, match="8-bit weights are refused"):
        resolve_model(model)


def test_other_quantisations_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match="unknown quantisation 'fp4': did you mean 'nf4'"):
        load_model(tmp_path, quantize="fp4")


def test_without_bitsandbytes_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sl.SitelensError, match=r"pip install 'sitelens\[quantized\]'"):
        load_model(tmp_path, quantize="nf4")


def test_device_and_device_map_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(sl.SitelensError, match="device or device_map, not both"):
        load_model(tmp_path, device="cpu", device_map="auto")


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "Mixtral-8x7B", "gemma-3-4b"])
def test_what_dispatches_a_model_to_devices_changes_no_number(family: str) -> None:
    """With accelerate's hooks on every module, as with several GPUs, but with all modules on the CPU."""
    from accelerate import dispatch_model

    network = dispatch_model(micro.raw(family), {"": "cpu"}, main_device=cast(Any, "cpu"), force_hooks=True)
    assert sum(hasattr(module, "_hf_hook") for module in network.modules()) > 5
    spread, plain = micro.bridged(network, family, micro.tokenizer()), micro.bridge(family)
    task, config = micro.task(), sl.TrainConfig(n_steps=4, eval_every=2, n_valid=2)
    found = []
    for model in (plain, spread):
        with settings.using(cache_dir=settings.cache() / str(len(found))):
            embedding = sl.embed_task(task, model, n_prompts=2, n_shots=2)
            alpha = sl.train_selection(task, model, embedding=embedding, config=config).selection
            conditions = {"SITE": sl.PatchHeads(alpha, embedding), "2-shot": sl.FewShot(2)}
            scores = sl.evaluate(task, conditions, model, n_items=4, metrics=("exact_match",))
        found.append((embedding.mean_z, alpha.alpha, torch.tensor(scores["logprob"].to_numpy())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "gemma-3-4b"])
def test_a_device_map_is_passed_on(family: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "model", family)
    plain, spread = load_model(place), load_model(place, device_map={"": "cpu"})
    assert fingerprint(plain) == fingerprint(spread)
    task = micro.task()
    vectors = [sl.embed_task(task, model, n_prompts=2, n_shots=2).mean_z for model in (plain, spread)]
    assert torch.equal(*vectors)


def test_an_edit_follows_the_device_of_each_layer() -> None:
    edit = HeadEdit.mix(torch.rand(2, 3, 4), torch.rand(2, 3, 4, 5))
    elsewhere = torch.empty(2, 1, 4, 5, device="meta", dtype=torch.bfloat16)
    found = edit.apply(elsewhere, 1)
    assert (found.device.type, found.dtype) == ("meta", torch.bfloat16)
    assert edit.apply(torch.rand(2, 1, 4, 5), 2).device.type == "cpu"


def test_the_papers_models_are_packed_where_the_paper_packs_them() -> None:
    packed = {name.split("/")[1] for name, spec in PAPER.items() if spec.quantize}
    assert {name for name in paper.CONFIGS if any(name in one for one in packed)} == set(PACKED)
