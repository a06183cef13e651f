"""docs/support.md says what the matrix tests, no more and no less."""

from support_table import PAGE, render


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), (
        "docs/support.md differs from the tested matrix; "
        "run: python tests/model_adapters/support_table.py"
    )
