"""A warm process that forks others for the tests of faults, each from the same two caches.

Commands on standard input, one a line, and what it answers on standard output:

- `save PATH FIRST CALL`: saves the two caches to a path in turn, FIRST (0 or 1) first, until it is
  killed, or kills itself at its CALL-th call of the system (0 for never). Answers its process id,
  then, once it is dead, `dead`.
- `read PATH COUNT STOP`: COUNT processes that load the context again and again until the file STOP
  is there. Answers `reading`, then a line for each: how often it read the first, the second, and
  how often it had to try again; then `done`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)

from saved_caches import steady, step_logits  # noqa: E402
from tiny_models import TINY, left_padded, make_model  # noqa: E402
from torch import Tensor  # noqa: E402

from wavekv import OffloadedCache, OffloadedKV  # noqa: E402
from wavekv.errors import ContextFormatError, LockedError  # noqa: E402
from wavekv.saved import replace  # noqa: E402

LENGTHS = (131, 97), (113, 131)
"""Of the sequences of the two caches, which have one shape."""
CALLS = "open", "write", "ftruncate", "fsync", "mkdir", "rename", "unlink", "rmdir"


def small_model() -> OffloadedKV:
    return OffloadedKV(steady(make_model("llama", "sdpa", num_hidden_layers=2)), TINY, mode="exact")


def two_caches(model: OffloadedKV) -> list[OffloadedCache]:
    caches = []
    for lengths in LENGTHS:
        ids, mask = left_padded(*lengths)
        caches.append(model.new_cache())
        model.prefill(ids, caches[-1], mask)
        caches[-1].settle()
    return caches


def masks() -> list[Tensor]:
    return [left_padded(*lengths)[1] for lengths in LENGTHS]


def answers(model: OffloadedKV, cache: OffloadedCache, which: int) -> Tensor:
    """Of two steps, if this is that one of the two caches."""
    return step_logits(model, cache, masks()[which], count=2)[0]


def which_of(model: OffloadedKV, loaded: OffloadedCache, expected: list[Tensor]) -> int:
    """0 or 1: which of the two caches this is. Any other is an error."""
    valid = loaded.offloaded_layers[0].padding.valid
    which = int(bool(valid[0].all()) is False)
    assert torch.equal(answers(model, loaded, which), expected[which])
    return which


def save_until_killed(caches: list[OffloadedCache], path: str, first: int, call: int) -> None:
    if call:
        counter = itertools.count(1)

        def counted(function):
            def wrapped(*args, **options):
                if next(counter) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        replace._exchange = counted(replace._exchange)
    for number in itertools.count(first):
        # another process may be writing just now
        with suppress(LockedError):
            caches[number % 2].save(path)


def read_until(model: OffloadedKV, path: str, stop: str, expected: list[Tensor]) -> str:
    found, retries = [0, 0], 0
    while not os.path.exists(stop) or not sum(found):
        for attempt in range(50):
            try:
                loaded = OffloadedCache.load(path, model)
            except (FileNotFoundError, ContextFormatError):
                retries += 1
                assert attempt < 49
            else:
                break
        found[which_of(model, loaded, expected)] += 1
    return f"{found[0]} {found[1]} {retries}"


def read_in_processes(
    model: OffloadedKV, path: str, count: int, stop: str, expected: list[Tensor]
) -> None:
    ends = []
    for _ in range(count):
        reading, writing = os.pipe()
        if os.fork() == 0:
            line = "failed"
            try:
                line = read_until(model, path, stop, expected)
            finally:
                os.write(writing, f"{line}\n".encode())
                os._exit(0)
        os.close(writing)
        ends.append(reading)
    print("reading", flush=True)
    for reading in ends:
        with os.fdopen(reading) as file:
            print(file.read().strip(), flush=True)
        os.wait()
    print("done", flush=True)


def main() -> None:
    model = small_model()
    caches = two_caches(model)
    expected = [answers(model, cache.fork(), which) for which, cache in enumerate(caches)]
    print("ready", flush=True)
    for line in sys.stdin:
        command, path, number, last = line.split()
        if command == "read":
            read_in_processes(model, path, int(number), last, expected)
            continue
        child = os.fork()
        if child == 0:
            save_until_killed(caches, path, int(number), int(last))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
