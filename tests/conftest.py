"""What every test shares: hypothesis profiles, the `gpu` mark, seeds, the `device` fixture, what a
worker among others has to itself, and Triton's interpreter where there is no CUDA device."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # before anything imports triton: its own library is made for one or the other
    os.environ.setdefault("TRITON_INTERPRET", "1")

_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker:
    # Workers share the cores: threads of one would wait for those of another.
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // _workers))
    # Before anything imports numba. Two processes that compile a function for different types at
    # once can leave its cache with the code for one under the name of the other.
    os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[1] / ".numba_cache" / _worker)

settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # the legacy state too: libraries under test may read it
    torch.manual_seed(0)


# Session scope, because hypothesis refuses function-scoped fixtures in @given tests.
@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
