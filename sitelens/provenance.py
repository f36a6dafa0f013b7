"""Where a number came from: the command, the model's weights, and the versions of everything below us."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from sitelens import __version__
from sitelens.fingerprints import fingerprint
from sitelens.models import Model, head_shape, model_name

RECORDED = ("torch", "transformers", "transformer-lens", "numpy", "pandas", "plotly", "safetensors", "gguf")


def provenance(command: str, model: Model, name: str | None = None) -> dict[str, Any]:
    """As plain JSON: made_by, model (name, fingerprint, heads), versions, python."""
    return {
        "made_by": command,
        "model": {"name": name or model_name(model), "fingerprint": fingerprint(model), "heads": head_shape(model)[:2]},
        "versions": {name: metadata.version(name) for name in RECORDED} | {"sitelens": __version__},
        "python": platform.python_version(),
    }
