"""Measures of quality: how much of the attention was covered, how far off the output is. Pure."""

import torch
from torch import Tensor


def attention_recall(logits: Tensor, selected: Tensor) -> Tensor:
    """Softmax mass of the selected tokens.

    Args:
        logits: [..., T] scaled attention logits; -inf where a token is masked.
        selected: [..., T] bool, broadcastable against `logits`.

    Returns:
        [...] in [0, 1], float32 (float64 for float64 logits); NaN where every logit is -inf.

    Raises:
        ValueError: `selected` is not bool.
    """
    if selected.dtype != torch.bool:
        raise ValueError(f"selected must be a bool mask [..., T], got {selected.dtype}")
    weights = _at_least_float32(logits).softmax(-1)
    return (weights * selected).sum(-1)


def relative_error(out: Tensor, reference: Tensor) -> Tensor:
    """Relative L2 error of an output: ||out - reference|| / ||reference||.

    Args:
        out: [..., D] any floating dtype.
        reference: [..., D] broadcastable against `out`.

    Returns:
        [...] float32 (float64 if either is); 0 where both are zero, inf where only the reference
        is.
    """
    out, reference = _at_least_float32(out), _at_least_float32(reference)
    distance = (out - reference).norm(dim=-1)
    return torch.where(distance == 0, 0, distance / reference.norm(dim=-1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
