"""How long a decode step takes: bytes at the rates of the machine, and how much longer the kernels
take than that.

On CUDA a layer is: rank pages, estimate those that are not chosen, and beside both, from the first
ranking on, fetch what is missing; then attend to the chosen ones. Each part takes a time of its
own, for its kernels one after another, and the time of its bytes, a multiple of what a copy takes.
All of this was fitted to steps of an H100 from 32K to a million tokens (docs/decode_benchmark.md,
docs/million.md); `tests/estimate/test_calibration.py` holds the prediction against them.
"""

from __future__ import annotations

from wavekv.estimate.seconds import Prediction
from wavekv.estimate.step_bytes import StepBytes
from wavekv.machine.rates import Rates

_WEIGHTS = 1.2
"""Linear layers, as a multiple of a copy of their weights."""
_LAYER_FUSED, _LAYER_EAGER = 17e-6, 67e-6
"""Seconds of a layer's norms, rotary embedding and activations, compiled and not."""
_LAYER_LAUNCHED = 2e-3
"""The same where the host starts every kernel (transformers' own cache: 65 ms for 32 layers)."""
_RANK, _ESTIMATE, _ATTEND, _FETCH = 46e-6, 21e-6, 11e-6, 4e-6
"""Seconds that the kernels of a part take for next to no pages."""
_RANK_BYTES, _ESTIMATE_BYTES, _ATTEND_BYTES = 3.1, 1.5, 1.2
"""Bytes of a part, as a multiple of a copy."""
_FIRST_RANKING = 0.45
"""Of the time of ranking, what is over before the bus is busy."""
_FETCH_BESIDE = 1.16
"""Fetched bytes, as a multiple of a fetch that has the memory to itself."""
_CPU_LAYER, _CPU_BYTES = 1.5e-3, 3.0
"""On a CPU seconds of a layer, and bytes as a multiple of reading them: the demo on two cores takes
21 ms a token at 32K. One point, so no more than a hint elsewhere."""


def decode_step(
    read: StepBytes,
    layers: int,
    offloaded: int,
    rates: Rates,
    *,
    is_compiled: bool,
    is_captured: bool,
) -> Prediction:
    """A step of all `layers`, `offloaded` of them with pages. is_compiled, is_captured: on CUDA."""
    if not rates.has_device:
        floor = read.read / rates.host_read
        how = f"bytes at {rates.host_read / 1e9:.0f} GB/s; a hint, from one figure of two cores"
        parts = {"layers": layers * _CPU_LAYER, "bytes": _CPU_BYTES * floor}
        return Prediction(sum(parts.values()), floor, parts, how)
    assert rates.device_copy is not None
    copy = rates.device_copy
    bus = rates.fetch or rates.h2d
    assert bus is not None
    own = _LAYER_LAUNCHED
    if is_captured:
        own = _LAYER_FUSED if is_compiled else _LAYER_EAGER
    ranked = read.ranking + read.codes + read.scores
    rank = offloaded * _RANK + _RANK_BYTES * ranked / copy
    estimate = offloaded * _ESTIMATE + _ESTIMATE_BYTES * (read.estimating + read.steady) / copy
    fetch = offloaded * _FETCH + _FETCH_BESIDE * read.fetched / bus
    attend = offloaded * _ATTEND + _ATTEND_BYTES * read.pages / copy
    weights, others = _WEIGHTS * read.weights / copy, layers * own
    how = f"bytes at {copy / 1e9:.0f} GB/s, pages at {bus / 1e9:.0f} GB/s, factors of an H100"
    if not is_captured:
        how = f"not captured as a graph, a hint: {how}"
    return Prediction(
        seconds=weights + others + max(rank + estimate, _FIRST_RANKING * rank + fetch) + attend,
        floor=read.read / copy,
        parts={
            "weights": weights,
            "norms and the like": others,
            "rank": rank,
            "estimate": estimate,
            "fetch, beside these": fetch,
            "attend to pages": attend,
        },
        how=how,
    )
