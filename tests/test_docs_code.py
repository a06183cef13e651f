"""The code blocks of the documentation run, in order, in a folder of their own."""

import re
import shlex
from pathlib import Path

import pytest

from wavekv.cli.main import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: str, section: str | None) -> list[tuple[str, str, int]]:
    """Language, code and first line of each block of a page, or of one section of it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    begin, end = 0, len(text)
    if section is not None:
        begin = text.index(f"\n## {section}\n") + 1
        end = text.find("\n## ", begin) % (len(text) + 1)
    found = BLOCK.finditer(text, begin, end)
    return [(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


@pytest.mark.parametrize(
    ("path", "section"), [("docs/vector_index.md", None), ("README.md", "The index alone")]
)
def test_code_blocks_run(path, section, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__docs__"}
    found = blocks(path, section)
    assert found
    for language, code, line in found:
        if language == "python":
            # at its place in the page, so that a traceback shows it
            exec(compile("\n" * (line - 1) + code, str(ROOT / path), "exec"), names)
            continue
        for command in code.splitlines():
            program, *arguments = shlex.split(command, comments=True)
            if program == "wavekv":
                assert main(arguments) == 0, command


def test_a_block_that_fails_is_seen(tmp_path, monkeypatch) -> None:
    (tmp_path / "page.md").write_text("# A\n\n## B\n\n```python\nassert False\n```\n\n## C\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_code_blocks_run("page.md", "B", tmp_path, monkeypatch)
    assert blocks("page.md", "B") == [("python", "assert False\n", 6)]
