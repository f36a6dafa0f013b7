"""Models: names, folders and files in, frozen TransformerBridge out; and the facts about one that others need.

All that differs from model to model (where weights come from, whose tokenizer it is, what identifies it) is here.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos

from sitelens.arguments import checked
from sitelens.catalogue import how_to_get
from sitelens.conversion import PACKAGED, gguf_folder, packaged_folder
from sitelens.defaults import SitelensError, SitelensWarning, warn_once
from sitelens.fingerprints import fingerprint, text_config, weights_digest
from sitelens.loading import load_network, quiet_transformers
from sitelens.quantization import NO_8BIT, check_quantization, nf4_config, settle
from sitelens.sources import DEFAULT_MODEL, check_device, hub_id
from sitelens.store import digest
from sitelens.tokenizers import as_in_files, condition, first_line, rules

Model = TransformerBridge


@checked
@torch.inference_mode(False)  # nothing could be trained through weights made there
def load_model(
    name: str | Path | Model | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: Any = None,
    device_map: Any = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """A model with frozen weights and TransformerLens hook points.

    `name` is a packaged model (default: "smollm2-135m"), a hub id, a name that TransformerLens knows ("gpt2",
    "pythia-70m"), a local folder, a .gguf file, or a TransformerBridge, which is returned as it is. `dtype` defaults to
    float32 for GGUF weights and to the checkpoint's own otherwise; `device` to a GPU where there is one. `device_map`
    ("auto", or as transformers takes it) spreads the layers over several devices. `quantize="nf4"` loads 4-bit weights
    as the paper does for its large models (bitsandbytes, NF4, double quantisation, computing in bfloat16 or in
    `dtype`). Python code that a model brings along is run with `trust_remote_code` only, and a warning says so.

    Raises:
        SitelensError: for an unknown model (with the nearest names), weights that cannot be had (with the command that
            gets them), a model that brings code, a device that is not there, a quantisation that is not to be trusted,
            or both `device` and `device_map`.
    """
    if isinstance(name, TransformerBridge):
        return name
    if device is not None and device_map is not None:
        raise SitelensError("give device or device_map, not both")
    name = DEFAULT_MODEL if name is None else str(name)
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise SitelensError(f"unknown dtype {dtype!r}; write for example 'float32' or 'bfloat16'")
        dtype = found
    check_device(device, device_map)
    packed = None
    if quantize is not None:
        check_quantization(quantize)
        dtype = dtype or torch.bfloat16
        packed = nf4_config(dtype)
    if name in PACKAGED:
        folder, dtype = packaged_folder(name), dtype or torch.float32
    elif name.endswith(".gguf"):
        folder, dtype = gguf_folder(Path(name).expanduser()), dtype or torch.float32
    elif name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = name = hub_id(name)
    place = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if packed is not None and device_map is None:
        device_map = {"": place}  # packed while it is loaded, where it is to lie
    if trust_remote_code:
        warnings.warn(f"Python code that comes with the model {name} is run, if it brings any (trust_remote_code)",
                      SitelensWarning, stacklevel=2)  # fmt: skip
    options = {
        "dtype": dtype or "auto", "device_map": device_map, "quantization_config": packed,
        "trust_remote_code": bool(trust_remote_code),
    }  # fmt: skip
    return _boot(folder, name, options, place)


_loading = threading.RLock()  # transformers sets torch's default dtype, which is the process's, while it loads


def default_model() -> Model:
    """The packaged default model, loaded once a process."""
    with _loading:
        return _default_model()


@functools.cache
def _default_model() -> Model:
    return load_model()


def resolve_model(model: str | Path | Model | None) -> Model:
    """The model that an optional argument means: None is the default model, a name is loaded.

    Raises:
        SitelensError: as `load_model`, and for a bridge without per-head z hooks or in training mode.
    """
    if model is None:
        return default_model()
    if not isinstance(model, TransformerBridge):
        return load_model(model)
    if z_hook(0) not in model.hook_dict:
        raise SitelensError(f"{model_name(model)} has no hook point {z_hook(0)}: its heads cannot be patched")
    _check_heads(model)
    if getattr(model.original_model, "is_loaded_in_8bit", False):
        raise SitelensError(f"{model_name(model)}: {NO_8BIT}")
    if model.original_model.training:
        raise SitelensError(f"{model_name(model)} is in training mode, where dropout is random: call model.eval()")
    if (name := _random_dropout(model.original_model)) is not None:
        raise SitelensError(f"{name} of {model_name(model)} is in training mode, where its dropout is random: "
                            "call model.eval()")  # fmt: skip
    return model


def _check_heads(model: Model) -> None:
    """Raise SitelensError if the output projections read anything but n_heads vectors of d_head numbers."""
    _, heads, d_head = head_shape(model)
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        projection = getattr(getattr(block, "attn", None), "o", None)
        width = getattr(getattr(projection, "original_component", None), "in_features", heads * d_head)
        if width != heads * d_head:
            raise SitelensError(
                f"{model_name(model)}: the output projection of layer {layer} reads {width} numbers, which "
                f"TransformerLens does not show as {heads} heads of {d_head}: its heads cannot be patched"
            )


def _random_dropout(network: torch.nn.Module) -> str | None:
    """The name of a module whose dropout is random now, in training mode and not zero; None if there is none."""
    for name, module in network.named_modules():
        if module.training and (
            module.p > 0 if isinstance(module, torch.nn.modules.dropout._DropoutNd) else
            any(isinstance(value, float) and value > 0 for key, value in vars(module).items() if "drop" in key)
        ):  # fmt: skip
            return name.replace("._original_component", "")
    return None


def z_hook(layer: int) -> str:
    """The hook point of a layer's head outputs before the output projection, `[batch pos head d_head]`."""
    return f"blocks.{layer}.attn.hook_z"


