"""Registry of condition classes by the names used in saved files."""

from __future__ import annotations

import importlib
from inspect import isabstract
from typing import Any

from sitelens.errors import SitelensError

# The condition classes of sitelens, and where they are defined (imported on demand).
HOMES = {
    "FewShot": "sitelens.conditions.prompting:FewShot",
    "ZeroShot": "sitelens.conditions.prompting:ZeroShot",
    "PatchHeads": "sitelens.conditions.patching:PatchHeads",
    "Ablate": "sitelens.conditions.ablation:Ablate",
    "AddToStream": "sitelens.conditions.streams:AddToStream",
    "ReplaceStream": "sitelens.conditions.streams:ReplaceStream",
    "InContextVector": "sitelens.conditions.streams:InContextVector",
    "LinearCombination": "sitelens.conditions.streams:LinearCombination",
    "HeadOffsets": "sitelens.conditions.heads:HeadOffsets",
    "LowRank": "sitelens.conditions.adapters:LowRank",
}
KINDS: dict[str, type] = {}


def register(kind: type, name: str | None = None) -> str:
    """Register a class and return its name: `name`, else the class name for sitelens's own, else "MODULE:CLASS".

    A class that is defined again, as in a notebook, replaces its earlier definition.

    Raises:
        SitelensError: if another class has that name, or it is not text.
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise SitelensError(f"saved_as must be a name, not {name!r}")
    place = _place(kind)
    if name is None:
        name = kind.__name__ if HOMES.get(kind.__name__) == place else place
    other = HOMES.get(name) or (_place(KINDS[name]) if name in KINDS else place)
    if other != place:
        raise SitelensError(f"{place} cannot be saved as {name!r}: {other} is; choose another name")
    KINDS[name] = kind
    return name


def kind_of(name: str, where: str) -> Any:
    """The class registered under a name; sitelens's own classes are imported on demand.

    Raises:
        SitelensError: if there is none (the message says which module to import), or the name is ambiguous.
    """
    if name in HOMES and name not in KINDS:
        importlib.import_module(HOMES[name].partition(":")[0])
    found = [KINDS[name]] if name in KINDS else []
    if not found and ":" not in name:  # the first edition saved class names only
        found = [kind for kind in KINDS.values() if kind.__name__ == name]
    found = [kind for kind in found if not isabstract(kind)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SitelensError(f"{where} holds a condition {name!r}, which may be {' or '.join(map(_place, found))}")
    module, sign, own = name.partition(":")
    if sign and module != "__main__":
        raise SitelensError(
            f"{where} holds a condition of the class {own[:60]}: import {module[:60]} first, which defines it"
        )
    raise SitelensError(
        f"{where} holds a condition {(own or name)[:60]!r} that is not known here: define or import its class first"
    )


def _place(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
