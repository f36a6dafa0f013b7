"""The checks of `verify`: each compares one kind of computation with the raw Hugging Face network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sitelens.conditions.adapters import PROJECTIONS
from sitelens.conditions.streams import INNER, AddToStream, output_hooks
from sitelens.engine.capture import capture_z
from sitelens.engine.decoding import end_tokens
from sitelens.engine.forward import HeadEdit, LastToken, full_logits
from sitelens.engine.network import Passes
from sitelens.engine.prefix import PrefixCache
from sitelens.errors import SitelensError
from sitelens.evaluation.evaluate import generate
from sitelens.heads.attention import attention
from sitelens.heads.direct import DirectPath, tolerance
from sitelens.models.heads import all_heads
from sitelens.reports.verification.subject import NEW_TOKENS, Finding, Subject, distance
from sitelens.settings import settings


def _tokens(subject: Subject) -> Finding:
    tokenizer, ids = subject.model.tokenizer, subject.ids[0][0].tolist()
    bos = tokenizer.bos_token_id
    at_start = 0
    while bos is not None and at_start < len(ids) and ids[at_start] == bos:
        at_start += 1
    detail = f"a text begins with {tokenizer.decode(ids[:3])!r}; " + (
        f"{tokenizer.bos_token!r} is put before it" if at_start else "no BOS token is put before it"
    )
    given: Any = subject.model.bridge.tokenizer
    if given is not tokenizer and given("a")["input_ids"] != tokenizer("a")["input_ids"]:
        detail += "; the bridge's own tokenizer gives other tokens and is not used"
    if at_start > 1:
        return Finding(f"the BOS token stands {at_start} times at the start of a text", right=False)
    return Finding(detail)


def _bridge(subject: Subject) -> Finding:
    """The bridge's logits, compared with the default attention of transformers, since a bridge has its own."""
    sdpa = bool(getattr(subject.model.network, "_supports_sdpa", False))
    network = subject.raw("sdpa" if sdpa else "eager")
    with torch.no_grad():
        found = torch.cat([subject.model.bridge.forward(ids, use_cache=False)[:, -1] for ids in subject.ids])
        expected = torch.cat([network(ids, use_cache=False).logits[:, -1] for ids in subject.ids])
    return subject.compared(found, expected)


def _prefix(subject: Subject) -> Finding:
    prefix = PrefixCache.of(subject.batch, subject.model, settings.budget())
    with torch.no_grad(), LastToken(subject.model) as run:
        return subject.compared(run(prefix), subject.logits)


