"""Networks of transformers, loaded completely or rejected: no weight is missing, made up or left over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sitelens.progress import shows_bars

# Tensors of a checkpoint that a network may leave out: masks and tables that it computes itself, and parts that do not
# affect the next token's logits (vision and audio towers, heads that predict several tokens at once).
SPARE = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|inv_freq|position_ids|masked_bias|(attn|attention|self_attn)\.bias)$"
    r"|(^|\.)(vision_tower|vision_model|visual|vision_embed_tokens|audio_tower|multi_modal_projector|embed_vision"
    r"|embed_audio|mm_projector)\."
    r"|(^|\.)mtp\."
)


def load_network(place: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """A network from a folder, a hub id or (with `gguf_file`) a GGUF file; `options` are passed to transformers.

    Raises:
        ValueError: if weights are missing (they would be random), have wrong shapes, or are left over.
        Exception: whatever transformers raises if loading fails.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place, **options, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    network, report = loaded
    check_whole(report)
    return network


def check_whole(report: dict[str, Any]) -> None:
    """Check the loading report of transformers.

    Raises:
        ValueError: if weights are missing, left over, or not of the shape in the configuration; the message names them.
    """
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it has no weights {several(missing)}")
    if mismatched := report.get("mismatched_keys"):
        names = sorted(key if isinstance(key, str) else str(next(iter(key))) for key in mismatched)
        raise ValueError(f"its weights {several(names)} have other shapes than its configuration says")
    if surplus := sorted(key for key in report["unexpected_keys"] if not SPARE.search(key)):
        raise ValueError(
            f"its configuration has no place for its weights {several(surplus)}: they would be left out in silence"
        )
    if errors := report.get("error_msgs"):
        raise ValueError(str(errors[0] if not isinstance(errors, str) else errors))


def several(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names and the number of the others, as text."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context manager in which transformers shows its progress bars only if sitelens shows its own (`shows_bars`)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shows_bars() else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
