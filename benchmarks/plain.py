"""The plain implementation to compare with: a raw Hugging Face model, whole prompts, batch size 1, one task at a time.

Forward pre-hooks on the attention output projections, logits at all positions, gradients through the whole prompt, and
whole prompts in validation and evaluation: what a competent researcher writes in an afternoon. It shares no code with
sitelens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Plain:
    """A frozen causal language model of the Llama family, patched at the last token of a prompt.

    In all methods, `alpha` is `[layer head]` and `mean_z` is `[layer head d_head]`.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.heads = network.config.num_attention_heads
        self.projections = [layer.self_attn.o_proj for layer in network.model.layers]

    @contextmanager
    def patched(self, alpha: Tensor, mean_z: Tensor) -> Any:
        """A context manager: z becomes (1 - alpha) z + alpha mean_z at the last token of the first forward pass."""
        done = [False] * len(self.projections)

        def hook_of(layer: int) -> Any:
            def hook(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
                if done[layer]:
                    return None
                done[layer] = True
                z = arguments[0].unflatten(-1, (self.heads, -1))
                mixed = torch.lerp(z[:, -1], mean_z[layer], alpha[layer][:, None])
                return (torch.cat([z[:, :-1], mixed[:, None]], dim=1).flatten(-2),)

            return hook

        handles = [module.register_forward_pre_hook(hook_of(i)) for i, module in enumerate(self.projections)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, ids: list[int], answer: int, alpha: Tensor, mean_z: Tensor) -> Tensor:
        """Cross-entropy (nats) of the first token of the answer, `answer`, after the prompt `ids`."""
        with self.patched(alpha, mean_z):
            logits = self.network(torch.tensor([ids])).logits[0, -1]
        return torch.nn.functional.cross_entropy(logits[None], torch.tensor([answer]))

    def train(
        self,
        prompts: Sequence[tuple[list[int], int]],
        valid: Sequence[tuple[list[int], int]],
        draws: Sequence[int],
        mean_z: Tensor,
        eval_every: int,
    ) -> tuple[Tensor, list[float]]:
        """Train alpha with Adam; return the alpha with the lowest validation loss and the loss of every step.

        Args:
            prompts: token ids and first token of the answer, per training item.
            valid: the same for validation items.
            draws: index of the training item of every step.
            mean_z: the task embedding.
            eval_every: steps between validations.
        """
        losses: list[float] = []
        logits = torch.zeros(mean_z.shape[:2], requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.2)
        best, kept = float("inf"), torch.sigmoid(logits.detach())
        for step, item in enumerate(draws, start=1):
            optimizer.zero_grad()
            loss = self.loss(*prompts[item], torch.sigmoid(logits), mean_z)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            if step % eval_every == 0 or step == len(draws):
                with torch.no_grad():
                    alpha = torch.sigmoid(logits)
                    measured = sum(float(self.loss(*item, alpha, mean_z)) for item in valid) / len(valid)
                if measured < best:
                    best, kept = measured, alpha
        return kept, losses

    @torch.no_grad()
    def hits(self, prompts: Sequence[tuple[list[int], Collection[int]]], alpha: Tensor, mean_z: Tensor) -> list[bool]:
        """For each prompt, whether the most likely next token is the first token of an accepted answer."""
        found = []
        for ids, accepted in prompts:
            with self.patched(alpha, mean_z):
                found.append(int(self.network(torch.tensor([ids])).logits[0, -1].argmax()) in accepted)
        return found

    @torch.no_grad()
    def generate(self, ids: list[int], alpha: Tensor, mean_z: Tensor, stops: set[int], tokens: int = 20) -> list[int]:
        """At most `tokens` greedily decoded tokens, up to a stop token."""
        with self.patched(alpha, mean_z):
            written = self.network.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                max_new_tokens=tokens, eos_token_id=sorted(stops), pad_token_id=sorted(stops)[0],
            )  # fmt: skip
        return written[0, len(ids) :].tolist()
