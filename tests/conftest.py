"""Settings and fixtures of all tests: an empty cache and a fixed random state per test, no network, few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, so that it does not contact the hub

import jaxtyping
import pytest
import torch

from sitelens.errors import SitelensError
from sitelens.models.loading import default_model
from sitelens.models.model import Bridge
from sitelens.settings import settings
from tests import micro

torch.set_num_threads(1)  # more threads are slower for models this small


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[Path]:
    """Each test starts with an empty cache and no progress bars."""
    before = settings.cache_dir, settings.progress
    settings.cache_dir, settings.progress = tmp_path / "cache", False  # process-wide, for threads too
    yield tmp_path / "cache"
    settings.cache_dir, settings.progress = before


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """Each test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_cache() -> Path:
    """The user's cache, which holds the converted packaged model after its first use."""
    return settings.cache()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory, real_cache: Path) -> Path:
    """One cache for all tests on the real model; it contains the user's converted models."""
    folder = tmp_path_factory.mktemp("cache")
    (real_cache / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(real_cache / "models")
    return folder


@pytest.fixture
def packaged_model(own_cache: Path, shared_cache: Path) -> Iterator[Bridge]:
    """The default model on all cores, with the shared cache; skips if it is not available (except in CI)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    with settings.using(cache_dir=shared_cache):
        try:
            yield default_model()
        except SitelensError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the packaged model cannot be had: {error}")
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(params=micro.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each supported model family."""
    return request.param


@pytest.fixture(params=micro.MORE_FAMILIES)
def wide_family(request: pytest.FixtureRequest) -> str:
    """The name of each supported model family, and of a few more."""
    return request.param


@pytest.fixture
def llama() -> Iterator[Bridge]:
    """A tiny random Llama that is shared by tests."""
    yield from micro.lent("Llama")


@pytest.fixture
def llama_double() -> Iterator[Bridge]:
    """The same Llama in float64."""
    yield from micro.lent("Llama", torch.float64)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """A folder of real data sets in their upstream layout."""
    folder = settings.data()
    if folder is None:
        pytest.skip("SITELENS_DATA is not set: it names the folder with the real data sets")
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The library as users run it, without the run-time type checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
