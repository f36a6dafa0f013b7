"""The model as all of sitelens sees it: a TransformerBridge, and what is known of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformer_lens.model_bridge import TransformerBridge

from sitelens.contexts import bound
from sitelens.errors import SitelensError, warn_once
from sitelens.models.identity import Identity
from sitelens.models.tokenizers import as_in_files, condition, rules
from sitelens.store.digests import digest

T = TypeVar("T")


class HeadShape(NamedTuple):
    """How many layers a model has, how many heads per layer, and how many numbers per head."""

    layers: int
    heads: int
    d_head: int


@dataclass
class _Memory:
    """What has been learned of a bridge, for as long as it lives. Nothing in here may refer to the bridge itself.

    tokenizer: the bridge's tokenizer, the one to be used, and, where the latter was made of the former, what that was
        like then (`condition`).
    rules: a tokenizer, its condition, and a digest of its rules.
    results: what `Model.once` made.
    lock: held by whoever runs the bridge itself with hooks of ours on it.
    """

    tokenizer: tuple[Any, Any, str | None] | None = None
    rules: tuple[Any, str, str] | None = None
    identity: Identity | None = None
    results: dict[str, Any] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


_memories: weakref.WeakKeyDictionary[TransformerBridge, _Memory] = weakref.WeakKeyDictionary()
_memories_lock = threading.Lock()
_unchanged: ContextVar[tuple[TransformerBridge, Identity] | None] = ContextVar("unchanged", default=None)


class Model:
    """A TransformerBridge with its tokenizer, shape, context, dtypes and fingerprint.

    `resolve_model` makes it once at every public door; within sitelens it is handed on. Models of one bridge are equal,
    and share what has been learned of the bridge. That is kept for as long as the bridge lives, and learned anew where
    the bridge has changed: weights edited in place and tokenizers replaced or edited are noticed.

    bridge: the TransformerBridge, as users hold it. cfg: its configuration. network: the Hugging Face network beneath.
    """

    __slots__ = ("_memory", "bridge", "cfg", "network")

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        self.cfg: Any = bridge.cfg
        self.network: Any = bridge.original_model
        with _memories_lock:
            self._memory = _memories.setdefault(bridge, _Memory())

    @staticmethod
    def of(model: Model | TransformerBridge) -> Model:
        """The model around a bridge; a Model as it is."""
        return Model(model) if isinstance(model, TransformerBridge) else model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and other.bridge is self.bridge

    def __hash__(self) -> int:
        return hash(self.bridge)

    def __repr__(self) -> str:
        shape = self.shape
        return f"Model({self.name}: {shape.layers} layers x {shape.heads} heads, {str(self.dtype)[6:]})"

    # What it is

    @property
    def text_config(self) -> Any:
        """The part of the network's configuration that speaks of the language model."""
        return self.network.config.get_text_config()

    @property
    def name(self) -> str:
        """What to call it in messages and tables."""
        return str(getattr(self.cfg, "model_name", None) or type(self.network).__name__)

    @property
    def shape(self) -> HeadShape:
        """(layers, heads, d_head)."""
        return HeadShape(self.cfg.n_layers, self.cfg.n_heads, self.cfg.d_head)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.cfg.d_model

    @property
    def d_vocab(self) -> int:
        """How many tokens it has."""
        return self.cfg.d_vocab

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt may have, where the model says so."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def device(self) -> Any:
        """Where its inputs go and its logits come from."""
        return self.cfg.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its activations: that of its embeddings, which no quantization packs."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    @property
    def computing_dtype(self) -> torch.dtype:
        """The dtype in which alpha is kept and heads are mixed: float32, or the model's own where that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    # Its tokenizer

    @property
    def tokenizer(self) -> Any:
        """The bridge's tokenizer, with the habit of a BOS token that its files give it.

        TransformerLens reloads a tokenizer so that it adds a BOS token whether or not the model was trained with one.
        So where a bridge's tokenizer adds one, its files are loaded once more, and if they add none, a copy of the
        tokenizer that adds none is used. All else is the bridge's own: vocabulary, special tokens, chat template. What
        differs from the files is said once. A tokenizer without files is used as it is.

        Raises:
            SitelensError: if the bridge has no tokenizer.
        """
        given, memory = self.bridge.tokenizer, self._memory
        if given is None:
            raise SitelensError(f"{self.name} has no tokenizer: set model.tokenizer")
        known = memory.tokenizer
        if known is not None and known[0] is given and known[2] is None:
            return known[1]
        state = condition(given)
        if known is None or known[0] is not given or known[2] != state:
            own = as_in_files(given, self.name)
            known = memory.tokenizer = given, own, None if own is given else state
        return known[1]

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Give the bridge a tokenizer that is to be used as it is, whatever its files say."""
        self.bridge.tokenizer = tokenizer
        self._memory.tokenizer = self.bridge.tokenizer, tokenizer, None

    def tokenization(self) -> str:
        """A hexadecimal digest of what makes a text's tokens: rules, vocabulary, special tokens, chat template.

        Raises:
            SitelensError: if the bridge has no tokenizer.
        """
        tokenizer, memory = self.tokenizer, self._memory
        known, state = memory.rules, condition(tokenizer)
        if known is None or known[0] is not tokenizer or known[1] != state:
            known = memory.rules = tokenizer, state, rules(tokenizer)
        return digest([type(tokenizer).__name__, state, known[2]])[:32]

    # What identifies it

    def identity(self) -> Identity:
        """Its fingerprint and what that stands for. Every tensor is read, unless a block of `unchanged` is open."""
        settled = _unchanged.get()
        if settled is not None and settled[0] is self.bridge:
            return settled[1]
        identity = self._memory.identity = Identity.of(self.network, self._memory.identity)
        return identity

    def fingerprint(self) -> str:
        """A hexadecimal digest of all that it computes with (see `sitelens.fingerprint`)."""
        return self.identity().fingerprint

    def weights_digest(self) -> str:
        """A hexadecimal digest of its parameters alone: the same on every machine, whatever the library versions.

        A fingerprint also covers what libraries and processors compute when a model is loaded (rotary
        frequencies, say).
        """
        return self.identity().weights

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Look once at the weights for all that the block asks of their fingerprint: for calls that edit none."""
        with bound(_unchanged, (self.bridge, self.identity())):
            yield

    # What others keep with it

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever runs the bridge itself with hooks of ours on it."""
        return self._memory.lock

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made at the first call with this name in the life of the bridge.

        It must hang on the architecture alone, and hold neither the bridge nor its modules.
        """
        results = self._memory.results
        return results[name] if name in results else results.setdefault(name, make())


Bridge = TransformerBridge  # what users load and hold, and what their own conditions and methods are given
ModelLike = Model | Bridge
ModelSource = Model | Bridge | str | Path  # what public functions take: a name, a folder or a file, too


def z_hook(layer: int) -> str:
    """The hook point of a layer's head outputs before the output projection, `[batch pos head d_head]`."""
    return f"blocks.{layer}.attn.hook_z"


