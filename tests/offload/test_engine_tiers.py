"""Steps of an engine whose pages do not all fit host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Steps, eager_step, engine_step, started
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.errors import ConfigError, ContextFormatError
from wavekv.kernels import step_reference
from wavekv.kvstore import TieredArena
from wavekv.offload import LayerContext, OffloadRuntime
from wavekv.offload.engine import DecodeEngine

PAGE = 2 * 4 * 8 * 4
"""Bytes of a page of the small settings."""


def tiers(folder: Path, pages: int) -> dict[str, Any]:
    return {"disk": str(folder), "disk_budget": 1 << 22, "cpu_budget": pages * PAGE}


def arena_of(contexts: list[LayerContext]) -> TieredArena:
    arena = contexts[0].paged.arena
    assert isinstance(arena, TieredArena)
    return arena


@pytest.mark.parametrize("prefetch", ["none", "runners-up", "early"])
def test_steps_are_those_of_a_cache_in_memory(tmp_path: Path, prefetch: str) -> None:
    """Growth included: 60 tokens make pages while steps run."""
    outs: list[list[Tensor]] = []
    for where in ({}, tiers(tmp_path, 280)):
        steps = Steps(3)
        contexts, _ = started(steps, 500, budget=0.1, prefetch=prefetch, **where)
        engine = DecodeEngine(contexts, step_reference)
        outs.append([out for _ in range(60) for out in engine_step(engine, steps.token())])
        engine.give_back()
    arena = arena_of(contexts)
    assert len(contexts[0].paged.segments) > 8
    assert arena.num_on_host <= 280 < arena.num_pages
    assert arena.disk.bytes_read > 0
    counters = contexts[0].counters
    assert 0 < counters.host_missing < counters.host_wanted
    assert counters.num_late == 0
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)
    arena.check_integrity()


def test_given_back_contexts_go_on_eagerly(tmp_path: Path) -> None:
    outs: list[list[Tensor]] = []
    for where in ({}, tiers(tmp_path, 280)):
        steps = Steps(4)
        contexts, _ = started(steps, 500, budget=0.2, **where)
        engine = DecodeEngine(contexts, step_reference)
        outs.append([out for _ in range(30) for out in engine_step(engine, steps.token())])
        engine.give_back()
        outs[-1] += [out for _ in range(30) for out in eager_step(contexts, steps.token())]
    for one, other in zip(*outs, strict=True):
        # products round by where their memory begins
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    arena_of(contexts).check_integrity()


def test_pages_that_come_too_late_are_estimated_and_counted(tmp_path: Path) -> None:
    steps = Steps(5)
    contexts, copies = started(steps, 500, budget=0.2, disk_deadline=0.0, **tiers(tmp_path, 280))
    arena = arena_of(contexts)
    slow = arena.disk.read
    waits = iter([0.05] * 3)

    def read(*arguments: Any) -> None:
        import time

        time.sleep(next(waits, 0.0))
        slow(*arguments)

    arena.disk.read = read  # type: ignore[method-assign]
    engine = DecodeEngine(contexts, step_reference)
    token = steps.token()
    ours = engine_step(engine, token)
    assert all(bool(out.isfinite().all()) for out in ours)
    late = int(engine.layers[0].totals.paging[..., 2].sum())
    assert late > 0
    arena._arrivals.finish()
    engine_step(engine, token)
    # the same choice, which is there by now
    assert int(engine.layers[0].totals.paging[..., 2].sum()) - late < late // 2
    engine.give_back()
    assert contexts[0].counters.num_late >= late
    del copies


def test_a_damaged_page_ends_the_step_with_its_name(tmp_path: Path) -> None:
    steps = Steps(6)
    contexts, _ = started(steps, 500, budget=0.3, **tiers(tmp_path, 280))
    arena = arena_of(contexts)
    arena.disk._crc32 ^= 1
    engine = DecodeEngine(contexts, step_reference)
    with pytest.raises(ContextFormatError, match=r"page \d+ of .*crc32"):
        engine_step(engine, steps.token())
    arena.disk._crc32 ^= 1
    engine.give_back()
    eager_step(contexts, steps.token())


def test_a_disk_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected disk to be a folder, got .*missing"):
        OffloadRuntime(OffloadConfig(disk=tmp_path / "missing"))
