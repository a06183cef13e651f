"""Whatever happens to a save, or to what was saved: a path holds one context whole, and a cache
answers right or not at all. `pytest -s` prints how many cases there were."""

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
import torch
from saved_caches import digests, manifest_of, page_files
from saver import answers, small_model, two_caches, which_of
from torch import Tensor

from wavekv import OffloadedCache, SavedContext
from wavekv.errors import CapacityError, ContextFormatError, LockedError
from wavekv.saved import output
from wavekv.saved.manifest import NAME

KILLS = 200
FLIPS = 360


class Two:
    """Two caches of one shape, what each answers, and a saved context of each."""

    def __init__(self, folder: Path) -> None:
        self.model = small_model()
        self.caches = two_caches(self.model)
        self.expected = [
            answers(self.model, cache.fork(), which) for which, cache in enumerate(self.caches)
        ]
        assert not torch.equal(*self.expected)
        self.paths = [folder / "a", folder / "b"]
        for cache, path in zip(self.caches, self.paths, strict=True):
            cache.save(path)
        self.digests = [digests(path) for path in self.paths]

    def which(self, path: Path) -> int:
        """Which of the two is saved at a path, whole: bytes, checksums and answers."""
        which = self.digests.index(digests(path))
        assert SavedContext.open(path).verify() == []
        assert which_of(self.model, OffloadedCache.load(path, self.model), self.expected) == which
        return which


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


class Damage:
    """A copy of the first of two contexts, to be damaged and put right again."""

    def __init__(self, two: Two, folder: Path) -> None:
        self.two, self.path = two, folder / "damaged"
        shutil.copytree(two.paths[0], self.path)
        self.files = sorted(two.digests[0])
        every = [
            name.removesuffix("zarr.json") for name in self.files if name.endswith("zarr.json")
        ]
        self.groups = {
            f"{x}zarr.json" for x in every if any(y.startswith(x) and y != x for y in every)
        }
        self.noticed: Counter[str] = Counter()

    def check(self, name: str) -> None:
        """Loading, the first use or `verify` names the file; whatever answers answers right."""
        self.noticed[self._noticed(name)] += 1
        if os.path.lexists(self.path / name):
            os.unlink(self.path / name)
        shutil.copyfile(self.two.paths[0] / name, self.path / name)

    def _noticed(self, name: str) -> str:
        place = str(self.path / name)
        error = self._error_of_loading()
        if isinstance(error, ContextFormatError):
            assert place in str(error)
            return "when it is loaded"
        try:
            found: Tensor | None = answers(self.two.model, self.loaded.fork(), 0)
        except ContextFormatError as used:
            found, error = None, used
        problems = SavedContext.open(self.path).verify()
        assert any(place in problem for problem in problems)
        with pytest.raises(ContextFormatError) as caught:
            OffloadedCache.load(self.path, self.two.model, verify=True)
        assert place in str(caught.value)
        if found is None:
            assert place in str(error)
            return "when it is used"
        # nobody's: what pads the last file of pages, and what other programs know groups by
        assert torch.equal(found, self.two.expected[0])
        assert name.startswith("pages/") or name in self.groups
        return "by verify alone"

    def _error_of_loading(self) -> Exception | None:
        try:
            self.loaded = OffloadedCache.load(self.path, self.two.model)
        except ContextFormatError as error:
            return error
        return None

    def report(self, what: str, count: int) -> None:
        print(f"\n{count} files {what}: noticed {dict(self.noticed)}")
        assert self.noticed.total() == count
        assert self.two.which(self.path) == 0


