"""Models: names, folders and files in, frozen TransformerBridge out; and the facts about one that others need.

All that differs from model to model (where weights come from, whose tokenizer it is, what identifies it) is here.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos

from sitelens.conversion import PACKAGED, gguf_folder, packaged_folder, quiet_transformers
from sitelens.defaults import SitelensError, SitelensWarning
from sitelens.store import digest, tensor_bytes

Model = TransformerBridge

DEFAULT_MODEL = "smollm2-135m"
SAMPLED = 64  # elements of each tensor that are looked at to see whether a fingerprint is still valid


def load_model(
    name: str | Path | Model | None = None, *, dtype: torch.dtype | str | None = None, device: Any = None
) -> Model:
    """A model with frozen weights and TransformerLens hook points.

    `name` is a packaged model (default: "smollm2-135m"), a hub id, a local folder, a .gguf file, or a
    TransformerBridge, which is returned as it is. `dtype` defaults to float32 for GGUF weights and to the
    checkpoint's own otherwise; `device` to a GPU where there is one.

    Raises:
        SitelensError: for an unknown model (with the nearest names), or weights that cannot be had.
    """
    if isinstance(name, TransformerBridge):
        return name
    name = DEFAULT_MODEL if name is None else str(name)
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise SitelensError(f"unknown dtype {dtype!r}; write for example 'float32' or 'bfloat16'")
        dtype = found
    if name in PACKAGED:
        folder, dtype = packaged_folder(name), dtype or torch.float32
    elif name.endswith(".gguf"):
        folder, dtype = gguf_folder(Path(name).expanduser()), dtype or torch.float32
    elif name and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = name  # a hub id
    else:
        near = difflib.get_close_matches(name.lower(), list(PACKAGED), n=2, cutoff=0.4) or list(PACKAGED)
        raise SitelensError(
            f"unknown model {name!r}: did you mean {' or '.join(near)}? "
            "Otherwise give a hub id (owner/name), a folder, or a .gguf file that exists"
        )
    return _boot(folder, name, dtype or "auto", device or ("cuda" if torch.cuda.is_available() else "cpu"))


@functools.cache
def default_model() -> Model:
    """The packaged default model, loaded once a process."""
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
    if model.original_model.training:
        raise SitelensError(f"{model_name(model)} is in training mode, where dropout is random: call model.eval()")
    return model


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
    return getattr(_text_config(model), "max_position_embeddings", None)


def computing_dtype(model: Model) -> torch.dtype:
    """The dtype in which alpha is kept and heads are mixed: float32, or the model's own where that is wider."""
    return torch.promote_types(next(model.original_model.parameters()).dtype, torch.float32)


