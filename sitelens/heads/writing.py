"""What heads write: direct logit attribution, with the norms' scales as they are in the prompt."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from sitelens.embedding import TaskEmbedding, embedding_prompts
from sitelens.forward import capture_z
from sitelens.heads.common import checked_heads, like_prompts, per_head, valid_items, watch
from sitelens.models import Model, computing_dtype, context_length, own_tokenizer, resolve_model
from sitelens.prompts import PromptBatch, few_shot_prompts, tokenize
from sitelens.tasks import Task, load_task


def head_attribution(
    task: Task | str,
    model: Model | str | None = None,
    *,
    embedding: TaskEmbedding | None = None,
    n_items: int = 20,
    n_shots: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Direct logit attribution of every head to the answer: one row a head, columns layer, head, attribution.

    The mean over the first `n_items` validation items of the logit that the head's output at the last prompt token
    writes for the answer's first token, past the mean of the vocabulary, with every norm's scale as it is in that
    prompt. With `embedding` the head's output is the task embedding's instead of the prompt's own.

    Raises:
        SitelensError: for an unknown task, no validation items, or an embedding of another model.
    """
    task, model = load_task(task), resolve_model(model)
    items = valid_items(task)[:n_items]
    prompts = few_shot_prompts(task, items, n_shots, own_tokenizer(model), seed, "valid", range(len(items)))
    batch = tokenize(prompts, own_tokenizer(model), context_length(model), f"task {task.name!r}")
    totals = []
    for index in like_prompts(batch, model):
        part = batch.rows(index)
        if embedding is not None:
            embedding.check_fits(model)
            z = repeat(embedding.mean_z, "layer head d -> row layer head d", row=len(part))
        else:
            z = capture_z(part, model)
        totals.append(_direct_logits(z, part, model).sum(0).cpu())
    return per_head(sum(totals[1:], totals[0]) / len(items), "attribution")


def written_tokens(
    embedding: TaskEmbedding,
    head: tuple[int, int],
    task: Task | str,
    model: Model | str | None = None,
    *,
    n: int = 10,
) -> pd.DataFrame:
    """The tokens that a head's part of the task embedding promotes and suppresses most: columns token, logit.

    Logits are direct (nothing between the head and the unembedding), past the vocabulary's mean; means over some of
    the prompts that the embedding was measured on, whose norms' scales are used. The n highest, then the n lowest.

    Raises:
        SitelensError: if there is no such head, or the embedding comes from another model.
    """
    task, model = load_task(task), resolve_model(model)
    embedding.check_fits(model)
    layer, place = checked_heads([head], model)[0]
    tokenizer = own_tokenizer(model)
    prompts = embedding_prompts(task, tokenizer, min(8, embedding.n_prompts), embedding.n_shots, embedding.seed)
    batch = tokenize(prompts, tokenizer, context_length(model), f"task {task.name!r}")
    factors = [factor for index in like_prompts(batch, model) for factor in _Norms.at_the_end(batch.rows(index), model)]
    unembed = model.W_U.to(model.cfg.device, computing_dtype(model))
    direction = unembed - unembed.mean(-1, keepdim=True)
    z = embedding.mean_z[layer, place].to(model.cfg.device, unembed.dtype)
    write = z @ output_weights(layer, model)[place].to(z.device)
    logits = torch.stack([norms.through(write, layer) @ direction for norms in factors]).mean(0)
    order = logits.argsort(descending=True).tolist()
    chosen = [*order[:n], *order[len(order) - n :]]
    return pd.DataFrame({"token": [tokenizer.decode([i]) for i in chosen], "logit": logits[chosen].tolist()})


@dataclass(frozen=True, eq=False)
class _Norms:
    """What the norms between a head and the logits do at the last token of one prompt, their scales held fixed.

    final: weight / scale of the final norm; after: likewise of the norm behind a layer's attention, where the model
    has one (Gemma). centred: whether the final norm takes the mean away (LayerNorm).
    """

    final: Float[Tensor, " d_model"]
    after: dict[int, Float[Tensor, " d_model"]]
    centred: bool

    @staticmethod
    def at_the_end(batch: PromptBatch, model: Model) -> list[_Norms]:
        """Of every prompt of a batch of one length."""
        scales: dict[str, Tensor] = {}
        behind = {i: f"blocks.{i}.ln1_post" for i in range(model.cfg.n_layers)}
        behind = {i: name for i, name in behind.items() if f"{name}.hook_scale" in model.hook_dict}
        names = ["ln_final", *behind.values()]

        def keep(scale: Tensor, name: str) -> None:
            scales[name] = scale[:, -1, 0].to(model.cfg.device, computing_dtype(model))

        watch(batch.tokens, model, {f"{name}.hook_scale": functools.partial(keep, name=name) for name in names})
        weights = {name: _norm_weight(name, model) for name in names}
        centred = not model.cfg.uses_rms_norm
        return [
            _Norms(weights["ln_final"] / scales["ln_final"][row],
                   {layer: weights[name] / scales[name][row] for layer, name in behind.items()}, centred)
            for row in range(len(batch))
        ]  # fmt: skip

    def through(self, write: Float[Tensor, "*n d_model"], layer: int) -> Float[Tensor, "*n d_model"]:
        """A layer's write to the residual stream as it reaches the unembedding."""
        write = write * self.after[layer] if layer in self.after else write
        return (write - write.mean(-1, keepdim=True) if self.centred else write) * self.final


def _direct_logits(
    z: Float[Tensor, "row layer head d_head"], batch: PromptBatch, model: Model
) -> Float[Tensor, "row layer head"]:
    """Each head's direct contribution to the logit of the row's answer, past the vocabulary's mean."""
    dtype, device = computing_dtype(model), model.cfg.device
    unembed = model.W_U.to(device, dtype)
    directions = unembed[:, batch.answer.to(device)].T - unembed.mean(-1)
    norms = _Norms.at_the_end(batch, model)
    layers = []
    for layer in range(model.cfg.n_layers):
        write = einsum(z[:, layer].to(device, dtype), output_weights(layer, model).to(device),
                       "row head d, head d d_model -> row head d_model")  # fmt: skip
        through = torch.stack([own.through(rows, layer) for own, rows in zip(norms, write, strict=True)])
        layers.append(einsum(through, directions, "row head d_model, row d_model -> row head"))
    return torch.stack(layers, dim=1)


def output_weights(layer: int, model: Model) -> Float[Tensor, "head d_head d_model"]:
    """W_O of a layer, in the dtype of computing, unpacked where it is kept in 4 bits."""
    attention: Any = model.blocks[layer].attn
    projection = attention.o.original_component
    packed = getattr(projection.weight, "quant_state", None)
    if packed is None:
        return attention.W_O.to(computing_dtype(model))
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(projection.weight.data, packed).to(computing_dtype(model))
    return rearrange(weight, "d_model (head d_head) -> head d_head d_model", head=model.cfg.n_heads)


def _norm_weight(name: str, model: Model) -> Float[Tensor, " d_model"]:
    """What a norm multiplies the scaled stream with (Gemma keeps it less one)."""
    norm: Any = model.get_submodule(name)
    weight = norm.original_component.weight.to(model.cfg.device, computing_dtype(model))
    return 1 + weight if getattr(model.cfg, "rmsnorm_uses_offset", False) else weight