@pytest.mark.slow
def test_bits_that_are_flipped(two: Two, tmp_path: Path) -> None:
    damage, chance = Damage(two, tmp_path), random.Random(2)
    names = [name for name in damage.files for _ in range(4)]
    names += chance.choices(damage.files, k=FLIPS - 100 - len(names))
    (pages,) = page_files(damage.path)
    names += [pages] * 100
    (arena,) = manifest_of(damage.path).description["arenas"]
    used = (
        arena["num_pages"] * two.caches[0].offloaded_layers[0].context.paged.arena.layout.page_bytes
    )
    for name in names:
        data = bytearray((damage.path / name).read_bytes())
        # most of the flips in pages in what is not padding
        is_used = name == pages and chance.random() < 0.9
        bit = chance.randrange(8 * (used if is_used else len(data)))
        data[bit // 8] ^= 1 << bit % 8
        (damage.path / name).write_bytes(data)
        damage.check(name)
    damage.report("with a flipped bit", len(names))
    assert len(names) == FLIPS
    assert min(damage.noticed[how] for how in ("when it is loaded", "when it is used")) > 0


@pytest.mark.slow
def test_files_that_are_cut_or_missing(two: Two, tmp_path: Path) -> None:
    damage, count = Damage(two, tmp_path), 0
    for name in damage.files:
        data = (damage.path / name).read_bytes()
        # without its last line end a manifest says what it said
        for part in (b"", data[:-2], data[: len(data) // 2], data + b"\0", None):
            if name == NAME and part is None:
                continue
            if part is None:
                os.unlink(damage.path / name)
            else:
                (damage.path / name).write_bytes(part)
            damage.check(name)
            count += 1
    damage.report("cut short, too long or missing", count)
    assert set(damage.noticed) == {"when it is loaded"}
    os.unlink(damage.path / NAME)
    with pytest.raises(ContextFormatError, match=NAME):
        OffloadedCache.load(damage.path, two.model)


@pytest.mark.slow
def test_files_of_another_context(two: Two, tmp_path: Path) -> None:
    damage, count = Damage(two, tmp_path), 0
    for name in damage.files:
        if two.digests[0][name] == two.digests[1][name] or name == NAME:
            continue
        shutil.copyfile(two.paths[1] / name, damage.path / name)
        damage.check(name)
        count += 1
    damage.report("of another context", count)
    assert count > 15
    # the manifest of another context is of none of the other files
    shutil.copyfile(two.paths[1] / NAME, damage.path / NAME)
    with pytest.raises(ContextFormatError):
        OffloadedCache.load(damage.path, two.model)


def test_files_that_do_not_belong_there(two: Two, tmp_path: Path) -> None:
    damage = Damage(two, tmp_path)
    (damage.path / "layers/more").write_text("x")
    (damage.path / "folder").mkdir()
    (damage.path / "link").symlink_to("/etc")
    assert set(manifest_of(damage.path).files) == set(damage.files) - {NAME}
    problems = SavedContext.open(damage.path).verify()
    assert len(problems) == 3
    for name in "layers/more", "folder", "link":
        assert any(name in problem for problem in problems)
    with pytest.raises(ContextFormatError, match="only files of the manifest"):
        OffloadedCache.load(damage.path, two.model, verify=True)
    loaded = OffloadedCache.load(damage.path, two.model)
    assert which_of(two.model, loaded, two.expected) == 0


def test_a_file_that_is_a_link(two: Two, tmp_path: Path) -> None:
    damage = Damage(two, tmp_path)
    for name in [name for name in damage.files if name != NAME][::5]:
        os.unlink(damage.path / name)
        (damage.path / name).symlink_to(two.paths[0] / name)
        with pytest.raises(ContextFormatError) as caught:
            OffloadedCache.load(damage.path, two.model)
        assert str(damage.path / name) in str(caught.value)
        os.unlink(damage.path / name)
        shutil.copyfile(two.paths[0] / name, damage.path / name)
    assert two.which(damage.path) == 0


def test_a_damaged_page_leaves_a_cache_as_it_was(two: Two, tmp_path: Path) -> None:
    damage = Damage(two, tmp_path)
    (name,) = [name for name in damage.files if name.startswith("pages/0/c/")]
    data = bytearray((damage.path / name).read_bytes())
    data[5] ^= 64
    (damage.path / name).write_bytes(data)
    loaded: OffloadedCache = OffloadedCache.load(damage.path, two.model)
    for _ in range(2):
        # a step, a crop into the pages, and a save: each names the page, and changes nothing
        for use in (
            lambda: answers(two.model, loaded, 0),
            lambda: loaded.crop(-120),
            lambda: loaded.save(tmp_path / "again"),
        ):
            with pytest.raises(ContextFormatError, match="page 0 of"):
                use()
        assert loaded.get_seq_length() == 131
    assert not os.path.exists(tmp_path / "again")
    # what needs no such page goes on
    loaded.crop(-3)
    assert loaded.get_seq_length() == 128
