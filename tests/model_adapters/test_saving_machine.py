"""Whatever is done to caches, saved and loaded in between: each holds and answers, bit for bit,
what its twin does that was never saved."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from saved_caches import FEW, digests, longer, same_contents, steady
from tiny_models import TINY, make_model, prompt
from torch import Tensor

from wavekv import OffloadedCache, OffloadedKV

PATHS = "first", "second"


@functools.cache
def inner() -> object:
    return steady(make_model("llama", "sdpa", num_hidden_layers=2))


class Twins:
    """A cache, one to which the same was done but that was never saved, and the mask of both."""

    def __init__(self, cache: OffloadedCache, twin: OffloadedCache, mask: Tensor) -> None:
        self.cache, self.twin, self.mask = cache, twin, mask

    def __iter__(self):
        return iter((self.cache, self.twin))


class SavingMachine(RuleBasedStateMachine):
    """Twins, and saved contexts at two paths."""

    twins = Bundle("twins")

    @initialize(
        target=twins,
        pads=st.lists(st.sampled_from([0, 0, 3, 17, 40]), min_size=1, max_size=3),
        host_dtype=st.sampled_from(["model", "int8"]),
        sinks=st.integers(0, 4),
    )
    def start(self, pads: list[int], host_dtype: str, sinks: int) -> Twins:
        self.folder = TemporaryDirectory()
        options = {"mode": "exact", "host_dtype": host_dtype, "num_sink_tokens": sinks}
        self.model = OffloadedKV(inner(), TINY, **options | FEW)
        self.saved: dict[str, tuple[OffloadedCache, Tensor, dict[str, str]]] = {}
        count = max(pads) + 24
        mask = torch.stack([(torch.arange(count) >= pad).long() for pad in pads])
        pair = Twins(self.model.new_cache(), self.model.new_cache(), mask[:, :0])
        self.alive = [pair]
        self.forward(pair, mask, seed=0)
        return pair

    @rule(pair=twins, count=st.integers(2, 90), seed=st.integers(0, 99))
    def turn(self, pair: Twins, count: int, seed: int) -> None:
        self.forward(pair, longer(pair.mask, count), seed)

    @rule(pair=twins, steps=st.integers(1, 12), seed=st.integers(0, 99))
    def decode(self, pair: Twins, steps: int, seed: int) -> None:
        for step in range(steps):
            self.forward(pair, longer(pair.mask, 1), seed + step)

    @rule(pair=twins, data=st.data())
    def crop(self, pair: Twins, data: st.DataObject) -> None:
        held = pair.mask.shape[1]
        # where a sequence is all padding nothing can be asked
        least = int(pair.mask.argmax(1).max()) + 1
        kept = data.draw(st.integers(least, held) | st.sampled_from([least, held - 1, held]))
        kept = max(least, kept)
        for cache in pair:
            cache.crop(kept - held)
        pair.mask = pair.mask[:, :kept]

    @rule(pair=twins, data=st.data())
    def select(self, pair: Twins, data: st.DataObject) -> None:
        rows = st.integers(0, len(pair.mask) - 1)
        index = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=3)))
        for cache in pair:
            cache.reorder_cache(index)
        pair.mask = pair.mask[index]

    @rule(target=twins, pair=twins)
    def fork(self, pair: Twins) -> object:
        return self.born(pair.cache.fork(), pair.twin.fork(), pair.mask)

    @rule(pair=twins, path=st.sampled_from(PATHS))
    def save(self, pair: Twins, path: str) -> None:
        pair.cache.save(self.place(path))
        self.saved[path] = pair.twin.fork(), pair.mask, digests(self.place(path))

    @precondition(lambda self: self.saved)
    @rule(target=twins, data=st.data(), verify=st.booleans())
    def load(self, data: st.DataObject, verify: bool) -> object:
        path = data.draw(st.sampled_from(sorted(self.saved)))
        twin, mask, _ = self.saved[path]
        loaded = OffloadedCache.load(self.place(path), self.model, verify=verify)
        return self.born(loaded, twin.fork(), mask)

    @precondition(lambda self: len(self.alive) > 1)
    @rule(pair=consumes(twins))
    def forget(self, pair: Twins) -> None:
        self.alive.remove(pair)
        del pair.cache, pair.twin

    def born(self, cache: OffloadedCache, twin: OffloadedCache, mask: Tensor) -> object:
        if len(self.alive) > 3:
            return multiple()
        pair = Twins(cache, twin, mask)
        self.alive.append(pair)
        return pair

    def forward(self, pair: Twins, mask: Tensor, seed: int) -> None:
        new = mask.shape[1] - pair.mask.shape[1]
        ids = prompt(new, seed=seed, batch=len(mask))
        answers = []
        for cache in pair:
            if new == 1:
                out = self.model(input_ids=ids, past_key_values=cache, attention_mask=mask)
                answers.append(out.logits[:, -1])
            else:
                answers.append(self.model.prefill(ids, cache, mask))
        assert answers[0].isfinite().all()
        assert torch.equal(*answers)
        pair.mask = mask

    def place(self, path: str) -> Path:
        return Path(self.folder.name) / path

    @invariant()
    def twins_hold_the_same(self) -> None:
        for pair in getattr(self, "alive", []):
            assert pair.cache.get_seq_length() == pair.mask.shape[1]
            same_contents(*pair)

    @invariant()
    def what_is_saved_stays(self) -> None:
        for path, (_, _, before) in getattr(self, "saved", {}).items():
            assert digests(self.place(path)) == before

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def test_a_saved_cache_is_the_one_that_never_was() -> None:
    run_state_machine_as_test(SavingMachine, settings=settings(stateful_step_count=14))
