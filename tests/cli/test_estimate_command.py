"""`wavekv estimate`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wavekv.cli.main import main
from wavekv.machine import MachineRecord

H100 = str(Path(__file__).parents[2] / "bench" / "results" / "machine_h100.json")
ASKED = ["estimate", "--model", "llama-3.1-8b", "--machine", H100]
KEYS = {
    "model",
    "tokens",
    "batch",
    "dtype",
    "budget",
    "prefill_chunk",
    "machine",
    "device_bytes",
    "host_bytes",
    "disk_bytes",
    "pcie_bytes_per_token",
    "decode_step",
    "decode_seconds_per_token",
    "prefill",
    "problems",
    "fitting_tokens",
}


def test_json_is_one_object(capsys) -> None:
    assert main([*ASKED, "--tokens", "128K", "--compile", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == KEYS
    assert (result["tokens"], result["batch"], result["dtype"]) == (131072, 1, "bfloat16")
    assert result["problems"] == []
    for name in ("decode_step", "prefill"):
        keys = {"seconds", "floor_seconds", "factor", "parts", "how"}
        assert set(result[name]) == keys
        assert result[name]["seconds"] == pytest.approx(
            result[name]["factor"] * result[name]["floor_seconds"]
        )


def test_hits_reach_the_estimate(capsys) -> None:
    told = []
    for hits in ("0", "0.9"):
        main([*ASKED, "--tokens", "128K", "--hits", hits, "--json"])
        told.append(json.loads(capsys.readouterr().out)["pcie_bytes_per_token"])
    assert told[0] > 5 * told[1]
    assert main([*ASKED, "--tokens", "128K", "--hits", "2"]) == 2
    assert "hits must be a share" in capsys.readouterr().err


def test_settings_reach_the_estimate(capsys) -> None:
    def ask(*options: str) -> dict:
        main([*ASKED, "--tokens", "128K", "--json", *options])
        return json.loads(capsys.readouterr().out)

    plain = ask()
    assert ask("--batch", "2")["host_bytes"]["pages"] == 2 * plain["host_bytes"]["pages"]
    assert (
        ask("--dtype", "float32")["device_bytes"]["weights"] == 2 * plain["device_bytes"]["weights"]
    )
    assert ask("--budget", "0.04")["pcie_bytes_per_token"] > plain["pcie_bytes_per_token"]
    assert ask("--budget", "512")["budget"] == 512
    small = ask("--device-budget", "5GiB", "--prefill-chunk", "2048")["device_bytes"]
    assert small["while_decoding"] - small["weights"] <= 5 * 2**30
    assert small["pool"] < plain["device_bytes"]["pool"]
    assert ask("--prefill-chunk", "1024")["prefill_chunk"] == 1024 < plain["prefill_chunk"]
    assert ask("--cpu-budget", "1GiB")["problems"]
    coded = ask("--host-dtype", "int8")
    for name in ("host_bytes", "pcie_bytes_per_token"):
        before, after = (
            x[name]["pages"] if name == "host_bytes" else x[name] for x in (plain, coded)
        )
        assert 0.55 * before < after < 0.7 * before


def test_what_does_not_fit_is_said_and_is_the_exit_status(capsys) -> None:
    assert main([*ASKED, "--tokens", "1M"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: host memory for pages" in out
    assert "what to do: pages of small integers (host_dtype), fewer tokens" in out
    assert "the longest context that fits: " in out


def test_the_table_for_people(capsys) -> None:
    assert main([*ASKED, "--tokens", "128K", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    for text in ("128K tokens x 2", "pool", "page tables", "bus, for a token", "decode step: "):
        assert text in out
    assert out.rstrip().endswith("fits")


def test_a_config_file_of_a_model(tmp_path: Path, capsys) -> None:
    fields = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["estimate", "--model", str(tmp_path), "--machine", H100, "--tokens", "4K"]) == 0
    assert "float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "lots"], "tokens must look like 100000, 128K or 1M, got 'lots'"),
        (["--tokens", "1K", "--batch", "0"], "batch must be at least 1, got 0"),
        (["--tokens", "1K", "--model", "none"], "expected a config.json"),
        (["--tokens", "1K", "--dtype", "int3"], "dtype must be one of"),
        (["--tokens", "1K", "--host-dtype", "int3"], "host_dtype must be one of"),
        (["--tokens", "1K", "--budget", "2.5"], "budget must be a float share"),
        (["--tokens", "1K", "--device-budget", "much"], "device_budget must look like"),
        (["--tokens", "1K", "--machine", "/no/such.json"], "/no/such.json"),
    ],
)
def test_bad_options_are_one_clear_line(options: list[str], message: str, capsys) -> None:
    assert main([*ASKED, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wavekv estimate: ")
    assert message in error


def test_a_machine_that_was_never_measured_is(tmp_path: Path, monkeypatch, capsys) -> None:
    rates = MachineRecord.read(Path(H100)).rates
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("wavekv.machine.record.measure", lambda _: rates)
    main(["estimate", "--model", "llama-3.2-1b", "--tokens", "8K", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 8192
    assert (tmp_path / "wavekv" / "machine.json").is_file()
