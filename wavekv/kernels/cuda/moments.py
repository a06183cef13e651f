"""From bytes of a page to numbers, and from the logit of its mean key to its log mass and shift:
see `wavekv.kernels.planes` and `wavekv.kernels.levels.score_levels`."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2_of(x, HARDWARE: tl.constexpr):
    """2 to the power of x, nothing where that is below 2^-126; good to 2e-7."""
    if HARDWARE:
        out = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        out = tl.exp2(x)
    return out


@triton.jit
def step_of(code, HARDWARE: tl.constexpr):
    """The numbers that step bytes stand for."""
    return tl.where(code == 0, 0.0, exp2_of(code.to(tl.float32) * 0.125 - 20.0, HARDWARE))


@triton.jit
def root_of(code, HARDWARE: tl.constexpr):
    """Their square roots."""
    return tl.where(code == 0, 0.0, exp2_of(code.to(tl.float32) * 0.0625 - 10.0, HARDWARE))


@triton.jit
def log_of(count, HARDWARE: tl.constexpr):
    """The logarithm of counts, 0 for none; good to 2e-7."""
    x = tl.maximum(count.to(tl.float32), 1.0)
    if HARDWARE:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        out = log2 * 0.6931471805599453
    else:
        out = tl.log(x)
    return out


@triton.jit
def log_or_nothing(count, HARDWARE: tl.constexpr):
    """`log_of`, but of none -inf."""
    x = count.to(tl.float32)
    if HARDWARE:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        out = log2 * 0.6931471805599453
    else:
        out = tl.where(count == 0, float("-inf"), tl.log(tl.maximum(x, 1.0)))
    return out


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)


@triton.jit
def reach_of(deviation, log_count):
    """How far from the mean the logits that make the mass lie, of ones that deviate so much."""
    # no key lies further out than one of so many may: there the mass grows as that key's
    return tl.minimum(deviation, tl.sqrt(2.0 * log_count))


@triton.jit
def mass_beyond(deviation, reach):
    """What the variance adds to the log mass."""
    return reach * (deviation - 0.5 * reach)


@triton.jit
def moments(x, deviation, log_count, softcap, USE_VARIANCE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Log mass and shift of pages with mean logits x, whose keys' logits deviate from them by
    `deviation` before the cap."""
    shift = x * 0.0
    bent = deviation
    if SOFTCAP:
        x = capped(x, softcap)
        share = x / softcap
        # the derivative of the cap
        bent = deviation * (1.0 - share * share)
    log_mass = log_count + x
    if USE_VARIANCE:
        reach = reach_of(bent, tl.maximum(log_count, 0.0))
        log_mass += mass_beyond(bent, reach)
        shift = deviation * reach
    return log_mass, shift


@triton.jit
def softmax_sum(values):
    """Largest value [G] and the sum of exp(value - largest) [G] over values [G, n]."""
    largest = tl.max(values, 1)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - safe[:, None]), 1)
