"""Loading: a frozen TransformerBridge from a model's name, folder or file."""

from __future__ import annotations

import functools
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos

from sitelens.checks.arguments import checked
from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.catalogue import download_command
from sitelens.models.gguf.converted import PACKAGED, gguf_folder, packaged_folder
from sitelens.models.model import Model, ModelSource, z_hook
from sitelens.models.networks import load_network, quiet_transformers
from sitelens.models.quantization import NO_8BIT, check_quantization, nf4_config, settle
from sitelens.models.sources import DEFAULT_MODEL, check_device, hub_id
from sitelens.models.tokenizers import first_line
from sitelens.settings import checked_dtype, settings

_loading = threading.RLock()  # while loading, transformers sets torch's default dtype, which is global


@checked
@torch.inference_mode(False)  # no gradient can flow through weights made in inference mode
def load_model(
    name: str | Path | TransformerBridge | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: Any = None,
    device_map: Any = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """A model with frozen weights and TransformerLens hook points.

    Args:
        name: a packaged model (default: "smollm2-135m"), a hub id, a name that TransformerLens knows ("gpt2",
            "pythia-70m"), a local folder, a .gguf file, or a TransformerBridge, which is returned unchanged.
        dtype: of the weights; default: `sl.settings.dtype` or, if that is None, bfloat16 with `quantize`, else float32
            for GGUF weights and the checkpoint's own dtype otherwise.
        device: default: a GPU if there is one, else the CPU.
        device_map: "auto", or any device map of transformers; distributes the layers over several devices.
        quantize: "nf4" loads 4-bit weights as the paper does for its large models (bitsandbytes, NF4, double
            quantization); the computation is in `dtype`.
        trust_remote_code: run Python code that comes with the model, if any; a warning says so.

    Raises:
        SitelensError: for an unknown model (with the nearest names), weights that cannot be obtained (with the command
            that downloads them), a model that needs its own code without `trust_remote_code`, a device that does not
            exist, an unsupported quantization, or both `device` and `device_map`.

    Example:
        >>> model = sl.load_model("smollm2-135m")  # doctest: +SKIP
        >>> model.cfg.n_layers, model.cfg.n_heads  # doctest: +SKIP
        (30, 9)
    """
    if isinstance(name, TransformerBridge):
        return name
    if device is not None and device_map is not None:
        raise SitelensError("give device or device_map, not both")
    name = DEFAULT_MODEL if name is None else str(name)
    dtype_name = checked_dtype("dtype", dtype) or settings.dtype
    weights: torch.dtype | None = getattr(torch, dtype_name) if dtype_name else None
    check_device(device, device_map)
    packed = None
    if quantize is not None:
        check_quantization(quantize)
        weights = weights or torch.bfloat16
        packed = nf4_config(weights)
    if name in PACKAGED:
        folder, weights = packaged_folder(name), weights or torch.float32
    elif name.endswith(".gguf"):
        folder, weights = gguf_folder(Path(name).expanduser()), weights or torch.float32
    elif name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = name = hub_id(name)
    place = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if packed is not None and device_map is None:
        device_map = {"": place}  # weights are packed during loading, on their final device
    if trust_remote_code:
        warnings.warn(f"Python code that comes with the model {name} is run, if it brings any (trust_remote_code)",
                      SitelensWarning, stacklevel=2)  # fmt: skip
    options = {
        "dtype": weights or "auto", "device_map": device_map, "quantization_config": packed,
        "trust_remote_code": bool(trust_remote_code),
    }  # fmt: skip
    return _boot(folder, name, options, place)


@functools.cache
def _default_model(dtype: str | None) -> TransformerBridge:
    return load_model(dtype=dtype)


def default_model() -> TransformerBridge:
    """The packaged default model, in the dtype of the settings; loaded once per process and dtype."""
    with _loading:
        return _default_model(settings.dtype)


def resolve_model(model: ModelSource | None) -> Model:
    """The model for the `model` argument of a public function: None means the default model; a name is loaded.

    A Model has been checked before and is returned unchanged.

    Raises:
        SitelensError: as `load_model`, and for a bridge without per-head z hooks, with 8-bit weights, or in training
            mode.
    """
    if isinstance(model, Model):
        return model
    resolved = Model(default_model() if model is None else load_model(model))
    _check_bridge(resolved)
    return resolved


def _check_bridge(model: Model) -> None:
    """Raise SitelensError if the heads of a bridge cannot be patched, or its forward passes are not deterministic."""
    network = model.network
    if z_hook(0) not in model.bridge.hook_dict:
        raise SitelensError(f"{model.name} has no hook point {z_hook(0)}: its heads cannot be patched")
    _check_heads(model)
    if getattr(network, "is_loaded_in_8bit", False):
        raise SitelensError(f"{model.name}: {NO_8BIT}")
    if network.training:
        raise SitelensError(f"{model.name} is in training mode, where dropout is random: call model.eval()")
    if (name := _random_dropout(network)) is not None:
        raise SitelensError(f"{name} of {model.name} is in training mode, where its dropout is random: "
                            "call model.eval()")  # fmt: skip


def _check_heads(model: Model) -> None:
    """Raise SitelensError if the input of an output projection is not n_heads vectors of d_head numbers."""
    _, heads, d_head = model.shape
    blocks: Any = model.bridge.blocks
    for layer, block in enumerate(blocks):
        projection = getattr(getattr(block, "attn", None), "o", None)
        width = getattr(getattr(projection, "original_component", None), "in_features", heads * d_head)
        if width != heads * d_head:
            raise SitelensError(
                f"{model.name}: the output projection of layer {layer} reads {width} numbers, which "
                f"TransformerLens does not show as {heads} heads of {d_head}: its heads cannot be patched"
            )


def _random_dropout(network: torch.nn.Module) -> str | None:
    """The name of a module with active dropout (training mode, nonzero rate); None if there is none."""
    for name, module in network.named_modules():
        if module.training and (
            module.p > 0 if isinstance(module, torch.nn.modules.dropout._DropoutNd) else
            any(isinstance(value, float) and value > 0 for key, value in vars(module).items() if "drop" in key)
        ):  # fmt: skip
            return name.replace("._original_component", "")
    return None


def _boot(folder: str | Path, name: str, options: dict[str, Any], device: Any) -> TransformerBridge:
    from transformers import AutoTokenizer

    try:
        with _loading, quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
            network = load_network(folder, **options)
            if options["device_map"] is None:
                network = network.to(device)
            network.eval()
            if any(weight.is_meta for weight in network.parameters()):
                raise ValueError("its layers do not fit into the devices' memory (offloaded layers cannot be patched): "
                                 "use more GPUs, quantize='nf4', or a smaller dtype")  # fmt: skip
        if options["quantization_config"] is not None:
            settle(network)
        bridge = build_bridge_from_module(
            network, type(network).__name__, hf_config=network.config, model_name=name,
            device=str(network.get_input_embeddings().weight.device),
        )  # fmt: skip
    except Exception as error:  # each library raises its own exceptions if loading fails
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise SitelensError(
                f"the model {name!r} brings Python code of its own, which sitelens does not run: {reason} (read that "
                "code and, if you trust it, give load_model(..., trust_remote_code=True) or --trust-remote-code)"
            ) from error
        command = (
            f"get it with `{download_command(name)}`"
            if folder == name
            else "is it a folder of a causal language model?"
        )
        raise SitelensError(
            f"the model {name!r} could not be loaded: {reason} ({command}; a gated or private model needs "
            "`hf auth login` and its license accepted on its hub page; without a network, give a local folder or use a "
            "packaged model: " + ", ".join(PACKAGED) + ")"
        ) from error
    bridge.requires_grad_(False)  # after building the bridge, which makes new parameters if q, k and v are fused
    # Set only now: a tokenizer passed to the builder is reloaded with a BOS token that the model may not know.
    model = Model(bridge)
    model.use_tokenizer(tokenizer)
    cfg = bridge.cfg
    cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    cfg.default_prepend_bos = cfg.tokenizer_prepends_bos
    _check_bridge(model)
    return bridge
