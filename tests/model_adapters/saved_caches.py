"""Caches to save, what they answer, and saved contexts that are looked at or changed."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import TINY, left_padded, make_model, prompt
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wavekv import OffloadedCache, OffloadedKV
from wavekv.kvstore import MappedArena
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.offload.stored import store_layer
from wavekv.saved.manifest import NAME, FileEntry, Manifest

LENGTHS = 131, 97, 113
"""Of the sequences of `prefilled`, padded on the left to the longest."""
NUM_STEPS = 6
FEW: dict[str, Any] = {"budget": 0.2, "min_budget": 0}
"""Steps that retrieve some pages and estimate the others."""


@functools.cache
def _steady_model(model_type: str) -> PreTrainedModel:
    model = make_model(model_type, attention="eager" if model_type == "gpt_oss" else "sdpa")
    return steady(model)


def steady(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with linear layers that find their inputs at the same alignment each time: how
    products of small matrices are rounded depends on it, and two caches that were never saved would
    differ."""

    def realigned(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])

    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(realigned)
    return model


def saving_model(model_type: str, **overrides: Any) -> OffloadedKV:
    """A wrapper over one model for each type, whose steps attend exactly."""
    return OffloadedKV(_steady_model(model_type), TINY, **{"mode": "exact"} | FEW | overrides)


def prefilled(model: OffloadedKV, lengths: tuple[int, ...] = LENGTHS) -> tuple[Any, Tensor]:
    """A cache of prompts of these lengths, and their attention mask. The same each time."""
    ids, mask = left_padded(*lengths)
    cache = model.new_cache()
    model.prefill(ids, cache, mask)
    return cache, mask


def longer(mask: Tensor, count: int) -> Tensor:
    """The mask of `count` more tokens."""
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def step_logits(
    model: OffloadedKV, cache: OffloadedCache, mask: Tensor, count: int = NUM_STEPS, seed: int = 77
) -> tuple[Tensor, Tensor]:
    """Logits [B, count, V] of `count` given tokens, each a decode step, and the mask with them."""
    ids, logits = prompt(count, seed=seed, batch=len(mask)), []
    for position in range(count):
        mask = longer(mask, 1)
        token = ids[:, position : position + 1]
        logits.append(model(input_ids=token, past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(logits, 1), mask


def turn_logits(
    model: OffloadedKV, cache: OffloadedCache, mask: Tensor, count: int = 40, seed: int = 78
) -> tuple[Tensor, Tensor]:
    """The same of a turn of `count` tokens in one forward: logits [B, V] of the last."""
    mask = longer(mask, count)
    ids = prompt(count, seed=seed, batch=len(mask))
    return model.prefill(ids, cache, mask), mask


def same_answers(
    model: OffloadedKV, one: OffloadedCache, other: OffloadedCache, mask: Tensor
) -> Tensor:
    """Two caches that attend exactly hold the same, and answer the same to steps, a turn that pages
    out and steps again, all bit for bit; and so they do when pages are retrieved, up to rounding
    (whether a loop of a kernel runs in vectors depends on how its memory lies). Returns the mask
    that both have then."""
    assert one.config.mode == other.config.mode == "exact"
    same_contents(one, other)
    retrieving = [x.fork(mode="retrieval", **FEW) for x in (one, other)]
    mine, theirs = (step_logits(model, fork, mask, count=3)[0] for fork in retrieving)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    found = []
    for each in one, other:
        first, after = step_logits(model, each, mask)
        turn, after = turn_logits(model, each, after)
        last, after = step_logits(model, each, after, count=3, seed=79)
        found.append((first, turn, last))
    for mine, theirs in zip(*found, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, theirs)
    assert one.get_seq_length() == other.get_seq_length() == after.shape[1]
    same_contents(one, other)
    return after


def same_contents(one: OffloadedCache, other: OffloadedCache) -> None:
    """Two caches hold the same, bit for bit, wherever they hold it."""
    same_states(one, other)
    for mine, theirs in zip(one.offloaded_layers, other.offloaded_layers, strict=True):
        stored, found = store_layer(mine.context), store_layer(theirs.context)
        assert stored.numbers == found.numbers
        for group, others in zip(stored[1:], found[1:], strict=True):
            assert group.keys() == others.keys()
            for name in group.keys() - {"row"}:
                assert torch.equal(group[name], others[name]), name
        pages = (
            x.paged.arena.gather(x.paged.page_ids.view.flatten())
            for x in (mine.context, theirs.context)
        )
        assert torch.equal(*pages)
    padding = [x.offloaded_layers[0].padding for x in (one, other)]
    assert padding[0].is_empty == padding[1].is_empty
    assert padding[0].is_empty or torch.equal(padding[0].valid, padding[1].valid)
    for each in one, other:
        for arena in each.runtime.arenas.values():
            arena.check_integrity()


def same_states(one: OffloadedCache, other: OffloadedCache) -> None:
    """The layers that are not offloaded hold the same, bit for bit."""
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        if isinstance(mine, OffloadedLayer):
            continue
        assert type(mine) is type(theirs)
        assert vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            found = vars(theirs)[name]
            values = value if isinstance(value, dict) else {0: value}
            others = found if isinstance(found, dict) else {0: found}
            assert values.keys() == others.keys()
            for key, part in values.items():
                assert type(others[key]) is type(part)
                equal = torch.equal if isinstance(part, Tensor) else operator.eq
                assert equal(part, others[key]), name


def digests(path: Path) -> dict[str, str]:
    """Of each file below `path`, by name."""
    files = (Path(root) / name for root, _, names in os.walk(path) for name in names)
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }


def page_files(path: Path) -> list[str]:
    return [name for name in digests(path) if name.startswith("pages/") and "/c/" in name]


def manifest_of(path: Path) -> Manifest:
    return Manifest.parse((path / NAME).read_bytes(), str(path))


def describe_anew(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the description of a saved context, with a checksum that is right."""
    manifest = manifest_of(path)
    change(manifest.description)
    (path / NAME).write_bytes(manifest.to_bytes())


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Change a file of a saved context, with a manifest that says so."""
    (path / name).write_bytes(data)
    manifest = manifest_of(path)
    manifest.files[name] = FileEntry(len(data), zlib.crc32(data))
    (path / NAME).write_bytes(manifest.to_bytes())


def places(part: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value is in a description: the keys and numbers that lead there."""
    if where:
        yield where
    if isinstance(part, (dict, list)):
        for key in part if isinstance(part, dict) else range(len(part)):
            yield from places(part[key], (*where, key))


def checked_bytes(cache: OffloadedCache) -> int:
    """Bytes of pages that a loaded cache has read from its files."""
    arenas = cache.runtime.arenas.values()
    return sum(arena.moved.host for arena in arenas if isinstance(arena, MappedArena))
