"""Tokenization as by the model's own tokenizer: never truncated, and never with a second BOS token."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.store.digests import digest

# After one of these, a text is tokenized as after a prompt: without the space that many tokenizers put before the first
# word of a text.
BEGINNINGS = ("\n", "a", ":", ".", "A", "1")
HABITS = (  # settings of a fast tokenizer in addition to its rules
    "add_bos_token", "add_eos_token", "chat_template", "split_special_tokens", "clean_up_tokenization_spaces",
    "add_prefix_space",
)  # fmt: skip
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def encode(texts: Sequence[str], tokenizer: Any, special: bool = True) -> list[list[int]]:
    """The token ids of each text.

    With `special`, a beginning-of-sequence token is added if the tokenizer does so by itself, but not twice if the text
    already begins with one. Nothing is appended, because prompts are continued.
    """
    if not texts:
        return []
    rows = _ids(list(texts), tokenizer, special)
    if not special:
        return rows
    before, behind = added(tokenizer)
    rows = [row[: len(row) - len(behind)] for row in rows]
    return [row[doubled(row, before) :] for row in rows]


def doubled(row: Sequence[int], before: Sequence[int]) -> int:
    """The number of tokens at the beginning of a row that repeat the tokens `before` which the tokenizer prepended."""
    size, start = len(before), 0
    while size and list(row[start + size : start + 2 * size]) == list(before):
        start += size
    return start


def spans(text: str, tokenizer: Any, special: bool = True) -> list[tuple[int, int]]:
    """The (start, end) of each token of `encode` in the text; (0, 0) for added tokens. For fast tokenizers only."""
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, **_WHOLE)
    row, places = found["input_ids"], found["offset_mapping"]
    if not special:
        return places
    before, behind = added(tokenizer)
    return places[doubled(row, before) : len(row) - len(behind)]


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after every text."""
    for text in ("a", "1", ".", "the", "\n"):
        try:
            plain, whole = (_ids([text], tokenizer, special)[0] for special in (False, True))
        except SitelensError:
            continue  # the tokenizer cannot read this character
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def continuation(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that continues another one, independently of how that ends."""
    for beginning in BEGINNINGS:
        try:
            first, both = _ids([beginning, beginning + text], tokenizer, special=False)
        except SitelensError:
            continue  # the tokenizer cannot read this character
        if first and both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return _ids([text], tokenizer, special=False)[0]


def as_in_files(given: Any, name: str) -> Any:
    """A bridge's tokenizer, which adds a BOS token only if its files say so.

    Warns of other differences from the files, and if they cannot be loaded although a BOS token is added.

    Args:
        given: the bridge's tokenizer.
        name: the model's name, for warnings.
    """
    place = str(getattr(given, "name_or_path", "") or "")
    if not place:
        return given
    from transformers import AutoTokenizer

    before, _ = added(given)
    try:
        files = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class raises its own exceptions
        if before:
            warnings.warn(
                f"the tokenizer of {name} could not be loaded anew from {place} ({first_line(error)}): it is used as "
                "it is, which may add a BOS token that the model does not know", SitelensWarning, stacklevel=4,
            )  # fmt: skip
        return given
    notes = []
    own = given
    if before and before != added(files)[0]:
        own = without_added_bos(given, files)
        notes.append(f"it begins each text with {given.decode(before)!r}, which they do not: sitelens leaves that out")
    if more := differences(given, files):
        notes.append(f"its {', '.join(more)} {'is' if len(more) == 1 else 'are'} not theirs: the bridge's own counts")
    if notes:
        warnings.warn(f"the tokenizer of the bridge {name} differs from its files ({place}): {'; '.join(notes)}",
                      SitelensWarning, stacklevel=4)  # fmt: skip
    return own


def without_added_bos(tokenizer: Any, files: Any) -> Any:
    """A copy of a tokenizer that adds the same special tokens as `files`, the tokenizer loaded from its files."""
    own = copy.deepcopy(tokenizer)
    if getattr(own, "backend_tokenizer", None) is not None and getattr(files, "backend_tokenizer", None) is not None:
        own.backend_tokenizer.post_processor = files.backend_tokenizer.post_processor
        for name in ("_add_bos_token", "_add_eos_token"):
            object.__setattr__(own, name, getattr(files, name, False))
    else:
        own.add_bos_token = getattr(files, "add_bos_token", False)
    return own


def differences(tokenizer: Any, files: Any) -> list[str]:
    """How a tokenizer differs from the one in its files, in words, apart from the BOS token that it adds.

    Special tokens that the files lack do not count: TransformerLens sets missing EOS, padding and BOS tokens.
    """
    found = []
    ours, theirs = tokenizer.get_vocab(), files.get_vocab()
    special = {name: _special(tokenizer, name) for name in SPECIAL}
    changed = [name for name, text in special.items() if _special(files, name) not in (None, text)]
    lent = {text for name, text in special.items() if _special(files, name) is None}
    more = [token for token in ours if token not in theirs and token not in lent]
    if more:
        found.append(f"{len(more)} more tokens ({', '.join(map(repr, sorted(more)[:3]))})")
    if any(ours.get(token) != place for token, place in theirs.items()):
        found.append("vocabulary")
    found += [name.replace("_", " ") for name in changed]
    if tokenizer.chat_template != files.chat_template:
        found.append("chat template")
    return found


def condition(tokenizer: Any) -> str:
    """A fast digest of what a user may edit in a tokenizer; the model's rules are only sampled."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    steps = [getattr(backend, step, None) for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {str(place): repr(token) for place, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    habits = [str(getattr(tokenizer, name, None)) for name in HABITS]
    return digest([
        len(tokenizer), [step and _rule(step) for step in steps], special, added, habits, _sample(backend)
    ])  # fmt: skip


def rules(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary and rules, without the padding and truncation settings of its last call."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python: its vocabulary, merges and SentencePiece model
        merges = {str(pair): rank for pair, rank in getattr(tokenizer, "bpe_ranks", {}).items()}
        model = getattr(tokenizer, "sp_model", None)
        pieces = hashlib.sha256(model.serialized_model_proto()).hexdigest() if model is not None else ""
        return digest([tokenizer.get_vocab(), merges, pieces])
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    except Exception:  # rules written in Python, which `heard_in_tokenizer` detects
        return digest(tokenizer.get_vocab())
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


_PIECES = ("the", "\u0120the", "\u2581the", "hello", "Question", "internationalization", "1234", ":", "\u00e9t\u00e9")


def _sample(backend: Any) -> list[Any]:
    """The switches of a fast tokenizer's model, and how it splits some words."""
    model: Any = getattr(backend, "model", None)
    if model is None:
        return []
    switches = [str(getattr(model, name, None)) for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges")]
    divided = []
    for piece in _PIECES:
        try:
            divided.append([token.id for token in model.tokenize(piece)])
        except Exception:  # an unknown character, and no unk token
            divided.append([])
    return [type(model).__name__, switches, divided]


def _rule(step: Any) -> str:
    try:
        return step.__getstate__().hex()
    except Exception:  # a rule written in Python
        return type(step).__name__


def _special(tokenizer: Any, name: str) -> str | None:
    token = getattr(tokenizer, name, None)
    return None if token is None else str(token)


_WHOLE: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}


def _ids(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    try:
        return tokenizer(texts, add_special_tokens=special, **_WHOLE)["input_ids"]
    except Exception as error:  # each tokenizer class raises its own exceptions
        if len(texts) > 1:  # find the text that fails
            return [_ids([text], tokenizer, special)[0] for text in texts]
        raise SitelensError(f"the tokenizer cannot read {texts[0][:200]!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
