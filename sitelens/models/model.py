"""The model as used within sitelens: a TransformerBridge with its tokenizer, shape and identity."""

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
    """The number of layers, the number of heads per layer, and the dimension of a head."""

    layers: int
    heads: int
    d_head: int


@dataclass
class _Memory:
    """What has been computed about a bridge, kept as long as it lives. Nothing here may refer to the bridge itself.

    tokenizer: the bridge's tokenizer, the one to use and, if the latter is a changed copy of the former, its state at
        that time (`condition`).
    rules: a tokenizer, its state, and a digest of its rules.
    identity: the latest identity of the network.
    results: the results of `Model.once`.
    lock: held while sitelens runs the bridge itself with its own hooks on it.
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
    """A TransformerBridge with its tokenizer, shape, context length, dtypes and fingerprint.

    Public functions make it with `resolve_model`; within sitelens it is passed on. Models of one bridge are equal and
    share what has been computed about it. That is kept as long as the bridge lives and computed again if the bridge
    changes: weights edited in place, and tokenizers replaced or edited, are noticed.

    Attributes:
        bridge: the TransformerBridge, as users hold it.
        cfg: its configuration.
        network: its Hugging Face network.
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
        """The Model of a bridge; a Model is returned unchanged."""
        return Model(model) if isinstance(model, TransformerBridge) else model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and other.bridge is self.bridge

    def __hash__(self) -> int:
        return hash(self.bridge)

    def __repr__(self) -> str:
        shape = self.shape
        return f"Model({self.name}: {shape.layers} layers x {shape.heads} heads, {str(self.dtype)[6:]})"

    # Name, shape and dtypes

    @property
    def text_config(self) -> Any:
        """The part of the network's configuration that describes the language model."""
        return self.network.config.get_text_config()

    @property
    def name(self) -> str:
        """The name used in messages and tables."""
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
        """The number of tokens in the vocabulary."""
        return self.cfg.d_vocab

    @property
    def context_length(self) -> int | None:
        """The maximum number of tokens in a prompt, or None if the configuration does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def device(self) -> Any:
        """The device of its inputs and logits."""
        return self.cfg.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its activations, which is that of its embeddings (these are never quantized)."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    @property
    def computing_dtype(self) -> torch.dtype:
        """The dtype of alpha and of mixing: float32, or the model's own dtype if that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    # Tokenizer

    @property
    def tokenizer(self) -> Any:
        """The bridge's tokenizer, which adds a BOS token only if its files say so.

        TransformerLens reloads a tokenizer so that it adds a BOS token whether or not the model was trained with one.
        So if a bridge's tokenizer adds one and its files, loaded again, do not, a copy that adds none is used.
        Everything else is the bridge's own: vocabulary, special tokens, chat template. A warning says once what differs
        from the files. A tokenizer without files is used unchanged.

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
        """Give the bridge a tokenizer that is used unchanged, whatever its files say."""
        self.bridge.tokenizer = tokenizer
        self._memory.tokenizer = self.bridge.tokenizer, tokenizer, None

    def tokenization(self) -> str:
        """A hexadecimal digest of everything that determines tokens: rules, vocabulary, special tokens, chat template.

        Raises:
            SitelensError: if the bridge has no tokenizer.
        """
        tokenizer, memory = self.tokenizer, self._memory
        known, state = memory.rules, condition(tokenizer)
        if known is None or known[0] is not tokenizer or known[1] != state:
            known = memory.rules = tokenizer, state, rules(tokenizer)
        return digest([type(tokenizer).__name__, state, known[2]])[:32]

    # Identity

    def identity(self) -> Identity:
        """Its fingerprint and the data behind it. Every tensor is read, except within a block of `unchanged`."""
        settled = _unchanged.get()
        if settled is not None and settled[0] is self.bridge:
            return settled[1]
        identity = self._memory.identity = Identity.of(self.network, self._memory.identity)
        return identity

    def fingerprint(self) -> str:
        """A hexadecimal digest of everything that it computes with (see `sitelens.fingerprint`)."""
        return self.identity().fingerprint

    def weights_digest(self) -> str:
        """A hexadecimal digest of its parameters alone: the same on every machine and with all library versions.

        The fingerprint also covers what libraries and processors compute when a model is loaded, such as rotary
        frequencies.
        """
        return self.identity().weights

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Context manager in which the weights are read once for all fingerprints; the block must not edit them."""
        with bound(_unchanged, (self.bridge, self.identity())):
            yield

    # Lock and cached results of other modules

    @property
    def lock(self) -> threading.RLock:
        """Held while sitelens runs the bridge itself with its own hooks on it."""
        return self._memory.lock

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make()`, computed at the first call with this name and kept as long as the bridge lives.

        It must depend on the architecture only, and must not refer to the bridge or its modules.
        """
        results = self._memory.results
        return results[name] if name in results else results.setdefault(name, make())


Bridge = TransformerBridge  # what users load, and what their own conditions and methods receive
ModelLike = Model | Bridge
ModelSource = Model | Bridge | str | Path  # what public functions accept: also a name, a folder or a file


def z_hook(layer: int) -> str:
    """The hook point of a layer's z, the input of the output projection, `[batch pos head d_head]`."""
    return f"blocks.{layer}.attn.hook_z"


def check_fit(what: str, made_for: str | None, shape: tuple[int, ...], model: ModelLike, origin: Any = None) -> None:
    """Raise SitelensError unless an artifact fits the model.

    Args:
        what: the artifact, for messages.
        made_for: fingerprint of the model that it was made with (None: any model of this shape).
        shape: its (layers, heads, d_head), or the first of these that it has.
        model: the model to check against.
        origin: where it came from, if known (an `Origin`). With it, the same model in another precision, or the same
            weights under another configuration or other library versions, only gives a warning.
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
