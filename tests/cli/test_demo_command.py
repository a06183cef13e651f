"""`wavekv demo` on a short context, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wavekv.cli.main import main

ROOT = Path(__file__).parents[2]

KEYS = {
    "context_tokens",
    "questions",
    "budget",
    "retrieved_fraction",
    "correct",
    "tpot_ms",
    "prefill_s",
    "kv_bytes",
}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_demo_answers_and_prints_json_last(device) -> None:
    command = [sys.executable, "-m", "wavekv.cli.main", "demo", "--json", "--device", device]
    command += ["--tokens", "4096", "--questions", "6", "--budget", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "answers right" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= KEYS
    assert result["context_tokens"] == 4096
    assert result["questions"] == 6
    assert result["correct"]["full"] >= 5
    assert result["correct"]["retrieval"] >= result["correct"]["full"] - 1
    assert result["exact_tokens_equal_full"]
    assert 0 < result["retrieved_fraction"] < 0.2
    assert result["kv_bytes"]["host"] > result["kv_bytes"]["device"] > 0


@pytest.mark.slow
def test_demo_takes_a_file_and_its_exit_status_says_what_was_lost(tmp_path, capsys) -> None:
    """With next to no budget answers may be lost; the exit status must agree with the numbers."""
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the old town. " * 400)
    arguments = ["demo", "--file", str(text), "--tokens", "4096", "--questions", "8", "--json"]
    status = main([*arguments, "--budget", "0.0001"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lost = result["correct"]["full"] - result["correct"]["retrieval"]
    assert status == int(lost > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--file", "/no/such/file"], "/no/such/file"),
        (["demo", "--tokens", "10"], "at least 512 tokens, got 10"),
        (["demo", "--budget", "3.0"], "budget must be a float share"),
        (["demo", "--questions", "0"], "at least 1 question, got 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wavekv demo: ")
    assert message in error


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("wavekv 0.")


@pytest.mark.parametrize(("right", "status"), [(8, 0), (7, 0), (6, 1), (0, 1)])
def test_losing_more_than_one_question_is_a_failure(right, status, monkeypatch, capsys) -> None:
    result = {
        "questions": 8,
        "retrieved_fraction": 0.02,
        "correct": {"full": 8, "exact": 8, "retrieval": right},
        "tpot_ms": {"full": 3.0, "exact": 2.0, "retrieval": 1.0},
        "prefill_s": {"full": 1.0, "offloaded": 1.0},
        "kv_bytes": {"device": 1 << 20, "host": 1 << 22},
        "kv_bytes_full": 1 << 22,
    }
    monkeypatch.setattr("wavekv.cli.demo.measure", lambda *_: result)
    assert main(["demo", "--tokens", "512"]) == status
    assert f"{right} of 8" in capsys.readouterr().out
