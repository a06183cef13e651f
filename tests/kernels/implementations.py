"""The kernels of a decode step, by name."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from wavekv.kernels import step_reference

IMPLEMENTATIONS = ["torch", "triton"]


def implementation(name: str) -> tuple[ModuleType, str]:
    """Kernels of a decode step, and the device to run them on: the torch twins, or those in Triton,
    in its interpreter where there is no GPU."""
    if name == "torch":
        return step_reference, "cpu"
    pytest.importorskip("triton")
    kernels = pytest.importorskip("wavekv.kernels.cuda")
    return kernels, "cuda" if torch.cuda.is_available() else "cpu"