def check_fit(what: str, made_for: str | None, shape: tuple[int, ...], model: ModelLike, origin: Any = None) -> None:
    """Raise SitelensError unless an artifact made for the model with fingerprint `made_for` fits this one.

    `shape` begins with (layers, heads); None as fingerprint means made for any model of that shape. With its `origin`
    (see `sitelens.models.provenance`), the same model in another precision, or the same weights under other library
    versions or another configuration, is a warning.
    """
    model = Model.of(model)
    expected = model.shape[: len(shape)]
    if tuple(shape) != expected:
        names = HeadShape._fields[: len(shape)]
        raise SitelensError(f"{what} has shape {tuple(shape)} ({', '.join(names)}), {model.name} has {expected}")
    if made_for is not None and made_for != model.fingerprint():
        if origin is not None and (precision := origin.other_precision(model)) is not None:
            warn_once(f"{what} was made with {precision}: numbers will differ a little", what)
            return
        if origin is not None and origin.weights is not None and origin.weights == model.weights_digest():
            warn_once(f"{what} was made with the same weights under another configuration or with other versions of "
                      "the libraries: numbers may differ a little", what)  # fmt: skip
            return
        raise SitelensError(
            f"{what} was made with another model (fingerprint {made_for[:12]}) than {model.name} "
            f"({model.fingerprint()[:12]}); dataclasses.replace(..., model=None) lifts this check"
        )
