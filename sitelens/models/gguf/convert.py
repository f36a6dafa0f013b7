"""Conversion of one GGUF model to a folder of safetensors, configuration and tokenizer, checked before it is kept."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sitelens.errors import SitelensError
from sitelens.files.folders import CANNOT_WRITE
from sitelens.models.gguf.metadata import config_of
from sitelens.models.gguf.parts import digest_of
from sitelens.models.gguf.tensors import read_gguf, state_dict
from sitelens.models.gguf.tokenizer import end_tokens, gguf_tokenizer
from sitelens.models.networks import load_network, quiet_transformers, several


def convert(files: tuple[Path, ...], work: Path, sha256: str, converter: int) -> Path:
    """The folder in `work` with a GGUF model as float32 weights, configuration and tokenizer, checked."""
    target = work / "new"
    target.mkdir()
    try:
        gguf = read_gguf(files)
        config = config_of(str(files[0]), gguf.values, gguf.shapes, gguf.array)
        with torch.device("meta"):
            network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        state = state_dict(gguf, network)
        config.architectures, config.dtype = [type(network).__name__], "float32"
        _save(state, target / "model.safetensors")
        config.save_pretrained(target)
        generation = GenerationConfig.from_model_config(config)
        generation.eos_token_id = end_tokens(gguf) or generation.eos_token_id
        generation.save_pretrained(target)
        tokenizer = gguf_tokenizer(gguf, work)
        tokenizer.save_pretrained(target)
        _check(target, state, tokenizer)
    except SitelensError:
        raise
    except Exception as error:  # transformers, tokenizers and gguf raise errors of many types for invalid files
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        raise SitelensError(f"{files[0]} could not be read as a GGUF language model: {error}") from error
    listed = {file.name: [file.stat().st_size, digest_of([file])] for file in sorted(target.iterdir())}
    manifest = {"converter": converter, "gguf_sha256": sha256, "files": listed}
    (target / "sitelens.json").write_text(json.dumps(manifest, indent=1))
    return target


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        save_file(state, path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # raised for a full disk, among others
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def _check(folder: Path, state: dict[str, Any], tokenizer: Any) -> None:
    """Load the written folder: weights and tokens must be the same, and logits finite.

    Raises:
        ValueError: if they are not.
    """
    with quiet_transformers():
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = load_network(folder, dtype=torch.float32).eval()
    loaded = network.state_dict()
    if different := [name for name, tensor in state.items() if not loaded[name].equal(tensor)]:
        raise ValueError(f"the written model has other weights: {several(different)}")
    text = "Q: 3 hot cakes\nA:  cold"
    if tokenizer(text)["input_ids"] != again(text)["input_ids"] or tokenizer.chat_template != again.chat_template:
        raise ValueError("the written tokenizer gives other tokens")
    tokens = torch.arange(8)[None] % network.config.vocab_size
    with torch.inference_mode():
        if not torch.isfinite(network(tokens).logits).all():
            raise ValueError("its logits are not finite")
