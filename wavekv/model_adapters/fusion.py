"""RMS norms, rotary embeddings and feed-forward blocks of a model, each compiled into few kernels.

They are many small operations: 0.05 ms a layer of a decode step of the Llama-3.1-8B shape on an
H100, where reading the layer's weights takes 0.17 ms. `torch.compile` fuses them. Attention and
the model's own forward stay as they are, so nothing depends on how they are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_KINDS = "RMSNorm", "MLP"
"""How the names of such classes end in transformers; a mixture of experts is none of them."""
_ROTATE = "apply_rotary_pos_emb"
_MOST_SHAPES = 64
"""Batch sizes (times shapes of norms) that are compiled; beyond it parts run as they are."""
_ONE_AT_A_TIME = RLock()


@contextmanager
def fused_parts(model: nn.Module) -> Iterator[int]:
    """While entered, these parts of `model` run compiled; gives how many modules they are. The
    first step of each shape compiles them. Other models of the same classes share the rotary
    embedding meanwhile."""
    compiled: dict[Any, Callable[..., Any]] = {}

    def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in compiled:
            compiled[function] = torch.compile(function, dynamic=False)
        return compiled[function]

    parts = [module for module in model.modules() if _is_fusible(module)]
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES))
        for part in parts:
            part.forward = MethodType(compile_once(type(part).forward), part)
            stack.callback(delattr, part, "forward")
        for source in _rotating_sources(model):
            own = getattr(source, _ROTATE)
            setattr(source, _ROTATE, compile_once(own))
            stack.callback(setattr, source, _ROTATE, own)
        yield len(parts)


def _is_fusible(module: nn.Module) -> bool:
    # a forward of the module's own, as hooks of other libraries put there, is left alone
    return type(module).__name__.endswith(_KINDS) and "forward" not in vars(module)


def _rotating_sources(model: nn.Module) -> list[ModuleType]:
    """Where classes of the model are written that apply rotary embeddings."""
    names = {type(module).__module__ for module in model.modules()}
    sources = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [source for source in sources if hasattr(source, _ROTATE)]
