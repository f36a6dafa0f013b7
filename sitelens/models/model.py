"""What others need to know of a model: its shape, context, dtype and tokenizer, and whether an artifact fits it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from sitelens.errors import SitelensError, warn_once
from sitelens.models.fingerprints import fingerprint, text_config, weights_digest
from sitelens.models.tokenizers import as_in_files, condition, rules
from sitelens.store.digests import digest

Model = TransformerBridge


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
    (see `sitelens.models.provenance`), the same model in another precision, or the same weights under other library
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
