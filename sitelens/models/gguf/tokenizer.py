"""The tokenizer in a GGUF file's metadata, with its habits of adding tokens checked."""

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
        SitelensError: if transformers cannot rebuild it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    alone = work / "alone"  # transformers would mix in tokenizer files that lie beside the model
    alone.mkdir()
    (alone / "model.gguf").symlink_to(gguf.files[0].resolve())
    try:
        with quiet_transformers():
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
            except Exception:  # it reads the configuration too, and not that of every architecture
                tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf")
    except Exception as error:  # transformers' readers raise what they meet
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
    """The ids after which a text ends: of the text, and of a turn or a message where the file names them."""
    ids = [gguf.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(int(one) for one in ids if one is not None))
    return distinct if len(distinct) > 1 else next(iter(distinct), None)


def _warn_of_cutting(gguf: GGUF) -> None:
    """Say where transformers knows no rule for cutting texts before merging, and takes GPT-2's."""
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
    """Have BOS and EOS added exactly where the file's metadata say so; where they say nothing, as transformers does."""
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
