"""From the logit of a page's mean key to its log mass and shift: see `wavekv.kernels.score`."""

import triton
import triton.language as tl


@triton.jit
def _log(x, HARDWARE: tl.constexpr):
    """The logarithm of numbers from one on, good to 2e-7."""
    if HARDWARE:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        out = log2 * 0.6931471805599453
    else:
        out = tl.log(x)
    return out


@triton.jit
def moments(
    x,
    query_square,
    variance,
    count,
    softcap,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """log_mass and shift [G, n] from mean logits x [G, n], |q|^2 [G], variance [n], count [n]."""
    log_count = _log(tl.maximum(count, 1).to(tl.float32), HARDWARE)
    bend = 1.0
    if SOFTCAP:
        capped = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        x = softcap * capped
        bend = 1.0 - capped * capped
    log_mass = log_count[None, :] + x
    shift = x * 0.0
    if USE_VARIANCE:
        # roots of each factor, so that no root is taken for each head and page
        deviation = tl.sqrt(query_square)[:, None] * tl.sqrt(variance)[None, :]
        spread = deviation * bend
        # no key lies further out than one of so many may: there the mass grows as that key's
        furthest = tl.sqrt(2.0 * log_count)[None, :]
        reach = tl.minimum(spread, furthest)
        log_mass += reach * (spread - 0.5 * reach)
        shift = deviation * reach
    is_empty = (count <= 0)[None, :]
    return tl.where(is_empty, float("-inf"), log_mass), tl.where(is_empty, 0.0, shift)


@triton.jit
def softmax_sum(values):
    """Largest value [G] and the sum of exp(value - largest) [G] over values [G, n]."""
    largest = tl.max(values, 1)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - safe[:, None]), 1)
