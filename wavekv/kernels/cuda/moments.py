"""From the logit of a page's mean key to its log mass and shift: see `wavekv.kernels.score`."""

import triton
import triton.language as tl


@triton.jit
def moments(
    x,
    query_square,
    variance,
    count,
    softcap,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """log_mass and shift [G, n] from mean logits x [G, n], |q|^2 [G], variance [n], count [n]."""
    log_count = tl.log(tl.maximum(count, 1).to(tl.float32))[None, :]
    bend = x * 0.0 + 1.0
    if SOFTCAP:
        capped = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        x = softcap * capped
        bend = 1.0 - capped * capped
    log_mass = log_count + x
    shift = x * 0.0
    if USE_VARIANCE:
        uncapped = query_square[:, None] * variance[None, :] * bend
        spread = uncapped * bend
        is_frozen = spread > 2.0 * log_count
        ratio = tl.sqrt(2.0 * log_count / tl.maximum(spread, 1e-30))
        frozen = tl.sqrt(2.0 * log_count * spread) - log_count
        log_mass += tl.where(is_frozen, frozen, 0.5 * spread)
        shift = uncapped * tl.where(is_frozen, ratio, 1.0)
    is_empty = (count <= 0)[None, :]
    return tl.where(is_empty, float("-inf"), log_mass), tl.where(is_empty, 0.0, shift)


@triton.jit
def softmax_sum(values):
    """Largest value [G] and the sum of exp(value - largest) [G] over values [G, n]."""
    largest = tl.max(values, 1)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - safe[:, None]), 1)


@triton.jit
def merged_sum(largest, total, more_largest, more_total):
    """Join two pairs as from `softmax_sum`."""
    both = tl.maximum(largest, more_largest)
    safe = tl.where(both == float("-inf"), 0.0, both)
    return both, total * tl.exp(largest - safe) + more_total * tl.exp(more_largest - safe)
