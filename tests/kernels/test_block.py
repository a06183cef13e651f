"""attend_block: the fused operators against the definition, and the definition against a loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels import block, fused, merge_state
from wavekv.kernels.block import attend_block, attend_block_reference, attend_into

State = tuple[Tensor, Tensor]

SIZES = st.sampled_from([1, 2, 5, 16, 31, 63, 100])
DIMS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "width": st.sampled_from([1, 7, 8, 20, 64, 80, 128]),
    }
)
MASKS = st.sampled_from(["none", "per row", "per head"])
SEEDS = st.integers(0, 2**31)


def make_block(
    seed, batch, kv_heads, group, width, queries, keys, mask, device="cpu", dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, keys, values and valid, rows without a single key among it."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, queries, width, generator=rng).to(device, dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, width, generator=rng).to(device, dtype)
    if mask == "none":
        return q, k, v, None
    shape = (batch, keys) if mask == "per row" else (batch, kv_heads, keys)
    valid = torch.rand(shape, generator=rng) < torch.rand((*shape[:-1], 1), generator=rng)
    valid &= torch.rand((*shape[:-1], 1), generator=rng) < 0.8
    return q, k, v, valid.to(device)


def loop(query, keys, values, *, scale, valid=None, causal=False, softcap=None) -> State:
    """One query and one key at a time, in Python floats."""
    B, Hq, T, D = query.shape
    Hkv, S = keys.shape[1:3]
    out, lse = torch.zeros(B, Hq, T, D), torch.full((B, Hq, T), -torch.inf)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(Hq) for t in range(T)):
        g, total, acc = h // (Hq // Hkv), 0.0, torch.zeros(D, dtype=torch.float64)
        for s in range(S):
            seen = valid is None or bool(valid[b, s] if valid.ndim == 2 else valid[b, g, s])
            if not seen or (causal and s > t):
                continue
            logit = float(query[b, h, t].double() @ keys[b, g, s].double()) * scale
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            total += math.exp(logit)
            acc += math.exp(logit) * values[b, g, s].double()
        if total:
            out[b, h, t], lse[b, h, t] = (acc / total).float(), math.log(total)
    return out, lse


def assert_same(actual: State, expected: State, tolerance: float = 2e-5) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=tolerance, atol=tolerance)
    assert not any(part.isnan().any() for part in actual)


@given(
    seed=SEEDS,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 5),
    keys=st.integers(0, 6),
    mask=MASKS,
    causal=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    rows=st.sampled_from([1, 2, 100]),
)
def test_the_reference_is_the_definition(
    seed, kv_heads, group, queries, keys, mask, causal, softcap, rows
) -> None:
    keys = queries if causal else keys
    q, k, v, valid = make_block(seed, 2, kv_heads, group, 3, queries, keys, mask)
    options = {"scale": 0.7, "valid": valid, "causal": causal, "softcap": softcap}
    with pytest.MonkeyPatch.context() as patch:
        # so many queries at once
        patch.setattr(block, "_REFERENCE_LOGITS", rows * 2 * kv_heads * group * max(keys, 1))
        reference = attend_block_reference if keys else attend_block
        assert_same(reference(q, k, v, **options), loop(q, k, v, **options))


@given(
    seed=SEEDS,
    dims=DIMS,
    queries=SIZES,
    keys=SIZES | st.just(0),
    mask=MASKS,
    causal=st.booleans(),
    softcap=st.sampled_from([None, None, 5.0]),
    strided=st.booleans(),
)
def test_a_block_equals_the_reference(
    device, seed, dims, queries, keys, mask, causal, softcap, strided
) -> None:
    keys = queries if causal else keys
    q, k, v, valid = make_block(seed, **dims, queries=queries, keys=keys, mask=mask, device=device)
    if strided:  # views into longer buffers, as the steady zone gives
        k, v = (torch.nn.functional.pad(x, (0, 0, 3, 9))[:, :, 3 : 3 + keys] for x in (k, v))
    options = {"scale": 0.3, "valid": valid, "causal": causal, "softcap": softcap}
    actual = attend_block(q, k, v, **options)
    if keys == 0:
        assert (actual[0] == 0).all()
        assert (actual[1] == -torch.inf).all()
        return
    assert_same(actual, attend_block_reference(q, k, v, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "per row", "per head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [20, 64])
def test_half_precision(device, dtype, mask, causal, softcap, width) -> None:
    q, k, v, valid = make_block(1, 3, 2, 3, width, 65, 65, mask, device, dtype)
    options = {"scale": width**-0.5, "valid": valid, "causal": causal, "softcap": softcap}
    out, lse = attend_block(q, k, v, **options)
    expected = attend_block_reference(q.float(), k.float(), v.float(), **options)
    # the fused operators round their weights and their result to the dtype
    assert_same((out, lse), expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_queries_of_another_dtype_than_the_keys(device: torch.device) -> None:
    q, k, v, valid = make_block(2, 2, 2, 2, 16, 9, 9, "per row", device)
    k, v = k.bfloat16(), v.bfloat16()
    options = {"scale": 0.25, "valid": valid, "causal": True}
    assert_same(attend_block(q, k, v, **options), attend_block_reference(q, k, v, **options))


@pytest.mark.parametrize("mask", ["per row", "per head"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 17])
def test_a_query_that_sees_no_key_is_the_empty_state(device, mask, softcap, causal, queries):
    q, k, v, _ = make_block(3, 2, 2, 2, 16, queries, queries, "none", device)
    shape = (2, queries) if mask == "per row" else (2, 2, queries)
    valid = torch.zeros(shape, dtype=torch.bool, device=device)
    valid[1, ..., queries // 2] = True
    options = {"scale": 0.25, "valid": valid, "causal": causal, "softcap": softcap}
    out, lse = attend_block(q, k, v, **options)
    assert_same((out, lse), attend_block_reference(q, k, v, **options))
    blind = [(0, slice(None))] + ([(1, slice(0, queries // 2))] if causal else [])
    for b, rows in blind:
        assert (out[b, :, rows] == 0).all()
        assert (lse[b, :, rows] == -torch.inf).all()
    assert lse[1, :, queries // 2 :].isfinite().all()


@pytest.mark.parametrize("mask", ["per row", "per head"])
def test_what_a_mask_hides_may_be_nan_in_the_reference(device, mask: str) -> None:
    q, k, v, valid = make_block(4, 3, 2, 2, 16, 9, 9, mask, device)
    hidden = ~(valid[:, None] if mask == "per row" else valid)[..., None]
    for causal in (False, True):
        options = {"scale": 0.25, "valid": valid, "causal": causal}
        clean = attend_block_reference(q, k, v, **options)
        poisoned = (x.masked_fill(hidden, torch.nan) for x in (k, v))
        assert_same(attend_block_reference(q, *poisoned, **options), clean)


@pytest.mark.parametrize("mask", ["per row", "per head"])
@pytest.mark.parametrize("causal", [False, True])
def test_what_a_mask_hides_has_no_influence(device, mask: str, causal: bool) -> None:
    q, k, v, valid = make_block(4, 3, 2, 2, 16, 9, 9, mask, device)
    hidden = ~(valid[:, None] if mask == "per row" else valid)[..., None]
    options = {"scale": 0.25, "valid": valid, "causal": causal}
    loud = (x.masked_fill(hidden, 1e4) for x in (k, v))
    assert_same(attend_block(q, *loud, **options), attend_block(q, k, v, **options))


@given(seed=SEEDS, dims=DIMS, queries=SIZES, keys=SIZES, cut=st.integers(0, 100), mask=MASKS)
def test_two_blocks_merge_into_one(device, seed, dims, queries, keys, cut, mask) -> None:
    q, k, v, valid = make_block(seed, **dims, queries=queries, keys=keys, mask=mask, device=device)
    halves = []
    for part in (slice(0, cut), slice(cut, None)):
        seen = None if valid is None else valid[..., part]
        halves += attend_block(q, k[:, :, part], v[:, :, part], scale=0.3, valid=seen)
    assert_same(merge_state(*halves), attend_block(q, k, v, scale=0.3, valid=valid))


def test_no_queries_is_an_empty_result(device: torch.device) -> None:
    q, k, v, _ = make_block(5, 2, 2, 2, 16, 0, 9, "none", device)
    out, lse = attend_block(q, k, v, scale=1.0)
    assert out.shape == (2, 4, 0, 16)
    assert lse.shape == (2, 4, 0)


def test_a_causal_block_needs_as_many_keys_as_queries() -> None:
    q, k, v, _ = make_block(6, 1, 1, 1, 8, 3, 4, "none")
    with pytest.raises(ValueError, match="got 4 keys and 3 queries"):
        attend_block(q, k, v, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="got 0 keys and 3 queries"):
        attend_block(q, k[:, :, :0], v[:, :, :0], scale=1.0, causal=True)


def test_large_logits_neither_overflow_nor_vanish(device: torch.device) -> None:
    q, k, v, valid = make_block(7, 2, 2, 2, 16, 9, 9, "per row", device)
    for causal in (False, True):
        options = {"scale": 300.0, "valid": valid, "causal": causal}
        actual = attend_block(q, k, v, **options)
        assert_same(actual, attend_block_reference(q, k, v, **options), 1e-3)


@given(
    seed=SEEDS,
    dims=DIMS,
    queries=SIZES,
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    mask=MASKS,
)
def test_blocks_one_after_another_are_one_block(device, seed, dims, queries, cuts, mask) -> None:
    keys = sum(cuts) + 1
    q, k, v, valid = make_block(seed, **dims, queries=queries, keys=keys, mask=mask, device=device)
    state, start = None, 0
    for length in [*cuts, 1]:
        part = slice(start, start + length)
        seen = None if valid is None else valid[..., part]
        state = attend_into(state, q, k[:, :, part], v[:, :, part], scale=0.3, valid=seen)
        start += length
    assert state is not None
    assert_same(state, attend_block(q, k, v, scale=0.3, valid=valid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_merge_in_float32(device, dtype) -> None:
    q, k, v, _ = make_block(8, 2, 2, 2, 64, 65, 130, "none", device, dtype)
    state = None
    for part in (slice(0, 65), slice(65, 130)):
        state = attend_into(state, q, k[:, :, part], v[:, :, part], scale=0.125)
    assert state is not None
    expected = attend_block_reference(q.float(), k.float(), v.float(), scale=0.125)
    assert_same(state, expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("least", [1, 10**9])
def test_large_blocks_by_cudnn_and_by_flash(monkeypatch, dtype, width, causal, least) -> None:
    monkeypatch.setattr(fused, "CUDNN_LEAST", least)
    device = torch.device("cuda:0")
    q, k, v, _ = make_block(9, 1, 2, 4, width, 1500, 1500, "none", device, dtype)
    if not causal:  # a view into a longer buffer, as of pages that are kept on the device
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 333))[:, :, :1500] for x in (k, v))
    options = {"scale": width**-0.5, "causal": causal}
    expected = attend_block_reference(q, k, v, **options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert_same(attend_block(q, k, v, **options), expected, tolerance)


@pytest.mark.gpu
def test_cudnn_is_chosen_where_it_was_measured_faster() -> None:
    """Not a matter of taste: flash takes twice the time on an H200 (heads of 128, half precision).
    A version of torch or cuDNN that fails here needs a look at `cudnn_agrees`."""
    device = torch.device("cuda:0")
    if torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("measured on Hopper")
    q = torch.randn(1, 2, 2048, 128, device=device, dtype=torch.bfloat16)
    for causal in (False, True):
        assert fused.fused_operator(q, q, q, None, causal) == "cudnn"
        assert fused.fused_operator(q, q, q[:, :, :2047], None, causal) == "cudnn"
        assert fused.fused_operator(q[:, :, :5], q, q, None, causal) == "flash"


def test_an_operator_that_refuses_or_errs_is_not_used(monkeypatch) -> None:
    """The probe of cuDNN, on a CPU with stand-ins."""

    def refuse(*_: object) -> State:
        raise RuntimeError("no such head dimension")

    def in_bits(operator, query, keys, values, scale, valid, causal) -> State:
        out, lse = attend_block_reference(query, keys, values, scale=scale, causal=causal)
        return out, lse / math.log(2)

    def right(operator, query, keys, values, scale, valid, causal) -> State:
        return attend_block_reference(query, keys, values, scale=scale, causal=causal)

    for stand_in, agrees in ((refuse, False), (in_bits, False), (right, True)):
        monkeypatch.setattr(fused, "run_fused", stand_in)
        for causal in (False, True):
            probe = fused.cudnn_agrees.__wrapped__
            assert probe(torch.device("cpu"), torch.float32, 16, causal) == agrees
