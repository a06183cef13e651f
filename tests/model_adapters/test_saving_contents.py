"""Saved contexts whose parts do not agree are refused, whatever their checksums say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_caches import (
    describe_anew,
    manifest_of,
    places,
    prefilled,
    replace_file,
    saving_model,
    step_logits,
)
from tiny_models import left_padded

from wavekv import OffloadedCache, OffloadedKV
from wavekv.errors import ContextFormatError, ContextMismatchError
from wavekv.saved.arrays import ArrayForm
from wavekv.saved.dtypes import bytes_of
from wavekv.saved.folder import Folder
from wavekv.saved.manifest import NAME
from wavekv.saved.tables import from_arrow, to_arrow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved context with layers of two kinds and padding, to be copied."""
    path = tmp_path_factory.mktemp("errors") / "saved"
    cache, _ = prefilled(saving_model("gemma3_text"))
    cache.save(path, token_ids=left_padded(131, 97, 113)[0])
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copied")
    return tmp_path / "copied"


WRONG = {
    "nothing": None,
    "a number": 7,
    "less than nothing": -1,
    "a fraction": 0.5,
    "text": "something",
    "a list": [3, [1], "x"],
    "an object": {"tensor": "keys", "dict": 4},
    "very much": 1 << 70,
    "a flag": True,
}
MISSING = object()


def wrong_values(found: Any) -> Iterator[tuple[str, Any]]:
    yield "missing", MISSING
    yield from WRONG.items()
    if isinstance(found, list):
        yield "one less", found[:-1]
        yield "one twice", [*found, *found[-1:]]
    if type(found) is int:
        yield "one more", found + 1
    if isinstance(found, bool):
        yield "the other", not found


