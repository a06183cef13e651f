"""What an index refuses: each error has its type, and says what was expected and what came."""

import re

import numpy as np
import pytest
import torch

from wavekv.errors import ConfigError, DtypeError, InputError
from wavekv.index import IndexParams, WaveIndex, exact_search

from .index_cases import SMALL, assert_same_tensors, make_data, snapshot

KEYS, VALUES, QUERIES = make_data(0, 100)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def index() -> WaveIndex:
    return WaveIndex.build(KEYS, SMALL, values=VALUES)


def spoiled(x: torch.Tensor, number: float) -> torch.Tensor:
    x = x.clone()
    x[1, 2, 3] = number
    return x


SHAPES = [
    (torch.zeros(2, 3, 11), "2 heads and 12 dimensions as the index, got 2 and 11"),
    (torch.zeros(3, 3, 12), "2 heads and 12 dimensions as the index, got 3 and 12"),
    (torch.zeros(12), r"must be \[H, N, D\], got \(12,\); a single one is array\[None\]"),
    (torch.zeros(3, 12), r"must be \[H, N, D\], got \(3, 12\)"),
    (torch.zeros(1, 2, 3, 12), r"must be \[H, N, D\], got \(1, 2, 3, 12\)"),
    (torch.tensor(1.0), r"must be \[H, N, D\], got \(\)"),
    (np.zeros((2, 3, 0), np.float32), r"heads and dimensions, got \(2, 3, 0\)"),
]
NUMBERS = [NAN, INF, -INF, 2.0**60]
TYPES = [
    (lambda x: x.double(), "float32, bfloat16 or float16, got torch.float64"),
    (lambda x: x.int(), "float32, bfloat16 or float16, got torch.int32"),
    (lambda x: x.to(torch.complex64), "float32, bfloat16 or float16, got torch.complex64"),
    (lambda x: x.numpy().astype(np.float64), "float32, bfloat16 or float16, got float64"),
    (lambda x: x.numpy().astype(np.int8), "float32, bfloat16 or float16, got int8"),
    (lambda x: x.numpy().astype(bool), "float32, bfloat16 or float16, got bool"),
    (lambda x: x.numpy().astype(np.complex64), "float32, bfloat16 or float16, got complex64"),
    (lambda x: x.numpy().astype(object), "float32, bfloat16 or float16, got object"),
    (lambda x: x.numpy().astype(">f4"), "float32, bfloat16 or float16, got >f4"),
    (lambda x: None, "numpy array or torch tensor, got NoneType"),
    (lambda x: "keys", "numpy array or torch tensor, got str"),
]


def uses_of(index: WaveIndex) -> dict:
    """All that takes keys like those of the index, by the name that its errors give them."""
    return {
        "search queries": lambda x: index.search(x, 1),
        "attend queries": index.attend,
        "append keys": lambda x: index.append(x, VALUES[:, :3]),
        "append values": lambda x: index.append(KEYS[:, :3], x),
    }


USES = ["search queries", "attend queries", "append keys", "append values"]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("given", "message"), SHAPES)
def test_wrong_shapes(index, use, given, message) -> None:
    before = snapshot(index)
    with pytest.raises(InputError, match=f"{use.split()[1]} .*{message}"):
        uses_of(index)[use](given)
    assert_same_tensors(snapshot(index), before)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_not_finite(index, use, number) -> None:
    before = snapshot(index)
    # what attention estimates with are fourth powers
    most = "15" if use == "search queries" else "07"
    message = rf"must be finite, at most 1e\+%s, got {re.escape(str(number))} at \[1, 2, 3\]"
    with pytest.raises(InputError, match=f"{use.split()[1]} {message % most}"):
        uses_of(index)[use](spoiled(KEYS[:, :3], number))
    with pytest.raises(InputError, match=f"keys {message % 15}"):
        WaveIndex.build(spoiled(KEYS, number), SMALL)
    with pytest.raises(InputError, match=f"query_sample {message % 15}"):
        WaveIndex.build(KEYS, SMALL, query_sample=spoiled(KEYS, number))
    assert_same_tensors(snapshot(index), before)


@pytest.mark.parametrize(("use", "most"), list(zip(USES, (1e15, 1e7, 1e7, 1e7), strict=True)))
def test_numbers_up_to_the_largest_are_accepted(use, most) -> None:
    index = WaveIndex.build(KEYS, SMALL, values=VALUES)
    with pytest.raises(InputError, match=f"at most {most:g}".replace("+", r"\+")):
        uses_of(index)[use](spoiled(KEYS[:, :3], 1.01 * most))
    uses_of(index)[use](spoiled(KEYS[:, :3], 0.99 * most))
    WaveIndex.build(spoiled(KEYS, 1e15), SMALL)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("convert", "message"), TYPES)
