"""What the library must compute, done slowly on raw Hugging Face models, without sharing code with the library.

One row at a time, whole prompts, no padding, no cache: forward pre-hooks on the attention output projections edit or
record the heads' outputs z at one position.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests import micro

Ids = Sequence[int]


def encode(text: str, bos: bool = False) -> list[int]:
    """Token ids of one text."""
    return micro.tokenizer(bos)(text)["input_ids"]


def mixed(z: Tensor, alpha: Tensor, vectors: Tensor, mixing: str = "convex") -> Tensor:
    """The intervention on z `[head d_head]`; alpha is `[head]`."""
    weight = alpha.unsqueeze(-1)
    return (1 - weight) * z + weight * vectors if mixing == "convex" else z + weight * vectors


@contextmanager
def patched(network: Any, alpha: Tensor, vectors: Tensor, mixing: str = "convex", at: int = -1) -> Iterator[None]:
    """Within it, all heads are patched at position `at`; alpha is `[layer head]`, vectors `[layer head d_head]`."""

    def hook(layer: int) -> Callable[..., Any]:
        def act(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0]
            here = at % z.shape[1]
            heads = z[0, here].unflatten(-1, vectors.shape[1:]).to(alpha.dtype)
            edited = mixed(heads, alpha[layer], vectors[layer], mixing).to(z.dtype).reshape(1, 1, -1)
            return (torch.cat([z[:, :here], edited, z[:, here + 1 :]], dim=1), *args[1:])

        return act

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(micro.output_projections(network))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(network: Any, ids: Ids) -> Tensor:
    """Logits `[vocab]` after the last token of one prompt, with whatever hooks are installed."""
    return network(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def patched_logits(
    network: Any, rows: Sequence[Ids], alpha: Iterable[Tensor], vectors: Iterable[Tensor], mixing: str = "convex"
) -> Tensor:
    """Logits `[row vocab]`, differentiable in alpha `[row layer head]` and vectors `[row layer head d_head]`."""
    found = []
    for ids, row_alpha, row_vectors in zip(rows, alpha, vectors, strict=True):
        with patched(network, row_alpha, row_vectors, mixing):
            found.append(logits(network, ids))
    return torch.stack(found)


@torch.no_grad()
def head_outputs(network: Any, rows: Sequence[Ids], heads: int) -> Tensor:
    """z at the last token of each row, `[row layer head d_head]`."""
    captured: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: captured.append(args[0][0, -1].unflatten(-1, (heads, -1))))
        for module in micro.output_projections(network)
    ]
    for ids in rows:
        logits(network, ids)
    for handle in handles:
        handle.remove()
    return torch.stack(captured).unflatten(0, (len(rows), -1))


@torch.no_grad()
def greedy(network: Any, ids: Ids, new: int) -> list[int]:
    """`new` greedy tokens, never stopping early; the whole text is run again for each token, with the current hooks."""
    text = list(ids)
    for _ in range(new):
        text.append(int(logits(network, text).argmax()))
    return text[len(ids) :]


def patched_greedy(
    network: Any, ids: Ids, new: int, alpha: Tensor, vectors: Tensor, mixing: str = "convex"
) -> list[int]:
    """As `greedy`, with all heads patched at the last token of the prompt only."""
    with patched(network, alpha, vectors, mixing, at=len(ids) - 1):
        return greedy(network, ids, new)


def text_of(ids: Ids, ends: Collection[int] = (2,)) -> str:
    """The generated text up to an end token or the first newline after a word, stripped, without special tokens."""
    kept = itertools.takewhile(lambda token: token not in ends, ids)
    return micro.tokenizer().decode(list(kept), skip_special_tokens=True).strip().split("\n")[0].strip()


@contextmanager
def added_to_stream(network: Any, vector: Tensor, reach: slice) -> Iterator[None]:
    """A context manager that adds `vector` to the residual stream after the first layer, at the positions `reach`."""

    def act(module: Any, args: Any, output: Any) -> Any:
        resid = (output if isinstance(output, Tensor) else output[0]).clone()
        resid[:, reach] += vector
        return resid if isinstance(output, Tensor) else (resid, *output[1:])

    first = next(m for name, m in network.named_modules() if name.endswith((".h.0", ".layers.0")))
    handle = first.register_forward_hook(act)
    try:
        yield
    finally:
        handle.remove()
