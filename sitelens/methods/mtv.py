"""Multimodal task vectors (Huang et al. 2024, arXiv 2406.15334): heads sampled from a policy trained by REINFORCE."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sitelens.checks.arguments import checked
from sitelens.checks.values import Count, CountOrZero, Positive, Seed
from sitelens.conditions.base import Condition
from sitelens.conditions.embedding import embed_task
from sitelens.conditions.patching import PatchHeads
from sitelens.conditions.selection import HeadSelection
from sitelens.engine.forward import HeadEdit, LastToken, check_finite
from sitelens.engine.prefix import PrefixCache
from sitelens.errors import warned_once
from sitelens.methods.base import Method
from sitelens.methods.items import zero_shot
from sitelens.methods.validation import MAX_VALID
from sitelens.models.loading import resolve_model
from sitelens.models.model import ModelSource
from sitelens.settings import settings
from sitelens.tasks import Task, load_task

FLOOR = 1e-3  # lowest probability of a head in training; also added to the losses' standard deviation


@checked
@dataclass(frozen=True, kw_only=True)
class MTV(Method):
    """Mean few-shot z injected into heads that a trained policy selects, at the last token and every decoded token.

    The policy has one Bernoulli logit per head, initially -1. Each step evaluates a sample of masks on one training
    item; the masks' standardized cross-entropies weight the gradient of their log-probability (REINFORCE, Adam). As in
    the public code, 1e-3 is added to the standard deviation, and probabilities are clamped to [0.001, 0.999] in
    training, so that heads beyond have no gradient. The mask used is the one with the lowest cross-entropy on valid
    among a final, unclamped sample (the public code uses 50 training items for this choice).

    Attributes:
        n_prompts: prompts over which z is averaged.
        n_shots: demonstrations per prompt.
        n_items: training items for the policy.
        n_steps: optimizer steps.
        n_masks: masks per step.
        n_draws: masks in the final sample.
        lr: learning rate of Adam.

    Source:
        Huang et al. 2024, arXiv 2406.15334.
    """

    name = "MTV"
    version = 2
    n_prompts: Count = 100
    n_shots: CountOrZero = 4
    n_items: Count = 100
    n_steps: Count = 600
    n_masks: Count = 32
    n_draws: Count = 10
    lr: Positive = 0.1

    @checked
    @warned_once()
    @torch.inference_mode(False)
    def fit(self, task: Task | str, model: ModelSource | None = None, *, seed: Seed = 0) -> PatchHeads:
        """Mean z patched at the best mask sampled from the trained policy.

        Args:
            task: the task; at most 200 of its training items are used.
            model: the model (default: the packaged one).
            seed: fixes the prompts, the masks and the order of the items.

        Raises:
            SitelensError: as `embed_task`.
        """
        model, task = resolve_model(model), self.capped(load_task(task))
        embedding = embed_task(task, model, n_prompts=self.n_prompts, n_shots=self.n_shots, seed=seed)
        generator = torch.Generator().manual_seed(_seed(task, seed))
        batch = zero_shot(task, task.train[: self.n_items], model)
        budget = settings.budget() // 3
        prefix = PrefixCache.of(batch, model, budget)
        logits = torch.full(model.shape[:2], -1.0, dtype=torch.float32)
        optimizer = torch.optim.Adam([logits], lr=self.lr)
        rng = random.Random(f"sitelens/mtv/{task.name}/{seed}")
        vectors = embedding.mean_z.to(model.device, model.computing_dtype)

        def losses(
            masks: Float[Tensor, "mask layer head"], of: PrefixCache, item: int, answer: int
        ) -> Float[Tensor, " mask"]:
            masks = masks.to(vectors)
            edit = HeadEdit.mix(masks, vectors.expand(len(masks), -1, -1, -1))
            found = last_token(of.rows(torch.tensor([item]), repeats=len(masks)), edit)
            check_finite(found, lambda _: f"task {task.name!r}, MTV, item {item}")
            found = found.to(vectors.dtype)
            return cross_entropy(found, torch.full((len(masks),), answer, device=found.device), reduction="none").cpu()

        with torch.no_grad(), LastToken(model) as last_token:
            for _ in range(self.n_steps):
                masks = draw(logits, self.n_masks, generator, FLOOR)
                item = rng.randrange(len(batch))
                found = losses(masks, prefix, item, int(batch.answer[item]))
                logits.grad = policy_gradient(logits, masks, found)
                optimizer.step()
            del prefix
            valid = zero_shot(task, task.valid[:MAX_VALID], model)
            prefix = PrefixCache.of(valid, model, budget)
            masks = draw(logits, self.n_draws, generator)
            total = torch.stack([losses(masks, prefix, i, int(valid.answer[i])) for i in range(len(valid))]).sum(0)
        best = masks[int(total.argmin())]
        chosen = HeadSelection(
            best, task.name, model.fingerprint(), f"MTV, {self.n_steps} steps, seed {seed}", embedding.origin
        )
        return PatchHeads(chosen, embedding, scope="generation")

    def n_trained(self, condition: Condition) -> int:
        """Number of trained logits: one per head."""
        assert isinstance(condition, PatchHeads)
        return condition.selection.alpha.numel()


def draw(
    logits: Float[Tensor, "layer head"], n: int, generator: torch.Generator, floor: float = 0.0
) -> Float[Tensor, "mask layer head"]:
    """Random 0/1 masks, in which each head is on with its probability under the policy.

    Args:
        logits: log-odds of each head.
        n: number of masks.
        generator: source of randomness.
        floor: probabilities are clamped to [floor, 1 - floor].
    """
    chances = torch.sigmoid(logits).clamp(floor, 1 - floor)
    return torch.bernoulli(repeat(chances, "layer head -> mask layer head", mask=n), generator=generator)


def policy_gradient(
    logits: Float[Tensor, "layer head"], masks: Float[Tensor, "mask layer head"], losses: Float[Tensor, " mask"]
) -> Float[Tensor, "layer head"]:
    """REINFORCE gradient: that of the mean over masks of standardized loss times log-probability.

    Args:
        logits: log-odds of each head. Probabilities are clamped to [FLOOR, 1 - FLOOR], so heads beyond have gradient 0.
        masks: 0/1 masks sampled from these logits.
        losses: loss under each mask.
    """
    weights = (losses - losses.mean()) / (losses.std() + FLOOR)
    with torch.enable_grad():
        free = logits.detach().requires_grad_()
        p = torch.sigmoid(free).clamp(FLOOR, 1 - FLOOR)
        log_chances = (masks * p.log() + (1 - masks) * (1 - p).log()).sum((1, 2))
        return torch.autograd.grad((weights * log_chances).mean(), free)[0]


def _seed(task: Task, seed: int) -> int:
    return random.Random(f"sitelens/mtv/masks/{task.name}/{seed}").getrandbits(62)
