"""Triton kernels run in Triton's interpreter where there is no CUDA device."""

import os

import torch

if not torch.cuda.is_available():
    # before the first kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