def put(holder: Any, where: tuple[Any, ...], value: Any) -> None:
    for key in where[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value


FREE = "tokenizer", "has_token_ids", "settings", "record_past", "segments", "device"
"""What is not of the tokens, or where another value is as good: settings of steps, a tokenizer that
nothing is compared with, segments that are one."""


@pytest.mark.slow
def test_descriptions_that_say_something_else(copied: Path) -> None:
    """Each value of the description replaced by others: an error that names the context, or a cache
    that answers the same."""
    model = saving_model("gemma3_text")
    original, raw = manifest_of(copied), (copied / NAME).read_bytes()
    twin, mask = prefilled(model)
    expected = step_logits(model, twin, mask, count=2)[0]
    counted = {"refused": 0, "same": 0}
    kinds = ["offloaded" in layer for layer in original.description["layers"]]
    first = {kinds.index(True), kinds.index(False)}
    for where in places(original.description):
        if where[0] == "layers" and len(where) > 1 and where[1] not in first:
            # alike
            continue
        found = original.description
        for key in where:
            found = found[key]
        for kind, value in wrong_values(found):
            if type(value) is type(found) and value == found:
                continue
            describe_anew(copied, lambda description, x=where, v=value: put(description, x, v))
            loaded, refusal = load_or_refuse(copied, model)
            if loaded is None:
                assert str(copied) in refusal, (where, kind)
                counted["refused"] += 1
            else:
                assert set(FREE) & set(where), (where, kind)
                answers = step_logits(model, loaded, mask, count=2)[0]
                assert torch.equal(answers, expected), (where, kind)
                counted["same"] += 1
            (copied / NAME).write_bytes(raw)
    print(f"\nother values in a description: {counted}")
    assert counted["refused"] > 600
    assert counted["same"] < 100


def load_or_refuse(path: Path, model: OffloadedKV) -> tuple[OffloadedCache | None, str]:
    """The cache, or what the error says."""
    try:
        return OffloadedCache.load(path, model), ""
    except (ContextFormatError, ContextMismatchError) as error:
        return None, str(error)


def change_table(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = f"tables/{name}.arrow"
    folder = Folder(path)
    columns = from_arrow(folder.map(file, manifest_of(path).files[file]), file)
    columns = {key: column.clone() for key, column in columns.items()}
    change(columns)
    replace_file(path, file, to_arrow(columns, file).to_pybytes())
    folder.close()


def change_array(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    form = ArrayForm.parse((path / name / "zarr.json").read_bytes(), name)
    file = form.file_name(name, 0)
    raw = bytearray((path / file).read_bytes())
    tensor = change(torch.frombuffer(raw, dtype=form.dtype).view(form.shape).clone())
    new = ArrayForm(tuple(tensor.shape), tensor.dtype, max(1, len(tensor)))
    replace_file(path, f"{name}/zarr.json", new.to_bytes())
    replace_file(path, file, bytes_of(tensor.contiguous()).numpy().tobytes())


def column(name: str, at: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(columns: dict[str, torch.Tensor]) -> None:
        columns[name].view(-1)[at] = value

    return change


TABLES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a row below": ("layer_1_pages", column("row", 5, -1), "row must be"),
    "a row above": ("layer_1_pages", column("row", 5, 1 << 40), "row must be"),
    "a row of what pads the file": ("layer_3_pages", column("row", 0, -2), "row must be"),
    "a count over the page": ("layer_1_pages", column("counts", 7, 5), "counts must be"),
    "a token of the window": ("layer_1_pages", column("token_ids", 0, 128), "token_ids must be"),
    "a token below": ("layer_3_pages", column("token_ids", 9, -2), "token_ids must be"),
    "a column less": ("layer_1_pages", lambda c: c.pop("key_step"), "key_step must be"),
    "a column of another type": (
        "layer_1_pages",
        lambda c: c.update(token_ids=c["token_ids"].long()),
        "token_ids must be",
    ),
    "pages less": (
        "layer_1_pages",
        lambda c: c.update({k: v[:-1] for k, v in c.items()}),
        "must be",
    ),
    "blocks less": (
        "layer_1_blocks",
        lambda c: c.update({k: v[:-1] for k, v in c.items()}),
        "must be",
    ),
    "blocks without a name": (
        "layer_1_blocks",
        lambda c: c.update(other=c.pop("block_mean")),
        "block_mean must be",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_say_something_else(case: str, copied: Path) -> None:
    name, change, message = TABLES[case]
    if "pads" in case:
        (arena,) = manifest_of(copied).description["arenas"]
        change = column("row", 0, arena["num_pages"])
    change_table(copied, name, change)
    with pytest.raises(ContextFormatError, match=message) as caught:
        OffloadedCache.load(copied, saving_model("gemma3_text"))
    assert str(copied) in str(caught.value)


ARRAYS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "keys less": ("layers/1/keys", lambda x: x[:, :, 1:], "keys must be"),
    "keys of two": ("layers/1/keys", lambda x: x[:2], "keys must be"),
    "values of halves": ("layers/1/values", lambda x: x.half(), "values must be"),
    "values wider": ("layers/1/values", lambda x: torch.cat([x, x], 3), "values must be"),
    "numbers for bools": ("layers/3/valid", lambda x: x.to(torch.uint8), "valid must be"),
    "sinks of numbers": ("layers/3/sink_positions", lambda x: x.int(), "sink_positions must be"),
    "sinks to come": ("layers/3/sink_positions", lambda x: x + 131, "sink_positions must be"),
    "sinks below": ("layers/3/sink_positions", lambda x: x - 133, "sink_positions must be"),
    "scatter of floats": ("layers/1/scatter", lambda x: x.float(), "scatter must be"),
    "scatter of less": ("layers/1/scatter", lambda x: x[:, :1], "scatter must be"),
    "padding of two": ("padding", lambda x: x[:2], "padding must be"),
    "padding of numbers": ("padding", lambda x: x.to(torch.uint8), "padding must be"),
    "padding of all to come": ("padding", lambda x: x.repeat(1, 9), "padding must be"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_say_something_else(case: str, copied: Path) -> None:
    name, change, message = ARRAYS[case]
    change_array(copied, name, change)
    with pytest.raises(ContextFormatError, match=message) as caught:
        OffloadedCache.load(copied, saving_model("gemma3_text"))
    assert str(copied) in str(caught.value)


SEGMENTS = {
    "that fall": lambda x: [x[1], x[0], *x[2:]],
    "twice the same": lambda x: [x[0], *x],
    "that end early": lambda x: x[:-1],
    "that end late": lambda x: [*x, [x[-1][0] + 16, x[-1][1] + 4]],
    "in parts of blocks": lambda x: [[4, 1], *x],
    "whose tokens are not those of their pages": lambda x: [[x[0][0] + 4, x[0][1]], *x[1:]],
    "of nothing": lambda x: [[0, 0], *x],
    "below nothing": lambda x: [[-16, -4], *x],
    "of fractions": lambda x: [[float(a), float(b)] for a, b in x],
    "of three": lambda x: [[*pair, 0] for pair in x],
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_that_do_not_rise(case: str, copied: Path) -> None:
    def change(description: dict[str, Any]) -> None:
        kept = description["layers"][1]["offloaded"]
        assert len(kept["segments"]) > 1
        kept["segments"] = SEGMENTS[case](kept["segments"])

    describe_anew(copied, change)
    with pytest.raises(ContextFormatError, match="segments must rise"):
        OffloadedCache.load(copied, saving_model("gemma3_text"))
