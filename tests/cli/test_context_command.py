"""`wavekv context`, as a user runs it, on folders."""

import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from wavekv.cli.main import main
from wavekv.saved.manifest import NAME, FileEntry, Manifest

ROOT = Path(__file__).parents[2]
FILES = {"zarr.json": b"{}", "keys/c/0": bytes(range(256)) * 4096}
TOTAL = sum(map(len, FILES.values()))


def save(path: Path, tokens: int) -> None:
    """A saved context; of other tokens, another."""
    files = {**FILES, "tokens": str(tokens).encode()}
    entries = {}
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        entries[name] = FileEntry(len(content), zlib.crc32(content))
    description = {"num_tokens": tokens, "model": "tiny", "shape": [1, 2]}
    (path / NAME).write_bytes(Manifest(description, entries).to_bytes())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with two contexts, and room for a store."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "one", 100)
    save(tmp_path / "two", 200)
    return tmp_path


@pytest.fixture
def store(folder) -> str:
    return f"file://{folder}/store"


def run(capsys, *arguments: str, status: int = 0) -> str:
    """What a command printed, its errors too; it has to end with that status."""
    got = main(["context", *arguments])
    captured = capsys.readouterr()
    assert got == status, captured
    return captured.out + captured.err


def run_json(capsys, *arguments: str, status: int = 0):
    return json.loads(run(capsys, *arguments, "--json", status=status).splitlines()[-1])


def test_there_and_back(folder, store, capsys) -> None:
    out = run(capsys, "push", "one", f"{store}/a")
    assert out == f"{store}/a: 3 files, 1.0 MiB copied\n"
    out = run(capsys, "push", "one", f"{store}/a")
    assert out == f"{store}/a: 0 files, 0.0 MiB copied; 3 were there already\n"
    assert run_json(capsys, "pull", f"{store}/a", "back", "--jobs", "2") == {
        "context": "back",
        "files": 3,
        "nbytes": TOTAL + 3,
        "kept": 0,
    }
    assert (folder / "back" / "keys/c/0").read_bytes() == FILES["keys/c/0"]
    assert run_json(capsys, "push", "two", f"{store}/b")["files"] == 3


def test_replacing_has_to_be_asked_for(folder, store, capsys) -> None:
    run(capsys, "push", "one", f"{store}/a")
    out = run(capsys, "push", "two", f"{store}/a", status=2)
    assert out.startswith("wavekv context: expected nothing at")
    run(capsys, "push", "two", f"{store}/a", "--replace")
    assert "--replace" in run(capsys, "pull", f"{store}/a", "one", status=2)
    run(capsys, "pull", f"{store}/a", "one", "--replace")
    assert (folder / "one" / "tokens").read_bytes() == b"200"


def test_ls(folder, capsys) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / NAME).write_text("{")
    header, broken, one, two, _, why = run(capsys, "ls", ".").splitlines()
    assert header.split() == ["name", "tokens", "size", "format"]
    assert broken.split() == ["broken", "damaged"]
    assert one.split() == ["one", "100", "1.0", "MiB", "1"]
    assert two.split() == ["two", "200", "1.0", "MiB", "1"]
    assert why.startswith("broken: expected ./broken/manifest.json as it was written")
    found = run_json(capsys, "ls", ".")["contexts"]
    assert [it["name"] for it in found] == ["broken", "one", "two"]
    assert found[1]["nbytes"] == TOTAL + 3
    assert run(capsys, "ls", "one") == "no saved contexts one level below one\n"


def test_info(folder, capsys) -> None:
    out = run(capsys, "info", "one")
    assert "one: 1.0 MiB in 3 files, written by wavekv" in out
    assert "num_tokens" in out
    assert "[1, 2]" in out
    result = run_json(capsys, "info", "one")
    assert result["description"] == {"num_tokens": 100, "model": "tiny", "shape": [1, 2]}
    assert "no manifest.json there" in run(capsys, "info", ".", status=2)


def test_verify(folder, capsys) -> None:
    assert run(capsys, "verify", "one") == "one: all files are as its manifest says\n"
    assert run_json(capsys, "verify", "one") == {"context": "one", "problems": []}
    (folder / "one/tokens").write_bytes(b"999")
    (folder / "one/zarr.json").unlink()
    (folder / "one/notes").write_text("mine")
    lines = run(capsys, "verify", "one", status=1).splitlines()
    crc32 = f"{zlib.crc32(b'100'):08x}, got {zlib.crc32(b'999'):08x}"
    assert lines == [
        "notes: expected file absent, got present",
        f"tokens: expected crc32 {crc32}",
        "zarr.json: expected file present, got missing",
    ]
    problems = run_json(capsys, "verify", "one", status=1)["problems"]
    assert problems[2] == {
        "file": "zarr.json",
        "field": "file",
        "expected": "present",
        "got": "missing",
    }


def test_rm_with_a_yes(folder, capsys) -> None:
    (folder / "one/notes").write_text("mine")
    out = run(capsys, "rm", "one", "--yes")
    assert out.splitlines() == [
        "one: 3 files, 1.0 MiB deleted",
        "notes was no part of it and is still there",
    ]
    assert run_json(capsys, "rm", "two", "--yes")["files"] == 3
    assert not (folder / "two").exists()
    assert "no saved context" in run(capsys, "ls", ".")
    assert "expected a saved context" in run(capsys, "rm", "one", "--yes", status=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "status"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)]
)
def test_rm_asks_on_a_terminal(folder, capsys, monkeypatch, answer, status) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert "delete one? [y/N]" in run(capsys, "rm", "one", status=status)
    assert (folder / "one").exists() == bool(status)


def test_rm_without_a_terminal_needs_the_yes(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "pass --yes" in run(capsys, "rm", "one", status=2)
    assert (folder / "one").exists()


@pytest.mark.parametrize("action", ["push", "pull", "verify"])
def test_bars_are_for_terminals_alone(folder, store, capsys, monkeypatch, action) -> None:
    run(capsys, "push", "one", f"{store}/a")
    places = {"push": ["one", f"{store}/a"], "pull": [f"{store}/a", "back"], "verify": ["one"]}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out = run(capsys, action, *places[action])
    assert f"{action}: 100%" in out
    assert "1.05M/1.05M" in out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert "100%" not in run(capsys, "verify", "one")


def test_no_bar_beside_json(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    json.loads(run(capsys, "verify", "one", "--json"))


def test_it_starts_without_torch(folder) -> None:
    code = (
        "import sys; from wavekv.cli.main import main; main(['context', 'ls', '.'])\n"
        "heavy = {'torch', 'numba', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
