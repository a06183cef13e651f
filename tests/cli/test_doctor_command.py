"""`wavekv doctor`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wavekv.cli.main import main
from wavekv.machine import Rates

RATES = Rates(
    host_read=1e10,
    disk_sequential=1e9,
    disk_random=1e8,
    page_build=1e5,
    matmul_flops=1e11,
    attention_flops={"64": 5e10},
)
KEYS = {"environment", "machine", "was_kept", "file", "problems"}


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A cache folder of its own; grows with every measurement, which is no real one."""
    done: list[int] = []

    def measure(_: object) -> Rates:
        done.append(1)
        return RATES

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("wavekv.machine.record.measure", measure)
    return done


def test_json_is_one_object(counted: list[int], capsys, tmp_path: Path) -> None:
    for was_kept in (False, True):
        assert main(["doctor", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert set(result) == KEYS
        assert result["was_kept"] == was_kept
    assert result["machine"]["rates"] == RATES.to_dict()
    assert Path(result["file"]) == tmp_path / "wavekv" / "machine.json"
    assert result["environment"]["libraries"]["torch"]
    assert all(set(problem) == {"what", "do"} for problem in result["problems"])
    assert main(["doctor", "--json", "--again"]) == 0
    assert len(counted) == 2


def test_the_report_for_people(counted: list[int], capsys, monkeypatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in ("transformers", "captured decode", "10 GB/s", "0.1 TFLOP/s", "measured now"):
        assert line in out
    monkeypatch.setattr("wavekv.machine.problems._TORCH", (99, 0))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "problem: torch is" in out
    assert "what to do: install torch" in out
    assert "measured before; --again" in out


@pytest.mark.parametrize("command", ["doctor", "estimate", "index"])
def test_transformers_is_not_imported(command: str) -> None:
    code = (
        "import sys\nfrom wavekv.cli.main import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