# model -> the tokenizer it was given, and the one to be used
_tokenizers: weakref.WeakKeyDictionary[Model, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def own_tokenizer(model: Model) -> Any:
    """The model's tokenizer with its own habit of special tokens.

    TransformerLens reloads a tokenizer so that it adds a BOS token whether or not the model was trained with one;
    for a bridge that was not made by `load_model` the tokenizer is therefore loaded once more as it is.

    Raises:
        SitelensError: if the bridge has no tokenizer.
    """
    given = model.tokenizer
    if given is None:
        raise SitelensError(f"{model_name(model)} has no tokenizer: set model.tokenizer")
    if model not in _tokenizers or _tokenizers[model][0] is not given:
        own = given
        if Path(str(given.name_or_path)).is_dir() or str(given.name_or_path).count("/") == 1:
            from transformers import AutoTokenizer

            try:
                own = AutoTokenizer.from_pretrained(given.name_or_path, local_files_only=True)
            except (OSError, ValueError):
                warnings.warn(f"the tokenizer of {model_name(model)} could not be loaded anew: it is used as it is, "
                              "which may add a BOS token", SitelensWarning, stacklevel=2)  # fmt: skip
        _tokenizers[model] = given, own
    return _tokenizers[model][1]


_fingerprints: weakref.WeakKeyDictionary[Model, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: Model) -> str:
    """A hexadecimal digest of the model's weights, dtype and rotary and window settings included.

    Edited or quantised models differ from their originals.

    It is computed once and kept while no tensor has been replaced, changed in place or differs in a sample of its
    elements; so a change of single elements through `.data` may go unseen.
    """
    settled = _settled.get()
    if settled is not None and settled[0] is model:
        return settled[1]
    architecture = _architecture(model)
    state = hashlib.sha256(digest(architecture).encode())
    samples = []
    for tensor in _tensors(model.original_model):
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED])
        version = 0 if tensor.is_inference() else tensor._version  # those of inference mode do not count changes
        state.update(f"{tensor.data_ptr()} {version} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for dtype, device in dict.fromkeys((sample.dtype, sample.device) for sample in samples):
        alike = [sample for sample in samples if (sample.dtype, sample.device) == (dtype, device)]
        state.update(tensor_bytes(torch.cat(alike).cpu()))
    key = state.hexdigest()
    known = _fingerprints.get(model)
    if known is None or known[0] != key:
        tensors = _weights(model)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the interpreter lock
            sums = list(pool.map(_tensor_digest, tensors.values()))
        named = [[name, *rest] for name, rest in zip(tensors, sums, strict=True)]
        known = key, digest([named, architecture])[:32]
        _fingerprints[model] = known
    return known[1]


_settled: ContextVar[tuple[Model, str] | None] = ContextVar("settled", default=None)


@contextmanager
def unchanged(model: Model) -> Iterator[None]:
    """Look once at the weights for all that the block asks of their fingerprint: for calls that edit none."""
    token = _settled.set((model, fingerprint(model)))
    try:
        yield
    finally:
        _settled.reset(token)


def check_fit(what: str, made_for: str | None, shape: tuple[int, ...], model: Model) -> None:
    """Raise SitelensError unless an artifact made for the model with fingerprint `made_for` fits this one.

    `shape` begins with (layers, heads); None as fingerprint means made for any model of that shape.
    """
    expected = head_shape(model)[: len(shape)]
    if tuple(shape) != expected:
        names = ("layers", "heads", "d_head")[: len(shape)]
        raise SitelensError(f"{what} has shape {tuple(shape)} ({', '.join(names)}), {model_name(model)} has {expected}")
    if made_for is not None and made_for != fingerprint(model):
        raise SitelensError(
            f"{what} was made with another model (fingerprint {made_for[:12]}) than {model_name(model)} "
            f"({fingerprint(model)[:12]}); dataclasses.replace(..., model=None) lifts this check"
        )


def _tensors(network: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and persistent buffers in their order, each once, as `_weights` finds them in ten times the time."""
    found: dict[int, torch.Tensor] = {}
    modules, seen = [network], {id(network)}
    while modules:
        module = modules.pop()
        buffers = module._buffers.items()
        kept = [buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *kept):
            if tensor is not None:
                found[id(tensor)] = tensor
        for child in module._modules.values():
            if child is not None and id(child) not in seen and type(child) is not HookPoint:
                seen.add(id(child))
                modules.append(child)
    return list(found.values())


def _weights(model: Model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names they have outside of the bridge, each once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(model.original_model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen and isinstance(tensor, torch.Tensor):
            seen.add(id(tensor))
            found[name.replace("._original_component", "")] = tensor
    return found


def _architecture(model: Model) -> dict[str, str]:
    """What the same weights compute differently with."""
    config = _text_config(model)
    facts = (
        "rope_parameters", "sliding_window", "layer_types", "num_experts_per_tok", "attn_logit_softcapping",
        "final_logit_softcapping", "query_pre_attn_scalar", "rms_norm_eps", "layer_norm_eps", "hidden_act",
    )  # fmt: skip
    return {fact: json.dumps(getattr(config, fact, None), sort_keys=True, default=str) for fact in facts}


def _text_config(model: Model) -> Any:
    config: Any = model.original_model.config
    return config.get_text_config()


def _tensor_digest(tensor: torch.Tensor) -> list[Any]:
    value = tensor.detach().contiguous().cpu()
    return [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]


def _boot(folder: str | Path, name: str, dtype: torch.dtype | str, device: Any) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            network, found = loaded
            if found["missing_keys"]:
                raise ValueError(f"it has no weights {', '.join(sorted(found['missing_keys'])[:3])}, ...")
            network = network.to(device).eval()
        model = build_bridge_from_module(
            network, type(network).__name__, hf_config=network.config, device=str(device), model_name=name
        )
    except Exception as error:  # each library below us raises its own kinds for what is no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SitelensError(
            f"the model {name!r} could not be loaded: {reason} (a gated or private model needs `hf auth login`; "
            "without a network, give a local folder or use a packaged model: " + ", ".join(PACKAGED) + ")"
        ) from error
    model.requires_grad_(False)  # after the bridge is built: it makes new parameters where q, k and v are fused
    # Set only now: a tokenizer given to the builder is reloaded with a BOS token that the model may not know.
    model.tokenizer = tokenizer
    cfg = model.cfg
    cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    cfg.default_prepend_bos = cfg.tokenizer_prepends_bos
    _tokenizers[model] = model.tokenizer, tokenizer
    return resolve_model(model)
