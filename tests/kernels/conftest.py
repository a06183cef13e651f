"""What the tests of the kernels share: one thread, and the kernels of a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from implementations import IMPLEMENTATIONS, implementation

# asserts of these say what they compared, as those in test files do
pytest.register_assert_rewrite("pool_model", "selection_cases")


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """A worker among others may have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    return implementation(request.param)
