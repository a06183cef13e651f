"""Numbers of tokens as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import ConfigError
from wavekv.estimate.quantity import parse_tokens, tokens_text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1", 1), ("128K", 131072), ("1M", 1048576), ("1.5k", 1536), (" 2 M ", 2097152)],
)
def test_suffixes(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1G", "1.5", "ten", "1e3", "0.0001K"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="must look like 100000, 128K or 1M"):
        parse_tokens(text)


@given(st.integers(1, 1 << 40))
def test_text_and_back(tokens: int) -> None:
    assert parse_tokens(tokens_text(tokens)) == tokens
