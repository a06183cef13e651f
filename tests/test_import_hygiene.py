"""`import wavekv` is light, its lazy names work, and no generic top-level name is taken.

Each probe is a fresh interpreter: what this test process has loaded already says nothing.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wavekv

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["triton", "faiss", "zarr", "matplotlib", "numba", "transformers"]

IMPORT_PROBE = f"""
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import wavekv
seconds = time.perf_counter() - start
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps({{"seconds": seconds, "heavy": sorted(new & set({HEAVY}))}}))
"""

SPEC_PROBE = """
import importlib.util, json
spec = importlib.util.find_spec("kernels")
print(json.dumps([*(spec.submodule_search_locations or []), spec.origin] if spec else []))
"""


def probe(code: str, cwd: Path) -> Any:
    """The JSON that `code` prints as its last line when run by a fresh interpreter in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light_and_quick() -> None:
    runs = [probe(IMPORT_PROBE, ROOT) for _ in range(3)]
    assert [run["heavy"] for run in runs] == [[], [], []]
    assert min(run["seconds"] for run in runs) < 0.2


def test_the_import_probe_sees_a_heavy_import() -> None:
    assert "numba" in probe(IMPORT_PROBE.replace("import wavekv", "import numba"), ROOT)["heavy"]


def test_transformers_imports_from_the_repository_root() -> None:
    # A model class too: its module asks for `kernels`, which the lazy Auto class does not.
    names = "AutoModelForCausalLM, LlamaForCausalLM"
    code = (
        f"import json; from transformers import {names}; print(json.dumps([*map(str, ({names}))]))"
    )
    auto, llama = probe(code, ROOT)
    assert "AutoModelForCausalLM" in auto
    assert "LlamaForCausalLM" in llama


def test_no_top_level_kernels_is_ours(tmp_path: Path) -> None:
    found = probe(SPEC_PROBE, tmp_path)
    assert not [place for place in found if place and Path(place).is_relative_to(ROOT / "wavekv")]
    assert not [place for place in found if place and Path(place).parent == ROOT]
    assert not (ROOT / "kernels").exists()


def test_the_spec_probe_sees_a_kernels_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert str(tmp_path / "kernels" / "__init__.py") in probe(SPEC_PROBE, tmp_path)


@pytest.mark.parametrize("name", wavekv.__all__)
def test_public_names_resolve(name: str) -> None:
    assert name in dir(wavekv)
    assert getattr(wavekv, name) is not None


def test_public_names_are_listed_once() -> None:
    assert set(wavekv.__all__) == {*wavekv._HOME, "__version__"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'OffloadKV'; public names are"):
        wavekv.OffloadKV  # noqa: B018
