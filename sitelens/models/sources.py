"""Sources of models: the hub id that a name means, and whether a device exists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES, get_official_model_name

from sitelens.errors import SitelensError
from sitelens.models.catalogue import PAPER
from sitelens.models.gguf.converted import PACKAGED
from sitelens.suggestions import did_you_mean

DEFAULT_MODEL = "smollm2-135m"
OWNERS = {  # ids without an owner, and their present ids on the hub
    "distilgpt2": "distilbert/distilgpt2",
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}


def hub_id(name: str) -> str:
    """The hub id that a name means: "owner/name" itself, or the id that TransformerLens uses for the name.

    Raises:
        SitelensError: for any other name; the message suggests the nearest ones.
    """
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return next((official for official, others in MODEL_ALIASES.items() if name in others), name)
    if re.fullmatch(r"[\w.-]+", name) and _at_hand(name):
        return name  # some models on the hub have no owner in their id
    try:
        official = get_official_model_name(name)
    except ValueError:
        known = [*PACKAGED, *PAPER, *OFFICIAL_MODEL_NAMES, *MODEL_ALIASES, *chain(*MODEL_ALIASES.values())]
        hint = did_you_mean(name, known) or f"did you mean {' or '.join(PACKAGED)}?"
        raise SitelensError(
            f"unknown model {name!r}: {hint} "
            "Otherwise give a hub id (owner/name), a folder, or a .gguf file that exists"
        ) from None
    if official.startswith("llama-"):  # TransformerLens's names for weights that are not on the hub
        raise SitelensError(f"{official} are weights that Meta hands out: convert them with transformers and give the "
                            "folder, or take for example huggyllama/llama-7b")  # fmt: skip
    owned = OWNERS.get(official)
    return owned if owned is not None and not _at_hand(official) and _at_hand(owned) else official


def _at_hand(name: str) -> bool:
    """Whether a hub id's configuration has been downloaded."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def check_device(device: Any, device_map: Any = None) -> None:
    """Raise SitelensError if a device, or one in a device map, is invalid or does not exist on this machine."""
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        places = []
    elif isinstance(device_map, Mapping):
        places = [place for place in device_map.values() if place != "disk"]
    else:
        places = [] if device_map is None else [device_map]
    for place in places if device is None else [device, *places]:
        try:
            wanted = torch.device(place)
        except (RuntimeError, TypeError, ValueError):
            raise SitelensError(f"unknown device {place!r}: {_devices()}") from None
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if wanted.type in ("cuda", "mps") and not there[wanted.type]:
            built = torch.backends.cuda.is_built() if wanted.type == "cuda" else torch.backends.mps.is_built()
            reason = "torch finds no such GPU, or no driver" if built else "this torch is built without it"
            raise SitelensError(f"there is no device {str(place)!r} here ({reason}): {_devices()}")
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise SitelensError(f"there is no device {str(place)!r} here: {_devices()}")
        if wanted.type not in there and not _works(wanted):
            raise SitelensError(f"a model cannot be computed on the device {str(place)!r} here: {_devices()}")


def _devices() -> str:
    """The available devices, in words."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return f"there is {', '.join([*there, 'mps'] if torch.backends.mps.is_available() else there)}"


def _works(device: torch.device) -> bool:
    """Whether a number put on a device can be read back (not from "meta", nor from a device that does not exist)."""
    try:
        return torch.ones(1, device=device).item() == 1
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
