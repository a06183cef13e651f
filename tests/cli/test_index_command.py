"""`wavekv index` on small arrays, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wavekv.cli import index as index_command
from wavekv.cli.main import main
from wavekv.index import IndexParams, WaveIndex, exact_search

ROOT = Path(__file__).parents[2]
NUM_KEYS, DIM = 2048, 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with keys, values, queries and an index of each kind."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, NUM_KEYS, DIM)).astype(np.float32)
    queries = rng.normal(size=(2, 6, DIM)).astype(np.float32)
    np.save("keys.npy", keys[0])
    np.save("heads.npy", keys)
    np.save("queries.npy", queries[0])
    np.save("head_queries.npy", queries)
    np.savez("all.npz", keys=keys[0], queries=queries[0])
    WaveIndex.build(keys[0]).save("keys.wave")
    WaveIndex.build(keys).save("heads.wave")
    return tmp_path


def run(capsys, *arguments: str) -> str:
    """What a command printed; it has to succeed."""
    status = main(["index", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def run_json(capsys, *arguments: str):
    return json.loads(run(capsys, *arguments, "--json"))


def test_build_says_what_was_built(folder, capsys) -> None:
    out = run(capsys, "build", "keys.npy", "-o", "new.wave")
    assert str(NUM_KEYS) in out
    assert "1 head, 16 dimensions" in out
    result = run_json(capsys, "build", "all.npz:keys", "-o", "new.wave", "--page-size", "32")
    with WaveIndex.load("new.wave") as built:
        assert built.params == IndexParams(page_size=32)
        assert result["nbytes"] == built.nbytes
        assert {name: result[name] for name in built.stats()} == built.stats()
    assert result["build_s"] > 0
    assert result["index"] == "new.wave"


def test_a_build_in_parts_is_that_of_one_call(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(index_command, "_APPEND_BYTES", 1)
    options = ["--values", "heads.npy", "--query-sample", "head_queries.npy", "--segment", "512"]
    result = run_json(capsys, "build", "heads.npy", "-o", "new.wave", *options)
    assert result["has_values"]
    assert result["has_query_sample"]
    keys, sample = np.load("heads.npy"), np.load("head_queries.npy")
    whole = WaveIndex.build(keys, IndexParams(segment=512), values=keys, query_sample=sample)
    whole.save("whole.wave")
    assert (folder / "new.wave").read_bytes() == (folder / "whole.wave").read_bytes()


def test_an_index_of_no_keys(folder, capsys) -> None:
    np.save("none.npy", np.zeros((0, DIM), np.float32))
    assert run_json(capsys, "build", "none.npy", "-o", "none.wave")["ntotal"] == 0
    assert run_json(capsys, "info", "none.wave")["ntotal"] == 0


def test_build_from_arrow(folder, capsys) -> None:
    pa = pytest.importorskip("pyarrow")
    flat = pa.array(np.load("keys.npy").reshape(-1))
    table = pa.table({"keys": pa.FixedSizeListArray.from_arrays(flat, DIM)})
    with open("keys.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    run(capsys, "build", "keys.arrow:keys", "-o", "new.wave")
    assert (folder / "new.wave").read_bytes() == (folder / "keys.wave").read_bytes()


@pytest.mark.parametrize("options", [[], ["--mmap"]])
def test_query_json_is_what_the_index_finds(folder, capsys, options) -> None:
    result = run_json(
        capsys, "query", "keys.wave", "queries.npy", "-k", "3", "--budget", "0.3", *options
    )
    found = WaveIndex.load("keys.wave").search(np.load("queries.npy"), 3, budget=0.3)
    assert result["ids"] == found.ids.tolist()
    np.testing.assert_allclose(result["scores"], found.scores, rtol=1e-6)
    assert result["keys_scanned"] == found.keys_scanned.mean()
    assert result["keys_reranked"] == found.keys_reranked.mean()
    assert result["ms_per_query"] > 0


def test_exact_query_prints_a_table(folder, capsys) -> None:
    out = run(capsys, "query", "heads.wave", "head_queries.npy", "-k", "2", "--exact")
    scores, ids = exact_search(np.load("heads.npy"), np.load("head_queries.npy"), 2)
    assert f"{ids[0, 0, 0]} ({scores[0, 0, 0]:.4g})" in out
    assert "head 0, 4" in out
    assert "6 queries of each of 2 heads, k=2: of each 2048 keys, 2048 scanned" in out


def test_queries_in_groups_with_top_p(folder, capsys) -> None:
    how = ["--group", "3", "--top-p", "0.5", "--budget", "500"]
    result = run_json(capsys, "query", "heads.wave", "head_queries.npy", *how)
    assert (result["group"], result["top_p"], result["budget"]) == (3, 0.5, 500)
    assert 0 < result["keys_scanned"] < 600


def test_padding_is_null_in_json_and_a_dash_in_the_table(folder, capsys) -> None:
    WaveIndex.build(np.load("keys.npy")[:130]).save("few.wave")
    result = run_json(capsys, "query", "few.wave", "queries.npy", "-k", "140", "--exact")
    assert result["ids"][0][130:] == [-1] * 10
    assert result["scores"][0][130:] == [None] * 10
    assert result["scores"][0][129] is not None


@pytest.mark.parametrize("heads", [False, True])
def test_found_is_written(folder, capsys, heads) -> None:
    names = ("heads.wave", "head_queries.npy") if heads else ("keys.wave", "all.npz:queries")
    run(capsys, "query", *names, "-o", "found.npz")
    found = WaveIndex.load(names[0]).search(
        np.load("head_queries.npy" if heads else "queries.npy"), 10
    )
    with np.load("found.npz") as written:
        np.testing.assert_array_equal(written["ids"], found.ids)
        np.testing.assert_array_equal(written["scores"], found.scores)


@pytest.mark.parametrize("verify", [False, True])
def test_info(folder, capsys, verify) -> None:
    options = ["--verify"] if verify else []
    out = run(capsys, "info", "heads.wave", *options)
    assert "2 heads, 16 dimensions" in out
    assert ("all checksums are right" in out) == verify
    result = run_json(capsys, "info", "heads.wave", *options)
    assert result["verified"] == verify
    assert result["file_nbytes"] == Path("heads.wave").stat().st_size
    assert sum(result["parts"].values()) == result["nbytes"]


def test_bench(folder, capsys) -> None:
    budgets = ["--budgets", "0.2", "1.0", "800"]
    out = run(capsys, "bench", "keys.wave", "queries.npy", "-k", "10", *budgets)
    assert "recall@10" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["0.2", "1.0", "800", "exact"]
    result = run_json(capsys, "bench", "keys.wave", "queries.npy", "-k", "10", *budgets)
    some, whole, count = result["budgets"]
    assert (some["budget"], whole["budget"], count["budget"]) == (0.2, 1.0, 800)
    assert 0.3 < some["recall"] < 1
    assert (whole["recall"], whole["share_scanned"]) == (1.0, 1.0)
    assert some["share_scanned"] < count["share_scanned"] < 0.5
    assert min(some["ms"], result["exact_ms"]) > 0


def test_bench_of_heads(folder, capsys) -> None:
    result = run_json(capsys, "bench", "heads.wave", "head_queries.npy", "-k", "5")
    assert len(result["budgets"]) == 5
    assert result["num_heads"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nix.npy", "-o", "a.wave"], "nix.npy"),
        (["build", "keys.npy", "-o", "nix/a.wave"], "a folder to write a.wave to, got nix"),
        (["build", "all.npz:zzz", "-o", "a.wave"], "to hold 'zzz', got keys, queries"),
        (["build", "double.npy", "-o", "a.wave"], "keys must be float32, bfloat16 or float16"),
        (["build", "nan.npy", "-o", "a.wave"], "from key 0 on: keys must be finite"),
        (["build", "keys.npy", "-o", "a.wave", "--page-size", "7"], "power of two"),
        (["build", "keys.npy", "-o", "a.wave", "--code-dims", "80"], "code_dims must be at most"),
        (
            ["build", "keys.npy", "-o", "a.wave", "--values", "queries.npy"],
            "values must be (2048, 16) as the keys, got (6, 16)",
        ),
        (
            ["build", "keys.npy", "-o", "a.wave", "--query-sample", "narrow.npy"],
            "query_sample must be of 1 heads and 16 dimensions",
        ),
        (["query", "nix.wave", "queries.npy"], "nix.wave"),
        (["query", "keys.npy", "queries.npy"], "keys.npy to be a wavekv index"),
        (["query", "keys.wave", "narrow.npy"], "16 dimensions as the index, got 1 and 4"),
        (["query", "keys.wave", "head_queries.npy"], "queries must be [N, D], got (2, "),
        (["query", "keys.wave", "none.npy"], "none.npy to hold queries, got none"),
        (["query", "keys.wave", "queries.npy", "-k", "0"], "k must be an integer of at least 1"),
        (
            ["query", "keys.wave", "queries.npy", "--budget", "1.5"],
            "budget must be a share of the keys",
        ),
        (["query", "keys.wave", "queries.npy", "--group", "4"], "groups of 4, got 6"),
        (["query", "keys.wave", "queries.npy", "-o", "a.csv"], ".feather, got a.csv"),
        (["query", "keys.wave", "queries.npy", "--exact", "--top-p", "0.5"], "drop one"),
        (["query", "damaged.wave", "queries.npy"], "whose checksum is another"),
        (["query", "cut.wave", "queries.npy"], "cut.wave as it was saved"),
        (["info", "nix.wave"], "nix.wave"),
        (["info", "cut.wave"], "cut.wave as it was saved"),
        (["info", "damaged.wave", "--verify"], "whose checksum is another"),
        (["bench", "keys.wave", "none.npy"], "to hold queries, got none"),
        (
            ["bench", "keys.wave", "queries.npy", "--budgets", "2.0"],
            "budget must be a share of the keys",
        ),
    ],
)
def test_errors_are_one_line(folder, arguments, message, capsys) -> None:
    np.save("double.npy", np.zeros((200, DIM)))
    np.save("nan.npy", np.full((200, DIM), np.nan, np.float32))
    np.save("narrow.npy", np.zeros((5, 4), np.float32))
    np.save("none.npy", np.zeros((0, DIM), np.float32))
    whole = bytearray((folder / "keys.wave").read_bytes())
    (folder / "cut.wave").write_bytes(whole[:-10])
    whole[5000] ^= 1
    (folder / "damaged.wave").write_bytes(whole)
    assert main(["index", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("wavekv index: ")
    assert message in error[0]
    assert not (folder / "a.wave").exists()


def test_the_command_as_a_program(folder) -> None:
    command = [sys.executable, "-m", "wavekv.cli.main", "index", "info", "keys.wave", "--json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["ntotal"] == NUM_KEYS
    assert done.stderr == ""


def test_help_names_both_commands(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "demo" in out
    assert "index" in out
