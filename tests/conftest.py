"""Settings and fixtures of all tests: an own cache for each, no hub, the same few threads everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing waits for a hub

import jaxtyping
import pytest
import torch

from sitelens.defaults import settings
from tests import micro
from tests.overrides import overridden

torch.set_num_threads(1)  # for models this small more threads only wait for each other


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[Path]:
    """Each test has an empty cache and no progress bars."""
    with overridden(cache_dir=tmp_path / "cache", progress=False):
        yield tmp_path / "cache"


@pytest.fixture(scope="session")
def real_cache() -> Path:
    """The user's own cache, where the packaged model lies converted after its first use."""
    return settings.cache()


@pytest.fixture(params=micro.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of every model family that must work."""
    return request.param


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data sets in their upstream layout."""
    folder = settings.data()
    if folder is None:
        pytest.skip("SITELENS_DATA is not set: it names the folder with the real data sets")
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The library as it is in use, without the type checks of the tests: what it says itself about wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
