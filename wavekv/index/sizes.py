"""How much an index holds, in bytes and in numbers of things."""

from __future__ import annotations

from typing import Any

from wavekv.index.state import IndexState


def total_nbytes(state: IndexState) -> int:
    """Bytes of everything."""
    return sum(part.nbytes for part in state.tensors().values())


def key_nbytes(state: IndexState) -> int:
    """Bytes of the keys, and values, themselves."""
    return _nbytes(state, "pages", "tail")


def code_nbytes(state: IndexState) -> int:
    """Bytes of the codes of keys and their scales."""
    return _nbytes(state, "codes", "code_scale", "page_scale")


def statistics_nbytes(state: IndexState) -> int:
    """Bytes of all else."""
    return total_nbytes(state) - key_nbytes(state) - code_nbytes(state)


def stats(state: IndexState) -> dict[str, Any]:
    """See `WaveIndex.stats`."""
    H, _, num_tail, D = state.tail.shape
    return {
        "ntotal": state.num_keys,
        "num_heads": H,
        "dim": D,
        "dtype": str(state.tail.dtype).removeprefix("torch."),
        "device": str(state.tail.device),
        "params": state.params.to_dict(),
        "code_dims": state.code_dims,
        "has_values": state.has_values,
        "has_query_sample": state.metric is not None,
        "num_pages": state.pages.num_pages,
        "num_segments": len(state.segments_of(state.num_keys)),
        "num_tail": num_tail,
        "nbytes": total_nbytes(state),
        "key_nbytes": key_nbytes(state),
        "code_nbytes": code_nbytes(state),
        "statistics_nbytes": statistics_nbytes(state),
    }


def _nbytes(state: IndexState, *names: str) -> int:
    tensors = state.tensors()
    return sum(tensors[name].nbytes for name in names)
