"""What the tests of the adapters share: one thread, and wrapped tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from tiny_models import TINY, make_model
from transformers import PreTrainedModel

from wavekv import OffloadedKV

# its asserts say what they compared, as those in test files do
pytest.register_assert_rewrite("cache_answers", "saved_caches", "saver", "two_contexts")


@cache
def _wrapped(model_type: str, device: torch.device | str) -> OffloadedKV:
    before = "eager" if model_type in ("gemma2", "gpt_oss") else "sdpa"
    return OffloadedKV(make_model(model_type, attention=before).to(device), TINY)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread slows models this small down, on a busy machine twentyfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def wrapped() -> Callable[..., OffloadedKV]:
    """wrapped(model_type, **overrides): a wrapper, over one model for each type."""

    def wrap(
        model_type: str, device: torch.device | str = "cpu", **overrides: object
    ) -> OffloadedKV:
        return OffloadedKV(_wrapped(model_type, device).model, TINY, **overrides)

    return wrap


@pytest.fixture
def tiny_llama() -> Iterator[PreTrainedModel]:
    """A model of the test's own, to break or to unwrap."""
    return make_model("llama", attention="sdpa", num_hidden_layers=2)
