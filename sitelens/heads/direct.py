"""The direct path from heads to logits, with everything else held at its value in a prompt.

At the last token, every head's output z becomes an independent input, the input of each MLP is held fixed, and each
norm is replaced by an affine map with its present scale. What remains between z and the logits is affine in every
architecture: output projections and their layout, norms after attention, residual multipliers, the final norm, the
unembedding. The model's own modules compute it, without rules per model family. `DirectPath.check` compares the result
with a second forward pass, so an architecture that works differently raises an error instead of giving wrong numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sitelens.engine.batches import PromptBatch
from sitelens.engine.network import Passes, run_tokens
from sitelens.engine.prefix import PrefixCache, ReadOnly
from sitelens.errors import SitelensError
from sitelens.heads.norms import HeldNorm
from sitelens.models.model import Model, z_hook
from sitelens.settings import settings

NORM = re.compile(r"((?:blocks\.\d+\.)?ln\w*)\.hook_in")
UNEMBED = "unembed.hook_out"
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}  # relative to the logit scale
OTHERWISE = 5e-2  # bfloat16 has 8 significant bits

Act = tuple[str, Callable[[Tensor], Any]]  # (hook point, function called there)


def tolerance(model: Model) -> float:
    """Largest accepted relative difference of two ways to compute a number: 1e-4 in float32, 0.05 in bfloat16."""
    return TOLERANCE.get(model.dtype, OTHERWISE)


@dataclass(frozen=True, eq=False)
class DirectPath:
    """The direct path from the heads to the logits of some prompts; made by `DirectPath.of`.

    Attributes:
        prefix: the prompts, with cached prefixes.
        model: the model.
        z: per layer, the head outputs at the last token; `unembedded` is differentiable with respect to them.
        unembedded: output of the unembedding at the last token.
        scale: the logits are `scale` times `unembedded`.
        capped: whether the model then caps its logits (Gemma 2); attributions refer to the logits before the cap.
        norms: every norm with its scale held, by name.
        mlps: input of each MLP, by hook point.
        unknown: names of norms that have no known form.
    """

    prefix: PrefixCache
    model: Model
    z: tuple[Float[Tensor, "row 1 head d_head"], ...]
    unembedded: Float[Tensor, "row vocab"]
    scale: float
    capped: bool
    norms: dict[str, HeldNorm]
    mlps: dict[str, Float[Tensor, "row 1 d_model"]]
    unknown: tuple[str, ...]

    @staticmethod
    def of(batch: PromptBatch, model: Model) -> DirectPath:
        """The direct path at the last token of every prompt.

        Raises:
            SitelensError: if the logits are neither a multiple nor a soft cap of the unembedding's output, if the norms
                cannot be held, or if the user has installed hooks on the model.
        """
        names = [match[1] for match in map(NORM.fullmatch, model.bridge.hook_dict) if match]
        z: dict[int, Tensor] = {}
        entered: dict[str, Tensor] = {}
        norms: dict[str, HeldNorm] = {}
        mlps: dict[str, Tensor] = {}
        unknown: list[str] = []
        seen: dict[str, Tensor] = {}
        share = max(1e-3, tolerance(model))

        def leaf(x: Tensor, layer: int) -> Tensor:
            z[layer] = x.detach().clone().requires_grad_()
            return z[layer]

        def enter(x: Tensor, name: str) -> None:
            entered[name] = x

        def leave(y: Tensor, name: str) -> Tensor | None:
            norm: Any = model.bridge.get_submodule(name)
            held = HeldNorm.at(norm.original_component, entered[name].detach(), y.detach(), share)
            if held is None:
                unknown.append(name)
                return None
            norms[name] = held
            linear = held(entered[name])
            return y.detach() + (linear - linear.detach())

        def hold(x: Tensor, name: str) -> Tensor:
            mlps[name] = x.detach()
            return mlps[name]

        def see(x: Tensor) -> None:
            seen[UNEMBED] = x[:, -1]

        hooks: list[Act] = [
            (z_hook(layer), functools.partial(leaf, layer=layer)) for layer in range(model.shape.layers)
        ]
        for name in names:
            hooks.append((f"{name}.hook_in", functools.partial(enter, name=name)))
            hooks.append((f"{name}.hook_out", functools.partial(leave, name=name)))
        hooks += [(name, functools.partial(hold, name=name)) for name in _mlps(model)]
        prefix = PrefixCache.of(batch, model, settings.budget() // 3)
        if prefix.tokens is not None:
            raise SitelensError(
                f"{model.name} has hooks, or a forward function, of your own: what its heads write directly is "
                "measured with all else held, which they may not be. Take them off (model.reset_hooks())"
            )
        try:
            with torch.inference_mode(False), torch.enable_grad():
                logits = _run(prefix, model, [*hooks, (UNEMBED, see)])
        except SitelensError:
            raise
        except Exception as error:  # the bridge cannot handle the tensors put at its hook points
            raise SitelensError(
                f"the heads of {model.name} cannot be told apart from the rest: {type(error).__name__} where "
                f"its norms are held ({error}). Direct logit attribution is not supported for this architecture"
            ) from error
        inputs = tuple(z[layer] for layer in sorted(z))
        scale, capped = _logit_scale(seen[UNEMBED].detach(), logits.detach(), model)
        return DirectPath(prefix, model, inputs, seen[UNEMBED], scale, capped, norms, mlps, tuple(unknown))

    def check(self) -> float:
        """Relative error of all heads' summed contributions, compared with a second forward pass without head outputs.

        Both are measured along the direction in which the logits change when all head outputs are set to zero.

        Raises:
            SitelensError: if the error exceeds `tolerance`: the architecture is not supported.
        """
        wide = self.model.computing_dtype
        with_all = self.unembedded.detach().to(wide)
        lost = with_all - self.run([torch.zeros_like(z) for z in self.z]).to(wide)
        lost = lost - lost.mean(-1, keepdim=True)
        size = lost.norm(dim=-1)
        # If heads contribute almost nothing, the difference would be mostly rounding of the logits.
        least = 0.03 * (with_all - with_all.mean(-1, keepdim=True)).norm(dim=-1)
        direction = lost / size.clamp(min=1e-30)[:, None]
        with torch.inference_mode(False), torch.enable_grad():
            total = (self.unembedded.to(wide) * direction).sum()
        found = self._contributions(total).sum((1, 2)).to(size)
        error = float(((found - size).abs() / torch.maximum(size, least).clamp(min=1e-30)).max())
        if not error <= tolerance(self.model):
            names = f" (norms of an unknown form: {', '.join(self.unknown)})" if self.unknown else ""
            raise SitelensError(
                f"what the heads of {self.model.name} write cannot be told apart from the rest: with all else "
                f"held, their contributions miss the logits by {error:.1%}{names}. Direct logit attribution is not "
                "supported for this architecture"
            )
        return error

    def attribution(
        self, tokens: Int[Tensor, " row"], z: Float[Tensor, "row layer head d_head"] | None = None
    ) -> Float[Tensor, "row layer head"]:
        """Contribution of each head to the logit of a token, relative to the mean logit over the vocabulary.

        Args:
            tokens: token id per prompt.
            z: head outputs to use in place of the prompts' own.
        """
        with torch.inference_mode(False), torch.enable_grad():
            total = past_the_mean(self.unembedded, tokens.to(self.unembedded.device)).sum()
        return self.scale * self._contributions(total, z)

    def _contributions(
        self, total: Float[Tensor, ""], z: Float[Tensor, "row layer head d_head"] | None = None
    ) -> Float[Tensor, "row layer head"]:
        """Contribution of each head to a number that is linear in the unembedding's output."""
        with torch.inference_mode(False), torch.enable_grad():
            gradients = torch.autograd.grad(total, self.z, retain_graph=True)
        dtype, device = self.model.computing_dtype, self.model.device
        layers = []
        for layer, (own, gradient) in enumerate(zip(self.z, gradients, strict=True)):
            given = own.detach()[:, 0] if z is None else z[:, layer]
            layers.append((gradient[:, 0].to(device, dtype) * given.to(device, dtype)).sum(-1))
        return torch.stack(layers, dim=1)

    def promoted_logits(self, layer: int, head: int, z: Float[Tensor, " d_head"]) -> Float[Tensor, "row vocab"]:
        """What a head with output z adds to each prompt's logits, relative to their mean over the vocabulary."""
        none = [torch.zeros_like(own) for own in self.z]
        # The path is affine: scaling z up to the size of the others avoids cancellation in the difference.
        factor = 16 * max(1.0, float(self.z[layer].detach().norm() / z.norm().clamp(min=1e-30)))
        one = [*none]
        one[layer] = none[layer].clone()
        one[layer][:, 0, head] = factor * z.to(one[layer])
        wide = self.model.computing_dtype
        logits = self.run(one).to(wide) - self.run(none).to(wide)
        return self.scale / factor * (logits - logits.mean(-1, keepdim=True))

    def writes(self, z: Float[Tensor, "layer head d_head"], row: int) -> Float[Tensor, "layer head d_model"]:
        """What each head with output z adds to the residual stream in prompt `row`, without output biases."""
        layers, heads, _ = self.model.shape
        rows: list[Tensor] = []
        for own, given in zip(self.z, z, strict=True):
            alone = torch.zeros(heads + 1, 1, *own.shape[2:]).to(own)
            alone[torch.arange(heads), 0, torch.arange(heads)] = given.to(own)
            rows.append(alone)
        behind: list[Tensor] = []

        def nothing(x: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def see(x: Tensor) -> None:
            behind.append(x[:, -1].to(self.model.device, self.model.computing_dtype))

        around: list[Act] = []
        for layer in range(layers):
            around += [(f"blocks.{layer}.hook_in", nothing), (f"blocks.{layer}.hook_out", see)]
        prefix = self.prefix.rows(torch.tensor([row]), repeats=heads + 1)
        with torch.no_grad():
            _run(prefix, self.model, [*self._held(rows, slice(row, row + 1)), *around], kept=0)
        return torch.stack([state[:-1] - state[-1:] for state in behind])

    @torch.no_grad()
    def run(self, z: list[Float[Tensor, "row 1 head d_head"]]) -> Float[Tensor, "row vocab"]:
        """Output of the unembedding for these head outputs, with everything else held."""
        seen: list[Tensor] = []
        _run(self.prefix, self.model, [*self._held(z), (UNEMBED, lambda x: seen.append(x[:, -1]))])
        return seen[0]

    def _held(self, z: list[Float[Tensor, "row 1 head d_head"]], rows: slice = slice(None)) -> list[Act]:
        """Hooks that hold everything but the heads' outputs, which are set to `z`."""
        entered: dict[str, Tensor] = {}

        def put(x: Tensor, layer: int) -> Tensor:
            return z[layer].to(x)

        def enter(x: Tensor, name: str) -> None:
            entered[name] = x

        def leave(y: Tensor, name: str) -> Tensor:
            norm = self.norms[name]
            return HeldNorm(norm.gain[rows], norm.shift, norm.centered)(entered[name])

        def hold(x: Tensor, name: str) -> Tensor:
            return self.mlps[name][rows].expand_as(x)

        hooks: list[Act] = [(z_hook(layer), functools.partial(put, layer=layer)) for layer in range(len(z))]
        for name in self.norms:
            hooks.append((f"{name}.hook_in", functools.partial(enter, name=name)))
            hooks.append((f"{name}.hook_out", functools.partial(leave, name=name)))
        return hooks + [(name, functools.partial(hold, name=name)) for name in self.mlps]


def past_the_mean(logits: Float[Tensor, "row vocab"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Logit of one token per row minus the mean over the vocabulary, in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(1, tokens[:, None])[:, 0] - wide.mean(-1)


def _mlps(model: Model) -> list[str]:
    names = [f"blocks.{layer}.mlp.hook_in" for layer in range(model.shape.layers)]
    return [name for name in names if name in model.bridge.hook_dict]


def _run(prefix: PrefixCache, model: Model, acts: list[Act], kept: int = 1) -> Tensor:
    """Logits of the last token, with functions called at some hook points."""

    def hook_of(act: Callable[[Tensor], Any]) -> Callable[..., Any]:
        return lambda x, hook=None: act(x)

    passes = Passes(model, [(name, hook_of(act)) for name, act in acts])
    return run_tokens(
        passes, prefix.last[:, None], prefix.mask, prefix.positions()[:, None], prefix.cache(ReadOnly), kept
    )[:, -1:].flatten(0, 1)


def _logit_scale(unembedded: Tensor, logits: Tensor, model: Model) -> tuple[float, bool]:
    """Factor from the unembedding's output to the logits, and whether they are capped (the factor is then 1)."""
    share = tolerance(model)
    before, after = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (unembedded, logits))
    if before.shape == after.shape:
        scale = float((after * before).sum() / before.pow(2).sum().clamp(min=1e-30))
        if (after - scale * before).abs().max() <= share * after.abs().max():
            return scale, False
        cap = getattr(model.text_config, "final_logit_softcapping", None)
        if cap and (after - cap * torch.tanh(before / cap)).abs().max() <= share * after.abs().max():
            return 1.0, True
    raise SitelensError(
        f"the logits of {model.name} are neither a multiple of what its unembedding gives nor a soft cap of it: "
        "direct logit attribution is not supported for this architecture"
    )
