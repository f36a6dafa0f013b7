"""A tiny random model that knows the words of a few built-in tasks, so that docstring examples take milliseconds."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from sitelens.methods.site.config import TrainConfig
from sitelens.models.model import Bridge
from sitelens.tasks import load_task
from tests import micro

TASKS = ["antonym", "capitalize", "choose_first_of_3", "country-capital", "present-past", "synonym"]
CONFIG = TrainConfig(n_steps=4, eval_every=2, n_valid=4)
PATTERN = r"\n\n|\n| ?[^\s:,]+|[:,]| "  # a space belongs to the following word, as in byte-level BPE


def tokenizer() -> Any:
    """A tokenizer of whole words and the signs that occur in the prompts of `TASKS`."""
    tasks = map(load_task, TASKS)
    pairs = [pair for task in tasks for pair in (*task.train, *task.valid, *task.test)]
    texts = ["Q: \nA: \n\n", *(text for pair in pairs for text in (pair.input, *pair.answers))]
    words = sorted({word.strip(" ") for text in texts for word in re.findall(PATTERN, text)} - {""})
    entries = ["<pad>", "<bos>", "<eos>", "<unk>", " ", *words, *(f" {word}" for word in words)]
    model = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    model.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def network() -> Any:
    """A transformers Llama with 2 layers, 4 heads per layer and random weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def model() -> Bridge:
    """The network as a TransformerBridge."""
    return micro.bridged(network(), "tiny", tokenizer())