def test_wrong_types(index, use, convert, message) -> None:
    before = snapshot(index)
    given = convert(KEYS[:, :3])
    if given is not None or use != "append values":
        with pytest.raises(DtypeError, match=f"{use.split()[1]} must be .*{message}"):
            uses_of(index)[use](given)
    with pytest.raises(DtypeError, match=f"keys must be .*{message}"):
        WaveIndex.build(given, SMALL)
    assert_same_tensors(snapshot(index), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_appended_keys_have_the_type_of_the_index(index, dtype) -> None:
    for given in ((KEYS[:, :2].to(dtype), VALUES[:, :2]), (KEYS[:, :2], VALUES[:, :2].to(dtype))):
        with pytest.raises(DtypeError, match=f"must be torch.float32 as the index, got {dtype}"):
            index.append(*given)


def test_values_go_with_keys(index) -> None:
    with pytest.raises(InputError, match="this index wants values too, got none"):
        index.append(KEYS[:, :2])
    with pytest.raises(InputError, match=r"values must be \(2, 2, 12\) as the keys, got \(2, 3, 1"):
        index.append(KEYS[:, :2], VALUES[:, :3])
    with pytest.raises(InputError, match=r"values must be \(2, 100, 12\) as .* got \(2, 99, 12\)"):
        WaveIndex.build(KEYS, SMALL, values=VALUES[:, :99])
    plain = WaveIndex.build(KEYS, SMALL)
    with pytest.raises(InputError, match=r"this index wants no values.*, got some"):
        plain.append(KEYS[:, :2], VALUES[:, :2])


def test_a_query_sample_is_like_the_keys() -> None:
    with pytest.raises(InputError, match=r"query_sample must be of 2 heads and 12 .* got 2 and 5"):
        WaveIndex.build(KEYS, SMALL, query_sample=QUERIES[..., :5])
    with pytest.raises(InputError, match="query_sample must hold a query, got none"):
        WaveIndex.build(KEYS, SMALL, query_sample=QUERIES[:, :0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("k", k, f"at least 1, got {k!r}") for k in (0, -1, True, 2.0, None, "3")),
        *(("budget", b, f"least 1, got {b!r}") for b in (0, -1, True, None, "all")),
        *(("budget", b, rf"in \(0, 1\], .*got {b!r}") for b in (0.0, 1.5, -1.0, NAN, INF)),
        *(("top_p", p, rf"in \(0, 1\], got {p!r}") for p in (0, 0.0, 1.5, -1, NAN, True, "all")),
        *(("rerank", r, f"at least 1, got {r!r}") for r in (0, 0.99, -1, NAN, INF, None, "2")),
        *(("group", g, f"at least 1, got {g!r}") for g in (0, -2, True, 2.0, None)),
        ("group", 4, "groups of 4, got 6 of them"),
        *(("scale", s, f"positive, got {s!r}") for s in (0, -1.0, NAN, INF, "2")),
        *(("num_threads", t, f"at least 1, got {t!r}") for t in (0, -1, 1.5, True)),
    ],
)
def test_options_out_of_range(index, name, value, message) -> None:
    with pytest.raises(InputError, match=f"{'queries' if value == 4 else name} .*{message}"):
        index.search(QUERIES, **({"k": 1} | {name: value}))
    if name == "k":
        with pytest.raises(InputError, match=f"k .*{message}"):
            exact_search(KEYS, QUERIES, value)
    elif name in ("budget", "top_p", "group", "scale"):
        with pytest.raises(InputError, match=f"{'queries' if value == 4 else name} .*{message}"):
            index.attend(QUERIES, **{name: value})


@pytest.mark.parametrize("softcap", [0, 0.0, -1, NAN])
def test_a_softcap_is_positive(index, softcap) -> None:
    with pytest.raises(InputError, match=f"softcap must be positive, got {softcap!r}"):
        index.attend(QUERIES, softcap=softcap)


@pytest.mark.parametrize(
    ("n", "message"),
    [(101, "at most ntotal=100, got 101"), *((n, f"got {n!r}") for n in (-1, 1.0, True, None))],
)
def test_truncating_to_what_is_not_there(index, n, message) -> None:
    with pytest.raises(InputError, match=f"n must be .*{message}"):
        index.truncate(n)
    assert len(index) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"page_size": p}, f"page_size .* 1 to 256, got {p}") for p in (3, 12, 512)),
        *(({"page_size": p}, f"page_size .*, got {p!r}") for p in (0, -8, True, 8.0, None)),
        *(({"segment": s}, f"at least 16, got {s}") for s in (8, 64, 8000, 384, 129)),
        *(({"segment": s}, f"segment .*, got {s!r}") for s in (0, -1, 8192.0, None, True)),
        *(({"code_dims": c}, f"code_dims .*, got {c!r}") for c in (0, -8, 12, 8.0, True)),
    ],
)
def test_wrong_parameters(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        IndexParams(**options)


def test_pages_of_keys_with_values_hold_at_most_128() -> None:
    params = IndexParams(page_size=256, segment=4096)
    assert len(WaveIndex.build(KEYS, params)) == KEYS.shape[1]
    with pytest.raises(ConfigError, match="page_size must be at most 128 for keys with values"):
        WaveIndex.build(KEYS, params, values=KEYS)


def test_no_more_dimensions_are_coded_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"code_dims must be at most 16 .*12.*, got 24"):
        WaveIndex.build(KEYS, IndexParams(code_dims=24))
    with pytest.raises(TypeError):
        IndexParams(8)


def test_wrong_device_without_a_gpu(index) -> None:
    with pytest.raises(InputError, match="queries must be on cpu as the index, got meta"):
        index.search(QUERIES.to("meta"), 1)
