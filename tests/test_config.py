"""OffloadConfig refuses bad values with an error that says expected and got."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.config import DECODE_FIELDS, OffloadConfig, parse_size
from wavekv.errors import ConfigError

PAGES = {"page_size": 16, "append_segment": 256, "segment": 8192}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"mode": "fast"}, "mode must be one of retrieval, exact, got 'fast'"),
    ({"mode": None}, "mode must be one of .* got None"),
    ({"tail_estimate": "third"}, "tail_estimate must be one of none, first, second, got 'third'"),
    ({"budget": 0}, r"budget must be a float share in \(0, 1\] or an int count .* got 0"),
    ({"budget": 0.0}, "budget must be .* got 0.0"),
    ({"budget": 1.5}, "budget must be .* got 1.5; for all tokens give 1.0"),
    ({"budget": -3}, "budget must be .* got -3"),
    ({"budget": True}, "budget must be .* got True"),
    ({"budget": "2%"}, "budget must be .* got '2%'"),
    ({"budget": math.nan}, "budget must be .* got nan"),
    ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\] or None, got 0.0"),
    ({"top_p": 1.01}, "top_p must be .* got 1.01"),
    ({"top_p": "0.9"}, "top_p must be .* got '0.9'"),
    ({"top_p": True}, "top_p must be .* got True"),
    ({"top_p": math.nan}, "top_p must be .* got nan"),
    ({"refine": 0}, "refine must be an int of at least 1, got 0"),
    ({"min_budget": -1}, "min_budget must be an int of at least 0, got -1"),
    ({"min_budget": 0.5}, "min_budget must be an int of at least 0, got 0.5"),
    ({"num_sink_tokens": -1}, "num_sink_tokens must be an int of at least 0, got -1"),
    ({"num_sink_tokens": 257}, "num_sink_tokens must be at most append_segment=256, got 257"),
    ({"window": 0}, "window must be an int of at least 1, got 0"),
    ({"window": True}, "window must be an int of at least 1, got True"),
    ({"page_size": 0}, "page_size must be an int of at least 1, got 0"),
    ({"page_size": 256, "segment": 8192}, "page_size must be at most 255, got 256"),
    ({"page_size": 16.0}, "page_size must be an int of at least 1, got 16.0"),
    ({"prefill_chunk": 0}, "prefill_chunk must be an int of at least 1, got 0"),
    ({"segment": 8000}, "segment must be page_size=16 times a power of two, got 8000; 4096 would"),
    ({"segment": 8193}, "segment must be page_size=16 times a power of two, got 8193; 8192 would"),
    ({"append_segment": 8}, "append_segment must be an int of at least 16, got 8"),
    ({"append_segment": "256"}, "append_segment must be an int of at least 16, got '256'"),
    ({"page_size": 24}, "segment must be page_size=24 times a power of two, got 8192"),
    ({"append_segment": 16384}, "append_segment must be at most segment=8192, got 16384"),
    ({"cpu_budget": "lots"}, 'cpu_budget must look like "8GiB" or "500MB", got \'lots\''),
    ({"cpu_budget": 0}, r"cpu_budget must be bytes > 0, text such as .* got 0"),
    ({"cpu_budget": None}, r"cpu_budget must be bytes > 0, text such as .* got None"),
    ({"host_dtype": "int7"}, "host_dtype must be one of model, int8, int4, int4-int2, got 'int7'"),
    ({"disk": 3}, "disk must be the path of a folder or None, got 3"),
    ({"disk_budget": 0}, "disk_budget must be bytes > 0"),
    ({"disk_deadline": -0.1}, "disk_deadline must be seconds >= 0 or None, got -0.1"),
    ({"disk_deadline": True}, "disk_deadline must be seconds >= 0 or None, got True"),
    ({"device_budget": "much"}, 'device_budget must look like "8GiB" or "500MB", got \'much\''),
    ({"max_misses": 0}, "max_misses must be an int of at least 1, got 0"),
    ({"max_misses": 0.5}, "max_misses must be an int of at least 1, got 0.5"),
    ({"prefetch": "all"}, "prefetch must be one of none, runners-up, early, got 'all'"),
    ({"capture": 1}, "capture must be True or False, got 1"),
    ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_a_bad_value_is_an_error_that_says_what_was_expected(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(**PAGES | values)
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(**PAGES).override(**values)


def test_the_size_that_an_error_suggests_is_accepted() -> None:
    with pytest.raises(ConfigError, match="320 would do"):
        OffloadConfig(page_size=20, segment=500, append_segment=160)
    assert OffloadConfig(page_size=20, segment=320, append_segment=160).segment == 320


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"budget": 1},
        {"budget": 1.0},
        {"top_p": 1},
        {"num_sink_tokens": 0, "min_budget": 0},
        {"page_size": 1, "segment": 1, "append_segment": 1, "num_sink_tokens": 1},
        {"num_sink_tokens": 256},
        {"cpu_budget": "8GiB"},
    ],
)
def test_bounds_are_accepted(values: dict[str, Any]) -> None:
    OffloadConfig(**PAGES | values)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 500mb ", 500_000_000),
        ("3kib", 3072),
        ("7B", 7),
        ("2TiB", 2 << 40),
        (12345, 12345),
        (0.8, 0.8),
        (1.0, 1.0),
        (1, 1),
    ],
)
def test_sizes(text: float | int | str, size: float | int) -> None:
    parsed = parse_size("cpu_budget", text)
    assert (parsed, type(parsed)) == (size, type(size))


@pytest.mark.parametrize(
    "size",
    [
        *("", "8", "GiB", "5iB", "-1GiB", "8 GiB free", "0GiB", "0.1B"),
        *(0, -1, 0.0, -0.5, 1.5, True, math.inf, math.nan, None, [1]),
    ],
)
def test_bad_sizes_are_errors_that_show_what_was_given(size: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size("disk", size)
    assert str(caught.value).startswith("disk must ")
    assert str(caught.value).endswith(f"got {size!r}")


@given(number=st.integers(1, 10**6), unit=st.sampled_from(["B", "KB", "MiB", "GB", "TiB"]))
def test_whole_numbers_of_units_are_exact(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    assert parse_size("x", f"{number}{unit}") == number * base ** "BKMGT".index(unit[0])


def test_override_changes_a_copy_and_only_what_is_allowed() -> None:
    config = OffloadConfig()
    assert config.override(DECODE_FIELDS, budget=100).budget == 100
    assert config.budget == 0.02
    with pytest.raises(ConfigError, match=r"only the settings mode, budget, .* got \['window'\]"):
        config.override(DECODE_FIELDS, window=1)
    with pytest.raises(ConfigError, match=r"got \['speed'\]"):
        config.override(speed=11)
    with pytest.raises(ConfigError, match=r"got \['budget'\]"):
        config.override((), budget=100)
