"""`wavekv bench`, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from wavekv.cli import bench
from wavekv.cli.main import main

PROGRAM = '''"""{summary}

More of it.
"""

import sys

if __name__ == "__main__":
    print(*sys.argv[1:])
    sys.exit(len(sys.argv) - 1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "one.py").write_text(PROGRAM.format(summary="The first."))
    (tmp_path / "part.py").write_text('"""Of another."""\n')
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    return tmp_path


def test_programs_are_listed(folder: Path, capsys) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "one" in out
    assert "The first." in out
    assert "part" not in out


def test_arguments_and_status_are_the_programs(folder: Path, capfd) -> None:
    assert main(["bench", "one", "--tokens", "1M", "--help"]) == 3
    assert capfd.readouterr().out == "--tokens 1M --help\n"


def test_an_unknown_name_is_an_error(folder: Path, capsys) -> None:
    assert main(["bench", "two"]) == 2
    assert "expected one of one, got 'two'" in capsys.readouterr().err


def test_without_a_checkout_the_error_says_what_to_do(folder: Path, capsys) -> None:
    (folder / "one.py").unlink()
    assert main(["bench", "one"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_the_benchmarks_of_this_checkout_say_what_they_are() -> None:
    programs = bench.programs_in(bench.FOLDER)
    assert {"million", "decode", "prefill", "accuracy"} <= set(programs)
    assert all(programs.values())