def head_shape(model: Model) -> tuple[int, int, int]:
    """(layers, heads, d_head) of a model."""
    return model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head


def model_name(model: Model) -> str:
    """What to call a model in messages and tables."""
    return str(getattr(model.cfg, "model_name", None) or type(model.original_model).__name__)


def context_length(model: Model) -> int | None:
    """How many tokens a prompt may have, where the model says so."""
    return getattr(text_config(model), "max_position_embeddings", None)


def computing_dtype(model: Model) -> torch.dtype:
    """The dtype in which alpha is kept and heads are mixed: float32, or the model's own where that is wider."""
    return torch.promote_types(model_dtype(model), torch.float32)


def model_dtype(model: Model) -> torch.dtype:
    """The dtype of a model's activations: that of its embeddings, which no quantisation packs."""
    return next(p.dtype for p in model.original_model.parameters() if p.is_floating_point())


# model -> the tokenizer it was given, and the one to be used; where they differ, what the former was like then
_tokenizers: weakref.WeakKeyDictionary[Model, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_states: weakref.WeakKeyDictionary[Model, str] = weakref.WeakKeyDictionary()


def own_tokenizer(model: Model) -> Any:
    """The bridge's tokenizer, with the habit of a BOS token that its files give it.

    TransformerLens reloads a tokenizer so that it adds a BOS token whether or not the model was trained with one. So
    where a bridge's tokenizer adds one, its files are loaded once more, and if they add none, a copy of the tokenizer
    that adds none is used. All else is the bridge's own: vocabulary, special tokens, chat template. What differs from
    the files is said once. A tokenizer without files is used as it is.

    Raises:
        SitelensError: if the bridge has no tokenizer.
    """
    given = model.tokenizer
    if given is None:
        raise SitelensError(f"{model_name(model)} has no tokenizer: set model.tokenizer")
    known = _tokenizers.get(model)
    if known is not None and known[0] is given and (known[1] is given or model not in _states):
        return known[1]
    state = condition(given)
    if known is None or known[0] is not given or _states[model] != state:
        own = as_in_files(given, model_name(model))
        _tokenizers[model] = given, own
        if own is not given:
            _states[model] = state
    return _tokenizers[model][1]


# model -> a tokenizer of it, its condition, and a digest of its rules
_rules: weakref.WeakKeyDictionary[Model, tuple[Any, str, str]] = weakref.WeakKeyDictionary()


def tokenization(model: Model) -> str:
    """A hexadecimal digest of what makes a text's tokens: rules, vocabulary, special tokens, chat template.

    What is kept on disk hangs on it as on the weights.

    Raises:
        SitelensError: if the bridge has no tokenizer.
    """
    tokenizer = own_tokenizer(model)
    known, state = _rules.get(model), condition(tokenizer)
    if known is None or known[0] is not tokenizer or known[1] != state:
        known = _rules[model] = tokenizer, state, rules(tokenizer)
    return digest([type(tokenizer).__name__, state, known[2]])[:32]


def check_fit(what: str, made_for: str | None, shape: tuple[int, ...], model: Model, origin: Any = None) -> None:
    """Raise SitelensError unless an artifact made for the model with fingerprint `made_for` fits this one.

    `shape` begins with (layers, heads); None as fingerprint means made for any model of that shape. With its `origin`
    (see `sitelens.provenance`), the same model in another precision, or the same weights under other library
    versions or another configuration, is a warning.
    """
    expected = head_shape(model)[: len(shape)]
    if tuple(shape) != expected:
        names = ("layers", "heads", "d_head")[: len(shape)]
        raise SitelensError(f"{what} has shape {tuple(shape)} ({', '.join(names)}), {model_name(model)} has {expected}")
    if made_for is not None and made_for != fingerprint(model):
        if origin is not None and (precision := origin.other_precision(model)) is not None:
            warn_once(f"{what} was made with {precision}: numbers will differ a little", what)
            return
        if origin is not None and origin.weights is not None and origin.weights == weights_digest(model):
            warn_once(f"{what} was made with the same weights under another configuration or with other versions of "
                      "the libraries: numbers may differ a little", what)  # fmt: skip
            return
        raise SitelensError(
            f"{what} was made with another model (fingerprint {made_for[:12]}) than {model_name(model)} "
            f"({fingerprint(model)[:12]}); dataclasses.replace(..., model=None) lifts this check"
        )


def _boot(folder: str | Path, name: str, options: dict[str, Any], device: Any) -> Model:
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
        model = build_bridge_from_module(
            network, type(network).__name__, hf_config=network.config, model_name=name,
            device=str(network.get_input_embeddings().weight.device),
        )  # fmt: skip
    except Exception as error:  # each library below us raises its own kinds for what is no model
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise SitelensError(
                f"the model {name!r} brings Python code of its own, which sitelens does not run: {reason} (read that "
                "code and, if you trust it, give load_model(..., trust_remote_code=True) or --trust-remote-code)"
            ) from error
        command = (
            f"get it with `{how_to_get(name)}`" if folder == name else "is it a folder of a causal language model?"
        )
        raise SitelensError(
            f"the model {name!r} could not be loaded: {reason} ({command}; a gated or private model needs "
            "`hf auth login` and its licence accepted on its hub page; without a network, give a local folder or use a "
            "packaged model: " + ", ".join(PACKAGED) + ")"
        ) from error
    model.requires_grad_(False)  # after the bridge is built: it makes new parameters where q, k and v are fused
    # Set only now: a tokenizer given to the builder is reloaded with a BOS token that the model may not know.
    model.tokenizer = tokenizer
    cfg = model.cfg
    cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    cfg.default_prepend_bos = cfg.tokenizer_prepends_bos
    _tokenizers[model] = model.tokenizer, tokenizer
    return resolve_model(model)
