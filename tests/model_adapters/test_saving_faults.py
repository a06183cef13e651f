"""Whatever happens to a save, a path holds one context whole. `pytest -s` prints how many cases
there were."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from saved_caches import digests
from two_contexts import Two

from wavekv.errors import CapacityError, LockedError
from wavekv.saved import output

KILLS = 200


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two"))


class Saver:
    """The program `saver.py`."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("saver.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # OpenMP does not survive a fork
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "1"},
        )
        assert self.answer() == "ready"

    def tell(self, *command: object) -> None:
        self.process.stdin.write(" ".join(map(str, command)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    saver = Saver()
    yield saver
    saver.close()


@pytest.mark.slow
def test_kills_at_any_time(two: Two, saver: Saver, tmp_path: Path) -> None:
    path, chance = tmp_path / "saved", random.Random(1)
    two.caches[0].save(path)
    start = time.perf_counter()
    for _ in range(4):
        two.caches[0].save(path)
    usual = (time.perf_counter() - start) / 4
    held: list[int] = []
    left: Counter[str] = Counter()
    for number in range(KILLS):
        # by the clock, or at a call of the system, over two or three saves
        call = 0 if number % 2 else 1 + (number // 2) * 8
        saver.tell("save", path, number // 2 % 2, call)
        child = int(saver.answer())
        if not call:
            time.sleep(chance.uniform(0, 4 * usual))
            os.kill(child, signal.SIGKILL)
        assert saver.answer() == "dead"
        left.update(name.rpartition(".")[2] for name in os.listdir(tmp_path) if name != "saved")
        # the same bytes as a context that is known to be sound; some of them are also asked
        held.append(two.digests.index(digests(path)))
        if number % 5 == 0:
            assert two.which(path) == held[-1]
        if number % 20 == 19:
            # the next save finds nothing in its way, and removes what was left
            two.caches[number // 20 % 2].save(path)
            assert two.which(path) == number // 20 % 2
            assert os.listdir(tmp_path) == ["saved"]
    changes = sum(a != b for a, b in itertools.pairwise(held))
    print(f"\n{len(held)} kills: {Counter(held)}, {changes} changes, left behind {dict(left)}")
    assert len(held) == KILLS
    # they came before, in the middle of and after replacements
    assert changes > 10
    assert left["tmp"] > 20
    assert left["lock"] > 20


@pytest.mark.slow
def test_readers_while_it_is_replaced(two: Two, saver: Saver, tmp_path: Path) -> None:
    path, stop = tmp_path / "saved", tmp_path / "stop"
    two.caches[0].save(path)
    saver.tell("read", path, 8, stop)
    assert saver.answer() == "reading"
    for number in range(20):
        two.caches[(number + 1) % 2].save(path)
        time.sleep(0.05)
    stop.touch()
    found = [[int(x) for x in saver.answer().split()] for _ in range(8)]
    assert saver.answer() == "done"
    first, second, retries = (sum(column) for column in zip(*found, strict=True))
    print(f"\n8 readers, 20 replacements: read {first} and {second} times, {retries} retries")
    assert all(one + other > 0 for one, other, _ in found)
    assert first > 0
    assert second > 0
    assert two.which(path) == 0


@pytest.mark.slow
def test_two_writers_in_processes(two: Two, saver: Saver, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    two.caches[0].save(path)
    saver.tell("save", path, 0, 0)
    child, outcomes = int(saver.answer()), Counter()
    for number in range(60):
        try:
            two.caches[number % 2].save(path)
            outcomes["saved"] += 1
        except LockedError as error:
            assert str(path) in str(error)  # noqa: PT017
            outcomes["locked"] += 1
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert saver.answer() == "dead"
    two.which(path)
    two.caches[1].save(path)
    assert two.which(path) == 1
    assert os.listdir(tmp_path) == ["saved"]
    print(f"\n60 saves beside another writer: {dict(outcomes)}")
    assert outcomes["locked"] > 0


def test_the_second_writer_is_refused_and_the_first_completes(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, is_writing, may_go_on = tmp_path / "saved", threading.Event(), threading.Event()
    write = output._write_and_sync

    def slow(*args: Any) -> None:
        is_writing.set()
        assert may_go_on.wait(60)
        write(*args)

    monkeypatch.setattr(output, "_write_and_sync", slow)
    first = threading.Thread(target=two.caches[0].save, args=(path,))
    first.start()
    assert is_writing.wait(60)
    with pytest.raises(LockedError, match=f"process {os.getpid()}"):
        two.caches[1].fork().save(path)
    may_go_on.set()
    first.join()
    assert two.which(path) == 0
    assert os.listdir(tmp_path) == ["saved"]


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={nbytes // 1024}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(two: Two, tmp_path: Path) -> None:
    with small_disk(tmp_path / "large", 64 << 20) as disk:
        two.caches[0].save(disk / "saved")
        found = os.statvfs(disk)
        needed = (found.f_blocks - found.f_bfree) * found.f_bsize
    refused = 0
    for number in range(12):
        # room for the first, and for a part of the second
        with small_disk(tmp_path / str(number), int(needed * (1.03 + number / 13))) as disk:
            two.caches[0].save(disk / "saved")
            before = digests(disk)
            with pytest.raises((CapacityError, OSError)) as caught:
                two.caches[1].save(disk / "saved")
            assert isinstance(caught.value, CapacityError) or caught.value.errno == errno.ENOSPC
            assert digests(disk) == before
            assert os.listdir(disk) == ["saved"]
            assert two.which(disk / "saved") == 0
            refused += 1
    print(f"\n{refused} saves to full disks")
    assert refused == 12


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write", "ftruncate", "fsync", "mkdir"])
def test_a_disk_that_becomes_full(
    two: Two, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "saved", getattr(os, call)
    two.caches[0].save(path)
    before, refused, replaced = digests(tmp_path), 0, 0
    for failing in range(1, 200):
        calls = 0

        def full(*args: Any, at: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            try:
                two.caches[1].save(path)
            except (CapacityError, OSError):
                refused += 1
            else:
                break
        assert os.listdir(tmp_path) == ["saved"]
        if digests(tmp_path) != before:
            # it has its place, but the disk did not say that this is written: whole all the same
            assert two.which(path) == 1
            replaced += 1
            two.caches[0].save(path)
    assert two.which(path) == 1
    assert replaced <= (call == "fsync")
    print(f"\n{refused} saves whose calls of {call} fail")
    assert refused >= 5
