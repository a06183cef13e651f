"""A cache that was saved and loaded is the cache that never was: the same logits, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eager_answers import generate
from saved_caches import (
    FEW,
    LENGTHS,
    checked_bytes,
    digests,
    longer,
    prefilled,
    same_answers,
    same_contents,
    saving_model,
    steady,
    step_logits,
    turn_logits,
)
from tiny_models import EVERY_KIND, TINY, left_padded, make_model

from wavekv import OffloadedCache, OffloadedKV, SavedContext
from wavekv.config import DECODE_FIELDS, LAYOUT_FIELDS
from wavekv.kvstore import MappedArena, TieredArena
from wavekv.saved.reader import ContextReader


@pytest.mark.parametrize("model_type", [*EVERY_KIND, "gpt_oss", "qwen3_5_text"])
def test_every_kind_of_layer(model_type: str, tmp_path: Path) -> None:
    model = saving_model(model_type)
    cache, mask = prefilled(model)
    twin = cache.fork()
    cache.save(tmp_path / "saved")
    loaded = OffloadedCache.load(tmp_path / "saved", model)
    assert loaded.batch_size == len(LENGTHS)
    assert loaded.has_padding
    same_answers(model, twin, loaded, mask)


@pytest.mark.parametrize("host_dtype", ["model", "int8", "int4", "int4-int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_of_number(dtype: torch.dtype, host_dtype: str, tmp_path: Path) -> None:
    inner = steady(make_model("llama", "sdpa", num_hidden_layers=2).to(dtype))
    model = OffloadedKV(inner, TINY, host_dtype=host_dtype, mode="exact", **FEW)
    twin, mask = prefilled(model)
    context = prefilled(model)[0].save(tmp_path / "saved")
    assert context.verify() == []
    loaded = OffloadedCache.load(tmp_path / "saved", model, verify=True)
    same_answers(model, twin, loaded, mask)


@pytest.mark.parametrize("length", [1, 3, 8, 9, 24, 25, 41])
def test_few_tokens(length: int, tmp_path: Path) -> None:
    model = saving_model("llama")
    (twin, mask), (cache, _) = prefilled(model, (length,)), prefilled(model, (length,))
    cache.save(tmp_path / "saved")
    loaded = OffloadedCache.load(tmp_path / "saved", model)
    assert loaded.stats()["pages"] == twin.stats()["pages"]
    same_answers(model, twin, loaded, mask)


def test_what_was_generated_is_saved(tmp_path: Path) -> None:
    model = saving_model("llama")
    caches = [prefilled(model) for _ in range(2)]
    for cache, mask in caches:
        # pages that are under construction when it is saved are waited for
        _, after = step_logits(model, cache, mask, count=41)
    (twin, _), (cache, _) = caches
    cache.save(tmp_path / "saved")
    loaded = OffloadedCache.load(tmp_path / "saved", model)
    assert loaded.stats()["pages"] == twin.stats()["pages"]
    # the cache itself goes on as before, too
    same_answers(model, twin.fork(), cache.fork(), after)
    same_answers(model, twin, loaded, after)


@pytest.mark.parametrize("is_tiered", [False, True])
def test_saving_over_the_context_in_use(is_tiered: bool, tmp_path: Path) -> None:
    tiers = {"disk": str(tmp_path), "cpu_budget": 48 << 10} if is_tiered else {}
    model = saving_model("llama", **tiers)
    twin, mask = prefilled(model)
    prefilled(model)[0].save(tmp_path / "saved")
    first = OffloadedCache.load(tmp_path / "saved", model)
    step_logits(model, first.fork(), mask, count=1)
    untouched = OffloadedCache.load(tmp_path / "saved", model)
    for _ in range(3):
        # its pages are read from files that are replaced meanwhile
        loaded = OffloadedCache.load(tmp_path / "saved", model)
        mask = same_answers(model, twin, loaded, mask)
        loaded.save(tmp_path / "other")
        assert loaded.save(tmp_path / "saved").verify() == []
        assert digests(tmp_path / "saved") == digests(tmp_path / "other")
        fork = loaded.fork()
        same_answers(model, fork, OffloadedCache.load(tmp_path / "other", model), mask)
    assert loaded.get_seq_length() == 131 + 3 * 49
    # one that was loaded three contexts ago still has its own
    again, mask = prefilled(model)
    same_answers(model, again, untouched, mask)
    assert sorted(os.listdir(tmp_path)) == ["other", "saved"]


def test_pages_are_read_when_they_are_wanted(tmp_path: Path) -> None:
    model = saving_model("llama", mode="retrieval", budget=8)
    cache, mask = prefilled(model, (1331,))
    cache.save(tmp_path / "saved")
    loaded = OffloadedCache.load(tmp_path / "saved", model)
    assert checked_bytes(loaded) == 0
    step_logits(model, loaded, mask, count=1)
    of_pages = cache.stats()["bytes_pages"]
    assert 0 < checked_bytes(loaded) < of_pages // 10
    step_logits(model, loaded.fork(mode="exact"), longer(mask, 1), count=1)
    assert checked_bytes(loaded) == of_pages


@pytest.mark.parametrize("host_dtype", ["model", "int4"])
def test_a_saved_context_under_two_tiers(host_dtype: str, tmp_path: Path) -> None:
    plain = saving_model("llama", host_dtype=host_dtype)
    cache, mask = prefilled(plain)
    cache.save(tmp_path / "saved")
    before = digests(tmp_path / "saved")
    page = cache.offloaded_layers[0].context.paged.arena.layout.page_bytes
    tiers = {"disk": str(tmp_path), "cpu_budget": 240 * page}
    tiered = saving_model("llama", host_dtype=host_dtype, **tiers)
    twin, loaded = prefilled(tiered)[0], OffloadedCache.load(tmp_path / "saved", tiered)
    same_contents(cache, loaded)
    mask = same_answers(tiered, twin, loaded, mask)
    (arena,) = loaded.runtime.arenas.values()
    assert isinstance(arena, TieredArena)
    assert arena.num_pages > arena.num_on_host
    assert arena.disk.bytes_read > 0
    for each in twin, loaded:
        each.crop(-90)
    mask = same_answers(tiered, twin, loaded, mask[:, :-90])
    _, mask = turn_logits(tiered, loaded, mask, count=150)
    assert arena.disk.bytes_written > 0
    # from both tiers and the context below them
    loaded.save(tmp_path / "again")
    mapped = OffloadedCache.load(tmp_path / "again", plain)
    assert isinstance(next(iter(mapped.runtime.arenas.values())), MappedArena)
    same_contents(loaded, mapped)
    mine, theirs = (step_logits(tiered, each, mask)[0] for each in (loaded, mapped))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert digests(tmp_path / "saved") == before


def test_a_cache_with_tiers_is_saved(tmp_path: Path) -> None:
    model = saving_model("llama", disk=str(tmp_path), cpu_budget=96 << 10)
    (twin, mask), (cache, _) = prefilled(model), prefilled(model)
    (arena,) = cache.runtime.arenas.values()
    assert arena.num_pages > arena.num_on_host > 0
    cache.save(tmp_path / "saved")
    prefilled(saving_model("llama"))[0].save(tmp_path / "plain")
    assert digests(tmp_path / "saved") == digests(tmp_path / "plain")
    same_answers(model, twin, cache, mask)


def test_settings_of_layout_are_saved_and_others_are_not(tmp_path: Path) -> None:
    model = saving_model("llama")
    (twin, mask), (cache, _) = prefilled(model), prefilled(model)
    cache.save(tmp_path / "saved")
    other = OffloadedKV(
        model.model,
        page_size=8,
        window=32,
        host_dtype="int8",
        num_sink_tokens=1,
        mode="exact",
        budget=0.7,
    )
    loaded = OffloadedCache.load(tmp_path / "saved", other)
    assert [getattr(loaded.config, name) for name in LAYOUT_FIELDS] == [
        getattr(cache.config, name) for name in LAYOUT_FIELDS
    ]
    assert [getattr(loaded.config, name) for name in DECODE_FIELDS] == [
        getattr(other.offload_config, name) for name in DECODE_FIELDS
    ]
    same_answers(other, twin, loaded, mask)


@pytest.mark.parametrize("is_inside", [False, True])
def test_inference_mode_does_not_matter(is_inside: bool, tmp_path: Path) -> None:
    model = saving_model("gemma3_text")
    twin, mask = prefilled(model)
    with torch.inference_mode(is_inside):
        prefilled(model)[0].save(tmp_path / "saved")
    with torch.inference_mode(is_inside):
        loaded = OffloadedCache.load(tmp_path / "saved", model)
    with torch.inference_mode(not is_inside):
        mask = same_answers(model, twin, loaded, mask)
    with torch.inference_mode(is_inside):
        same_answers(model, twin, loaded, mask)


def test_a_cache_that_goes_lets_go_of_its_files(tmp_path: Path) -> None:
    model = saving_model("llama")
    cache, mask = prefilled(model)
    cache.save(tmp_path / "saved")

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(str(tmp_path))

    before = held()
    for _ in range(3):
        loaded = OffloadedCache.load(tmp_path / "saved", model)
        fork = loaded.fork()
        step_logits(model, fork, mask, count=2)
        assert held()[1] > before[1]
        del loaded, fork
        assert held() == before


def test_what_a_saved_context_says(tmp_path: Path) -> None:
    model = saving_model("llama")
    ids, _ = left_padded(*LENGTHS)
    cache, _ = prefilled(model)
    context = cache.save(str(tmp_path / "saved"), token_ids=ids.to(torch.int32))
    opened = SavedContext.open(tmp_path / "saved")
    for each in context, opened:
        assert each.path == tmp_path / "saved"
        assert (each.num_sequences, each.num_tokens) == (3, 131)
        assert each.token_ids.dtype == torch.int64
        assert torch.equal(each.token_ids, ids)
        assert each.model["model_type"] == "llama"
        assert each.model["dtype"] == "float32"
        assert set(each.settings) == {*LAYOUT_FIELDS, *DECODE_FIELDS}
        assert (each.settings["page_size"], each.settings["budget"]) == (4, 0.2)
        assert each.nbytes + (tmp_path / "saved/manifest.json").stat().st_size == sum(
            file.stat().st_size for file in (tmp_path / "saved").rglob("*") if file.is_file()
        )
        assert each.verify() == []
        assert "3 x 131 tokens" in repr(each)
    assert cache.save(tmp_path / "saved").token_ids is None


def test_the_page_on_the_format_names_all_that_is_saved(tmp_path: Path) -> None:
    cache, _ = prefilled(saving_model("gemma3_text"))
    context = cache.save(tmp_path / "saved", token_ids=left_padded(*LENGTHS)[0])
    text = (Path(__file__).parents[2] / "docs/format.md").read_text()
    section = text.partition("## What a cache saves")[2]
    description = context.manifest.description
    named = {*description, *description["model"], *description["settings"]}
    named |= {*description["arenas"][0], *description["layers"][1]["offloaded"]}
    with ContextReader.open(context.path) as reader:
        for table in "layer_1_pages", "layer_1_blocks":
            named |= set(reader.table(table))
        tops = {name.split("/")[0] for name in reader.arrays}
        named |= {name.split("/")[-1] for name in reader.arrays if name.startswith("layers/1/")}
    assert tops == {"layers", "others", "padding", "pages", "token_ids"}
    assert {name for name in named if f"`{name}`" not in section} == set()


PROGRAM = """
import sys
sys.path[:0] = {path!r}
import torch
from eager_answers import generate
from tiny_models import TINY, left_padded, make_model
from wavekv import OffloadedCache, OffloadedKV
torch.set_num_threads(1)
for model_type in {types!r}:
    model = OffloadedKV(make_model(model_type, "sdpa"), TINY, mode="exact")
    cache = OffloadedCache.load({folder!r} + "/" + model_type, model)
    ids, mask = left_padded(131, 97)
    print(generate(model, ids, past_key_values=cache, attention_mask=mask).tolist())
"""


@pytest.mark.slow
def test_another_process_loads_it(tmp_path: Path) -> None:
    types, expected = ["llama", "gemma3_text", "qwen3_next"], []
    ids, mask = left_padded(131, 97)
    # compared as tokens: the model of the program is a plain one
    for model_type in types:
        model = saving_model(model_type)
        cache = model.new_cache()
        model.prefill(ids[:, :-1], cache, mask[:, :-1])
        cache.save(tmp_path / model_type)
        out = generate(model, ids, past_key_values=cache, attention_mask=mask)
        expected.append(str(out.tolist()))
    program = PROGRAM.format(
        path=[str(Path(__file__).parent), *sys.path], types=types, folder=str(tmp_path)
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.splitlines() == expected
