"""4-bit weights as the paper uses for its large models: NF4 with double quantization, by bitsandbytes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from sitelens.errors import SitelensError
from sitelens.suggestions import nearest

NO_8BIT = (
    "8-bit weights are refused: bitsandbytes rounds activations by what else is in the batch, so that the logits of a "
    "cached prefix and those of the whole prompt differ by more than a unit; use quantize='nf4', or bfloat16"
)


def check_quantization(name: str) -> None:
    """Raise SitelensError unless `name` is "nf4" and bitsandbytes is installed."""
    if name in ("int8", "8bit", "8-bit", "llm.int8"):
        raise SitelensError(NO_8BIT)
    if name != "nf4":
        hint = " did you mean 'nf4'?" if nearest(name, ["nf4"]) else ""
        raise SitelensError(f"unknown quantisation {name!r}:{hint} 'nf4' is the only one (4-bit, as in the paper)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SitelensError("quantize='nf4' needs bitsandbytes: pip install 'sitelens[quantized]'")


def nf4_config(dtype: torch.dtype) -> Any:
    """The paper's 4-bit settings for transformers, with the computation in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def settle(network: nn.Module) -> None:
    """Finish 4-bit loading: quantize the experts as well, and keep the packed weights fixed.

    transformers 5 stores the experts of a layer in fused tensors that 4-bit loading skips. They are packed here in
    place, so loading temporarily needs memory for the unpacked experts. They are unpacked one layer at a time in the
    forward pass and again in the backward pass, so only a layer's inputs are kept for the gradient.

    On some processors, a first forward pass without gradient would repack the weights with scales rounded to bfloat16.
    Its results would differ from those of a pass with gradient, and its weights from those fingerprinted; so this is
    turned off.
    """
    from bitsandbytes.nn.modules import Linear4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name, module in network.named_modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        fused = [key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
        if fused and name.rpartition(".")[2] == "experts":
            for key in fused:
                replace_parameter_4bit(module, key, compress_statistics=True, quant_type="nf4")
            experts: Any = module
            experts.forward = functools.partial(_unpacked_anew, experts.forward)


def _unpacked_anew(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run `forward` so that no unpacked weight is kept for the gradient; each is unpacked once per run."""

    def run(*inputs: Any) -> Tensor:
        with parametrize.cached():
            return forward(*inputs)

    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return checkpoint(run, *inputs, use_reentrant=False)
    return run(*inputs)
