"""What is done to a cache after it was loaded does the same as to one that was never saved, and
leaves the saved context as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eager_answers import generate
from saved_caches import (
    LENGTHS,
    digests,
    manifest_of,
    page_files,
    prefilled,
    same_answers,
    saving_model,
    step_logits,
    turn_logits,
)
from tiny_models import left_padded, prompt

from wavekv import OffloadedCache

Change = Callable[[OffloadedCache], Any]
CHANGES: dict[str, Change] = {
    "fork": lambda cache: cache.fork(),
    "exact fork": lambda cache: cache.fork(mode="exact"),
    "fork of a fork": lambda cache: cache.fork(budget=7).fork(budget=0.5),
    "copy": copy.deepcopy,
    "crop 1": lambda cache: cache.crop(-1),
    "crop to a page": lambda cache: cache.crop(-30),
    "crop most": lambda cache: cache.crop(-125),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "select and crop": lambda cache: (
        cache.batch_select_indices(torch.tensor([2, 2, 0])),
        cache.crop(-51),
    ),
}
ROWS = {
    "reorder": [2, 0, 1],
    "repeat": [0, 0, 1, 1, 2, 2],
    "select": [1],
    "select and crop": [2, 2, 0],
}


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_loading(change: str, host_dtype: str, tmp_path: Path) -> None:
    model = saving_model("llama", host_dtype=host_dtype)
    twin, mask = prefilled(model)
    prefilled(model)[0].save(tmp_path / "saved")
    before = digests(tmp_path / "saved")
    caches = [twin, OffloadedCache.load(tmp_path / "saved", model)]
    for number, cache in enumerate(caches):
        other = CHANGES[change](cache)
        if isinstance(other, OffloadedCache):
            # the origin goes on by itself
            step_logits(model, cache, mask, seed=5)
            caches[number] = other
    mask = mask[ROWS.get(change, [0, 1, 2])][:, : caches[0].get_seq_length()]
    mask = same_answers(model, *caches, mask)
    for cache in caches:
        cache.crop(-60)
    same_answers(model, *caches, mask[:, :-60])
    assert digests(tmp_path / "saved") == before


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next"])
def test_other_layers_after_loading(model_type: str, tmp_path: Path) -> None:
    model = saving_model(model_type)
    twin, mask = prefilled(model)
    twin.fork().save(tmp_path / "saved")
    before = digests(tmp_path / "saved")
    caches = twin, OffloadedCache.load(tmp_path / "saved", model)
    for cache in caches:
        fork = cache.fork()
        step_logits(model, fork, mask, seed=5)
        cache.reorder_cache(torch.tensor([1, 1, 2, 0]))
    after = same_answers(model, *caches, mask[[1, 1, 2, 0]])
    caches[1].save(tmp_path / "again")
    again = OffloadedCache.load(tmp_path / "again", model)
    same_answers(model, twin, again, after)
    assert digests(tmp_path / "saved") == before


def test_windows_that_can_be_cropped(tmp_path: Path) -> None:
    model = saving_model("gemma3_text")
    ids, mask = left_padded(*LENGTHS)
    caches = [model.new_cache() for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
        model.prefill(ids, cache, mask)
    caches[1].save(tmp_path / "saved")
    caches[1] = OffloadedCache.load(tmp_path / "saved", model)
    for cache in caches:
        cache.crop(-20)
        cache.stop_recording()
    same_answers(model, *caches, mask[:, :-20])


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_after_loading(num_beams: int, tmp_path: Path) -> None:
    model, ids = saving_model("llama"), prompt(117)
    twin, cache = model.new_cache(), model.new_cache()
    for each in twin, cache:
        model.prefill(ids[:, :90], each)
    cache.save(tmp_path / "saved")
    loaded = OffloadedCache.load(tmp_path / "saved", model)
    expected = generate(model, ids, past_key_values=twin, num_beams=num_beams)
    found = generate(model, ids, past_key_values=loaded, num_beams=num_beams)
    assert torch.equal(found, expected)
    # the beams themselves, some of whose pages they share
    loaded.save(tmp_path / "beams")
    again = OffloadedCache.load(tmp_path / "beams", model)
    mask = torch.ones(num_beams, loaded.get_seq_length(), dtype=torch.int64)
    same_answers(model, loaded, again, mask)


def test_shared_pages_are_stored_once(tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, mask = prefilled(model, (131,))
    one = cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(4)
    four = cache.save(tmp_path / "four")
    (first,), (second,) = (x.manifest.description["arenas"] for x in (one, four))
    assert first == second
    assert {name: one.manifest.files[name] for name in page_files(one.path)} == {
        name: four.manifest.files[name] for name in page_files(four.path)
    }
    loaded = OffloadedCache.load(tmp_path / "four", model)
    same_answers(model, cache, loaded, mask.expand(4, -1))
    # what came since is their own
    loaded.save(tmp_path / "longer")
    (third,) = manifest_of(tmp_path / "longer").description["arenas"]
    assert first["num_pages"] < third["num_pages"] < 4 * first["num_pages"]
    again = OffloadedCache.load(tmp_path / "longer", model)
    whole = torch.ones(4, loaded.get_seq_length(), dtype=torch.int64)
    same_answers(model, loaded, again, whole)


def test_forks_are_saved_by_themselves(tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, mask = prefilled(model)
    fork = cache.fork()
    _, after = turn_logits(model, fork, mask)
    fork.save(tmp_path / "fork")
    cache.save(tmp_path / "cache")
    sizes = [manifest_of(tmp_path / name).description["num_tokens"] for name in ("cache", "fork")]
    assert sizes == [131, 171]
    for path, own, its_mask in (("cache", cache, mask), ("fork", fork, after)):
        same_answers(model, own, OffloadedCache.load(tmp_path / path, model), its_mask)
