"""Texts in, tokens out: as the model's own tokenizer writes them, never cut short, never with a second BOS."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.store.digests import digest

# Behind one of these a text goes on as it does behind a prompt, without the space that many tokenizers put in front of
# a text's first word.
BEGINNINGS = ("\n", "a", ":", ".", "A", "1")
HABITS = (  # what a fast tokenizer has beside its rules
    "add_bos_token", "add_eos_token", "chat_template", "split_special_tokens", "clean_up_tokenization_spaces",
    "add_prefix_space",
)  # fmt: skip
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def encode(texts: Sequence[str], tokenizer: Any, special: bool = True) -> list[list[int]]:
    """The tokens of each text.

    With `special`, a beginning-of-sequence token stands where the tokenizer has the habit of adding one, and stands
    once where the text begins with one already. Nothing is appended: prompts go on.
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
    """How many tokens at the beginning of a row say once more what the tokenizer put `before` it."""
    size, start = len(before), 0
    while size and list(row[start + size : start + 2 * size]) == list(before):
        start += size
    return start


def spans(text: str, tokenizer: Any, special: bool = True) -> list[tuple[int, int]]:
    """Where in a text each token of `encode` stands; (0, 0) for one that the tokenizer adds. For fast tokenizers."""
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, **_WHOLE)
    row, places = found["input_ids"], found["offset_mapping"]
    if not special:
        return places
    before, behind = added(tokenizer)
    return places[doubled(row, before) : len(row) - len(behind)]


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind every text."""
    for text in ("a", "1", ".", "the", "\n"):
        try:
            plain, whole = (_ids([text], tokenizer, special)[0] for special in (False, True))
        except SitelensError:
            continue  # it does not know this sign
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def continuation(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that continues another one, whatever that ends in."""
    for beginning in BEGINNINGS:
        try:
            first, both = _ids([beginning, beginning + text], tokenizer, special=False)
        except SitelensError:
            continue  # it does not know this sign
        if first and both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return _ids([text], tokenizer, special=False)[0]


def as_in_files(given: Any, name: str) -> Any:
    """A bridge's tokenizer with the BOS habit of its files; warns of what else differs, and of files not found."""
    place = str(getattr(given, "name_or_path", "") or "")
    if not place:
        return given
    from transformers import AutoTokenizer

    before, _ = added(given)
    try:
        files = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's class raises
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
    """A copy of a tokenizer that begins texts as another one does, which was loaded from its files."""
    own = copy.deepcopy(tokenizer)
    if getattr(own, "backend_tokenizer", None) is not None and getattr(files, "backend_tokenizer", None) is not None:
        own.backend_tokenizer.post_processor = files.backend_tokenizer.post_processor
        for name in ("_add_bos_token", "_add_eos_token"):
            object.__setattr__(own, name, getattr(files, name, False))
    else:
        own.add_bos_token = getattr(files, "add_bos_token", False)
    return own


def differences(tokenizer: Any, files: Any) -> list[str]:
    """In what a tokenizer differs from the one in its files, in words, but for its BOS and what TransformerLens sets.

    TransformerLens gives a tokenizer that lacks an end-of-sequence, padding or beginning-of-sequence token another one.
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
    """A digest of what a user may edit in a tokenizer; quick, so that of a vocabulary's rules it takes a sample."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    steps = [getattr(backend, step, None) for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    added = {str(place): repr(token) for place, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    habits = [str(getattr(tokenizer, name, None)) for name in HABITS]
    return digest([
        len(tokenizer), [step and _rule(step) for step in steps], special, added, habits, _sample(backend)
    ])  # fmt: skip


def rules(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary and rules, but for the padding and truncation of its last call."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary, and what its class keeps beside it
        merges = {str(pair): rank for pair, rank in getattr(tokenizer, "bpe_ranks", {}).items()}
        model = getattr(tokenizer, "sp_model", None)
        pieces = hashlib.sha256(model.serialized_model_proto()).hexdigest() if model is not None else ""
        return digest([tokenizer.get_vocab(), merges, pieces])
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    except Exception:  # rules written in Python, which interference.py hears
        return digest(tokenizer.get_vocab())
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


_PIECES = ("the", "\u0120the", "\u2581the", "hello", "Question", "internationalization", "1234", ":", "\u00e9t\u00e9")


def _sample(backend: Any) -> list[Any]:
    """How the model of a fast tokenizer divides some words, and its switches."""
    model: Any = getattr(backend, "model", None)
    if model is None:
        return []
    switches = [str(getattr(model, name, None)) for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges")]
    divided = []
    for piece in _PIECES:
        try:
            divided.append([token.id for token in model.tokenize(piece)])
        except Exception:  # no token for what is unknown
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
    except Exception as error:  # each kind of tokenizer has its own
        if len(texts) > 1:  # which one is it?
            return [_ids([text], tokenizer, special)[0] for text in texts]
        raise SitelensError(f"the tokenizer cannot read {texts[0][:200]!r}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
