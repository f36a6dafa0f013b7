"""The tokenizer in a GGUF file's metadata, including whether it adds BOS and EOS."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.models.gguf.tensors import GGUF
from sitelens.models.networks import quiet_transformers

# Ways of cutting a text before merging (tokenizer.ggml.pre) for which GPT-2's rule gives the same tokens.
GPT2_LIKE = {
    "default", "gpt-2", "gpt2", "mpt", "olmo", "phi-2", "jais", "trillion",
    # These cut numbers into digits, and so have no token of two digits to merge into:
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
}  # fmt: skip


def gguf_tokenizer(gguf: GGUF, work: Path) -> Any:
    """The tokenizer of a GGUF model, as transformers rebuilds it, adding BOS and EOS as the file says.

    Raises:
        SitelensError: if it cannot be rebuilt exactly.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    alone = work / "alone"  # in its own folder: transformers would mix in tokenizer files next to the model
    alone.mkdir()
    (alone / "model.gguf").symlink_to(gguf.files[0].resolve())
    try:
        with quiet_transformers():
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
            except Exception:  # it also reads the configuration, which is not supported for every architecture
                tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf")
    except Exception as error:  # transformers' readers raise errors of many types
        raise SitelensError(f"{gguf.files[0]}: its tokenizer could not be rebuilt: {error}") from error
    _warn_of_cutting(gguf)
    _add_as_the_file_says(gguf, tokenizer)
    prefix = gguf.values.get("tokenizer.ggml.add_space_prefix")
    if prefix is not None and tokenizer.tokenize("a")[0].startswith(("▁", "Ġ")) != prefix:
        raise SitelensError(
            f"{gguf.files[0]}: its metadata tokenizer.ggml.add_space_prefix = {prefix} is not what transformers makes "
            "of its tokenizer. Load the original Hugging Face checkpoint instead"
        )
    return tokenizer


def end_tokens(gguf: GGUF) -> list[int] | int | None:
    """Ids of the tokens that end a text, or a turn or message if the file defines them."""
    ids = [gguf.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(int(one) for one in ids if one is not None))
    return distinct if len(distinct) > 1 else next(iter(distinct), None)


def _warn_of_cutting(gguf: GGUF) -> None:
    """Warn if transformers has no rule for the file's pre-tokenization and uses GPT-2's."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return
    rule = gguf.values.get("tokenizer.ggml.pre", "default")
    if gguf.values.get("tokenizer.ggml.model") == "gpt2" and rule not in GPT2_LIKE | set(GGUF_PRE_TOKENIZER_SPLITS):
        warnings.warn(
            f"{gguf.files[0]}: its texts are cut by the rule {rule!r} (tokenizer.ggml.pre), which transformers does "
            "not know: it cuts them as GPT-2 does, and some texts may have other tokens. Set model.tokenizer to the "
            "original model's tokenizer", SitelensWarning, stacklevel=2,
        )  # fmt: skip


def _add_as_the_file_says(gguf: GGUF, tokenizer: Any) -> None:
    """Add BOS and EOS exactly as the file's metadata say; if they say nothing, as transformers does."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("a")["input_ids"]
    usual = {"bos": bos is not None and ids[:1] == [bos], "eos": eos is not None and ids[-1:] == [eos]}
    added = {name: bool(gguf.values.get(f"tokenizer.ggml.add_{name}_token", usual[name])) for name in usual}
    if (added["bos"] and bos is None) or (added["eos"] and eos is None):
        raise SitelensError(f"{gguf.files[0]}: it adds a BOS or EOS token to each text and does not say which")
    if added == usual:
        return
    start = f"{tokenizer.bos_token} " if added["bos"] else ""
    end = f" {tokenizer.eos_token}" if added["eos"] else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start}$A{end}", pair=f"{start}$A{end} {start}$B:1{end}",
        special_tokens=[(tokenizer.bos_token, bos)] * added["bos"] + [(tokenizer.eos_token, eos)] * added["eos"],
    )  # fmt: skip
