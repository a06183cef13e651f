"""Norms, rotary embeddings and feed-forward blocks of a model, each compiled into a kernel or two.

They are many small operations: 0.05 ms a layer of a decode step of the Llama-3.1-8B shape on an
H100, where reading the layer's weights takes 0.17 ms. `torch.compile` fuses them. Attention and
the model's own forward stay as they are, so nothing depends on how they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_ROTATE = "apply_rotary_pos_emb"


@contextmanager
def fused_parts(model: nn.Module) -> Iterator[int]:
    """While entered, these parts of `model` run compiled; gives how many modules they are. The
    first step of each shape compiles them."""
    compiled: dict[Any, Callable[..., Any]] = {}

    def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in compiled:
            compiled[function] = torch.compile(function, dynamic=False)
        return compiled[function]

    parts = [module for name, module in model.named_modules() if _is_fusible(name, module)]
    with ExitStack() as stack:
        for part in parts:
            part.forward = MethodType(compile_once(type(part).forward), part)
            stack.callback(delattr, part, "forward")
        for file in _files(model):
            own = getattr(file, _ROTATE)
            setattr(file, _ROTATE, compile_once(own))
            stack.callback(setattr, file, _ROTATE, own)
        yield len(parts)


def _is_fusible(name: str, module: nn.Module) -> bool:
    is_norm = type(module).__name__.endswith("RMSNorm")
    is_feed_forward = name.rpartition(".")[2] == "mlp"
    # a forward of the module's own, as hooks of other libraries put there, is left alone
    return (is_norm or is_feed_forward) and "forward" not in vars(module)


def _files(model: nn.Module) -> list[ModuleType]:
    """Where the classes of the model are written and rotary embeddings are applied."""
    names = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [file for file in files if hasattr(file, _ROTATE)]