def _edit(subject: Subject) -> tuple[Finding, Finding]:
    """Logits and gradient of alpha, with every head patched at a random alpha with the z of another prompt."""
    model = subject.model
    layers, heads, _ = model.shape
    device, generator = model.device, torch.Generator().manual_seed(subject.seed)
    rows = len(subject.ids)
    start = torch.rand(rows, layers, heads, generator=generator).to(device, subject.dtype)
    vectors = capture_z(subject.batch, model).to(device, subject.dtype).roll(1, 0)
    weights = torch.randn(subject.logits.shape[-1], generator=generator).to(device, subject.dtype)
    fast, slow = (start.clone().requires_grad_() for _ in range(2))
    prefix = PrefixCache.of(subject.batch, model, settings.budget())
    with torch.enable_grad():
        with LastToken(model) as run:
            found = run(prefix, HeadEdit.mix(fast, vectors)).to(subject.dtype)
        (found @ weights).sum().backward()
        parts = []
        for row, ids in enumerate(subject.ids):
            network = subject.raw()
            with _mixed(subject, network, slow[row], vectors[row]):
                logits = network(ids, use_cache=False).logits[:, -1].to(subject.dtype)
                (logits @ weights).sum().backward()
            parts.append(logits.detach())
    expected = torch.cat(parts)
    changed = distance(expected, subject.logits)
    quick, exact = (torch.zeros_like(x) if x.grad is None else x.grad for x in (fast, slow))
    gradient = float((quick - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
    detail = f"the edit changes the logits by {changed:.0%} of their scale"
    limit = subject.limit * (10 if subject.dtype == subject.model.dtype else 1)
    return subject.compared(found.detach(), expected, detail), Finding("", gradient, limit)


@contextmanager
def _mixed(subject: Subject, network: Any, alpha: Tensor, vectors: Tensor) -> Iterator[None]:
    """A context manager that patches every head of the raw network at the last token."""

    def hook(layer: int) -> Callable[..., Any]:
        def act(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, vectors.shape[1:])
            weight = alpha[layer][:, None]
            last = ((1 - weight) * z[:, -1:].to(alpha.dtype) + weight * vectors[layer]).to(z.dtype)
            return torch.cat([z[:, :-1], last], dim=1).flatten(-2), *args[1:]

        return act

    points = [f"blocks.{layer}.attn.o" for layer in range(len(alpha))]
    handles = [
        subject.module(network, point).register_forward_pre_hook(hook(layer)) for layer, point in enumerate(points)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _generation(subject: Subject) -> Finding:
    """Greedy decoding with cache and padding, compared with running the raw network again for each token."""
    tokenizer, network = subject.model.tokenizer, subject.raw()
    ends = end_tokens(subject.model, tokenizer)
    found = generate(list(subject.batch.texts), None, subject.model, max_new_tokens=NEW_TOKENS, stop=None)
    ties = 0
    with torch.no_grad():
        for text, ids in zip(found, subject.ids, strict=True):
            said: list[int] = []
            agreed: str | None = None  # the text before the first tie of two tokens; any text after it is right
            while len(said) < NEW_TOKENS:
                logits = network(ids, use_cache=False).logits[0, -1].to(subject.dtype)
                first, second = logits.topk(2).values.tolist()
                if agreed is None and first - second <= 2 * subject.limit * float((logits - logits.mean()).abs().max()):
                    agreed = tokenizer.decode(said, skip_special_tokens=True).strip()
                if (token := int(logits.argmax())) in ends:
                    break
                said.append(token)
                ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
            expected = tokenizer.decode(said, skip_special_tokens=True).strip()
            if text != expected and not (agreed is not None and text.startswith(agreed)):
                return Finding(f"{text!r} instead of {expected!r}", right=False)
            ties += text != expected
    return Finding(f"{found[0]!r}" + (f"; {ties} texts part where two tokens are equally likely" if ties else ""))


def _attention(subject: Subject) -> Finding:
    heads, (ids, *_) = all_heads(subject.model), subject.ids
    weights = attention(subject.batch.rows([0]), heads, subject.model)[0]
    sums = weights.sum(-1)
    detail = "" if sums.min() > 0.98 else f"attention sinks take up to {1 - float(sums.min()):.0%}"
    network = subject.raw()
    with torch.no_grad():
        try:
            result = network(ids, use_cache=False, output_attentions=True)
            raw, logits = result.attentions, result.logits[:, -1]
        except (AttributeError, TypeError, ValueError):
            raw, logits = None, subject.logits[:1]
    same = distance(logits.to(subject.dtype), subject.logits[:1]) <= subject.limit
    if not raw or not same or any(part is None for part in raw):
        return Finding(f"{detail}; the raw network gives none to compare with".removeprefix("; "))
    expected = torch.stack([raw[layer][0, head, -1].float().cpu() for layer, head in heads])
    return Finding(detail, float((weights - expected).abs().max()), max(1e-4, subject.limit))


def _attribution(subject: Subject) -> Finding:
    path = DirectPath.of(subject.batch, subject.model)
    words = "" if abs(path.scale - 1) < 1e-3 else f"the logits are {path.scale:.3g} times what the unembedding gives"
    if path.capped:
        words = "before the cap of the logits"
    return Finding(words, path.check(), tolerance(subject.model))


def _stream(subject: Subject) -> Finding:
    """The logits with a vector added to the residual stream after a middle layer."""
    model, layer = subject.model, subject.model.shape.layers // 2
    vector = torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(subject.seed))

    def act(module: nn.Module, args: Any, out: Any) -> Any:
        state = out[0] if isinstance(out, tuple) else out
        last = (state[:, -1:].float() + vector.to(state.device)).to(state.dtype)
        state = torch.cat([state[:, :-1], last], dim=1)
        return (state, *out[1:]) if isinstance(out, tuple) else state

    network = subject.raw()
    subject.module(network, f"blocks.{layer}").register_forward_hook(act)
    passes = Passes(model, AddToStream(vector, (layer,)).fwd_hooks(model.bridge))
    with torch.no_grad():
        found = full_logits(subject.batch.rows([0]), passes)
        expected = network(subject.ids[0], use_cache=False).logits[:, -1]
    return subject.compared(found, expected)


def _outputs(subject: Subject) -> Finding:
    """The logits with the outputs of attention and MLP halved in every layer."""
    model = subject.model
    points = [point for part in INNER for point in output_hooks(part, model)]
    inside = sorted({point.split(".")[2] for point in points if point.count(".") > 3})

    def halved(x: Tensor, hook: Any = None) -> Tensor:
        return 0.5 * x

    def act(module: nn.Module, args: Any, out: Any) -> Any:
        return (0.5 * out[0], *out[1:]) if isinstance(out, tuple) else 0.5 * out

    network = subject.raw()
    for point in points:
        name = point.removesuffix(".hook_out")
        own: Any = model.bridge.get_submodule(name)
        block: Any = model.bridge.get_submodule(".".join(name.split(".")[:2]))
        if own.original_component is block.original_component:  # an MLP without a module of its own
            name += ".out"
        subject.module(network, name).register_forward_hook(act)
    passes = Passes(model, [(point, halved) for point in points])
    with torch.no_grad():
        found = full_logits(subject.batch.rows([0]), passes)
        expected = network(subject.ids[0], use_cache=False).logits[:, -1]
    words = f"{' and '.join(inside)} add the residual stream inside: seen before that" if inside else ""
    return subject.compared(found, expected, words)


def _lora(subject: Subject) -> Finding:
    blocks: Any = subject.model.bridge.blocks
    for layer, block in enumerate(blocks):
        for name in PROJECTIONS:
            if not hasattr(getattr(block.attn, name, None), "original_component"):
                raise SitelensError(f"layer {layer} has no {name} projection of its own")
    return Finding()


CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "tokens": _tokens,
    "bridge against the raw network": _bridge,
    "prefixes and padding": _prefix,
    "head edit": lambda subject: _edit(subject)[0],
    "head edit, gradient": lambda subject: _edit(subject)[1],
    "generation": _generation,
    "attention patterns": _attention,
    "direct logit attribution": _attribution,
    "residual stream (FV, TV, LTV)": _stream,
    "attention and MLP outputs (ICV, I2CL)": _outputs,
    "query and value projections (LoRA)": _lora,
}
