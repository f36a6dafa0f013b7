"""Where a number came from: the command, the model's weights, and the versions of everything below us."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from sitelens.fingerprints import fingerprint
from sitelens.models import Model, head_shape, model_dtype, model_name
from sitelens.version import __version__

RECORDED = ("torch", "transformers", "transformer-lens", "numpy", "pandas", "plotly", "safetensors", "gguf")
IF_INSTALLED = ("accelerate", "bitsandbytes", "datasets", "peft")


def provenance(command: str, model: Model, name: str | None = None) -> dict[str, Any]:
    """As plain JSON: made_by, model (name, fingerprint, heads, dtype, quantize), versions, python."""
    versions = {name: metadata.version(name) for name in (*RECORDED, *filter(find_spec, IF_INSTALLED))}
    return {
        "made_by": command,
        "model": {
            "name": name or model_name(model), "fingerprint": fingerprint(model), "heads": head_shape(model)[:2],
            "dtype": str(model_dtype(model)).removeprefix("torch."),
            "quantize": "nf4" if getattr(model.original_model, "is_loaded_in_4bit", False) else None,
        },
        "versions": dict(sorted(versions.items())) | {"sitelens": __version__},
        "python": platform.python_version(),
    }  # fmt: skip
