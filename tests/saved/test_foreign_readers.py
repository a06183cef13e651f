"""Zarr and Arrow read a context by themselves: this module imports nothing of what wrote it.

A subprocess saves a context, and the same numbers as `.npz`.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest

zarr = pytest.importorskip("zarr")

WRITE = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from saved_cases import example
content, plain = example(), {}
content.save(Path(sys.argv[2]) / "context")
def keep(name, tensor):
    is_brain = str(tensor.dtype) == "torch.bfloat16"
    plain[name] = (tensor.view(__import__("torch").int16) if is_brain else tensor).numpy()
    if is_brain:
        plain[name] = plain[name].view(np.uint16)
for name, tensor in {**content.arrays, **content.pages}.items():
    keep(name, tensor)
for name, columns in content.tables.items():
    for column, tensor in columns.items():
        keep(f"tables/{name}/{column}", tensor)
np.savez(Path(sys.argv[2]) / "plain.npz", **plain)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign")
    command = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(path)]
    subprocess.run(command, check=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "plain.npz") as file:
        return dict(file)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """To the bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return found.tobytes() == expected.tobytes()


def test_nothing_of_the_writer_is_loaded_by_this_module() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    imports = [line for line in source.split("WRITE =")[0].splitlines() if "import" in line]
    assert not [line for line in imports if "wavekv" in line or "torch" in line]


def test_zarr_reads_every_array(folder: Path, plain: dict[str, np.ndarray]) -> None:
    group = zarr.open_group(folder / "context", mode="r")
    arrays = [name for name in plain if not name.startswith("tables/")]
    assert len(arrays) > 10
    for name in arrays:
        assert same(np.asarray(group[name][...]), plain[name]), name


def test_zarr_walks_the_groups(folder: Path) -> None:
    group = zarr.open_group(folder / "context/types", mode="r")
    names = sorted(name for name, _ in group.arrays())
    assert names == sorted(
        ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool"]
    )
    assert dict(group["bfloat16"].attrs) == {"dtype": "bfloat16"}


def test_zarr_reads_a_part_of_pages(folder: Path, plain: dict[str, np.ndarray]) -> None:
    pages = zarr.open_array(folder / "context/pages/0", mode="r")
    assert pages.chunks == (256, 4096)
    assert same(np.asarray(pages[250:515]), plain["pages/0"][250:515])


def test_arrow_reads_every_table(folder: Path, plain: dict[str, np.ndarray]) -> None:
    for name in ("numbers", "none"):
        with pyarrow.memory_map(str(folder / f"context/tables/{name}.arrow")) as source:
            table = pyarrow.ipc.open_file(source).read_all()
            for field in table.schema:
                column = table[field.name].combine_chunks()
                metadata = field.metadata or {}
                inner = json.loads(metadata.get(b"shape", b"[]"))
                values = column.flatten() if inner else column
                found = values.to_numpy(zero_copy_only=False).reshape(-1, *inner)
                if metadata.get(b"dtype") == b"bool":
                    found = found.astype(bool)
                assert same(found, plain[f"tables/{name}/{field.name}"]), field.name


def test_arrow_reads_the_checksums_of_pages(folder: Path, plain: dict[str, np.ndarray]) -> None:
    for index in range(3):
        path = folder / f"context/tables/pages_{index}.arrow"
        crcs = pyarrow.ipc.open_file(path).read_all()["crc32"].to_pylist()
        assert crcs == [zlib.crc32(page.tobytes()) for page in plain[f"pages/{index}"]]


def test_the_manifest_is_json_with_all_files(folder: Path) -> None:
    root = folder / "context"
    body = json.loads((root / "manifest.json").read_bytes())
    told = body.pop("crc32")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert told == f"{zlib.crc32(text.encode()):08x}"
    assert body["format"] == "wavekv-context"
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(body["files"])
    for name, entry in body["files"].items():
        data = (root / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
