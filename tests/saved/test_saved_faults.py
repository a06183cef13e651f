"""A writer that fails or is killed leaves what was there, and the next one clears up after it."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saved_cases import Content, example, expect_same, left_beside, read_all

from wavekv.errors import CapacityError, ContextFormatError
from wavekv.saved import output
from wavekv.saved.reader import ContextReader
from wavekv.saved.writer import ContextWriter

HERE = Path(__file__).parent

REPEAT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from saved_cases import example
contents = [example(seed) for seed in range(2)]
print("ready", flush=True)
while True:
    for content in contents:
        content.save(Path(sys.argv[2]))
"""


class OwnError(Exception):
    """Of the caller."""


def repeated_saves(path: Path) -> subprocess.Popen[str]:
    """A process that saves one context after another to a path."""
    command = [sys.executable, "-c", REPEAT, str(HERE), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_context(tmp_path: Path) -> None:
    path, rng, num_left = tmp_path / "context", random.Random(0), 0
    example().save(path)
    for _ in range(8):
        with repeated_saves(path) as process:
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
        num_left += bool(left_beside(path))
        with ContextReader.open(path) as reader:
            assert reader.verify() == []
            seed = int(reader.array("seed"))
        expect_same(read_all(path), example(seed))
    assert num_left > 0, "no process was killed while it wrote"
    example().save(path)
    assert left_beside(path) == []


@pytest.mark.slow
def test_a_reader_beside_a_writer_sees_one_whole_context(tmp_path: Path) -> None:
    path, seen = tmp_path / "context", set()
    example().save(path)
    with repeated_saves(path) as process:
        deadline = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < deadline:
            try:
                found = read_all(path)
            except ContextFormatError:
                continue  # its files were removed while it was read
            seed = int(found.arrays["seed"])
            seen.add(seed)
            expect_same(found, example(seed))
        process.kill()
    assert seen == {0, 1}


@pytest.mark.parametrize("when", ["at once", "after content", "while pages are read"])
def test_an_error_of_the_caller_leaves_what_was_there(tmp_path: Path, when: str) -> None:
    path = tmp_path / "context"
    example(0).save(path)

    def read(first: int, last: int) -> torch.Tensor:
        if first:
            raise OwnError
        return torch.zeros(last, 1 << 20, dtype=torch.uint8)

    def save() -> None:
        with ContextWriter(path) as writer:
            if when == "while pages are read":
                writer.pages("p", 6, (1 << 20,), torch.uint8, read)
            if when == "after content":
                example(1).write(writer)
            raise OwnError

    with pytest.raises(OwnError):
        save()
    expect_same(read_all(path), example(0))
    assert left_beside(path) == []


def test_no_commit_no_context(tmp_path: Path) -> None:
    with ContextWriter(tmp_path / "context") as writer:
        example().write(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "ftruncate", "fsync"])
@pytest.mark.parametrize("seed", range(3))
def test_a_disk_that_fails(tmp_path: Path, monkeypatch, code: int, call: str, seed: int) -> None:
    """At any of its calls."""
    path, original, left = (
        tmp_path / "context",
        getattr(os, call),
        [random.Random(seed).randrange(40)],
    )
    example(0).save(path)

    def fail_later(*arguments: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_later)
        expected = OSError if code == errno.EIO else CapacityError
        with pytest.raises(expected) as raised:
            example(1).save(path)
    if code != errno.EIO:
        assert "MiB free for" in str(raised.value)
        assert isinstance(raised.value.__cause__, OSError)
    expect_same(read_all(path), example(0))
    assert left_beside(path) == []


def test_writes_may_be_short(tmp_path: Path, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: max(1, len(data) // 2)]))
    example().save(tmp_path / "context")
    expect_same(read_all(tmp_path / "context"), example())


def test_pages_that_cannot_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (
        pytest.raises(CapacityError, match=r"expected \d+ MiB free for .*/p, got \d+ MiB"),
        ContextWriter(tmp_path / "context") as writer,
    ):
        writer.pages("p", 1 << 40, (4096,), torch.uint8, lambda first, last: pytest.fail("read"))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_save_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make it first"):
        Content().save(tmp_path / "nothing" / "context")


@pytest.mark.parametrize("is_there", [False, True])
def test_all_is_on_disk_before_the_manifest_and_the_manifest_before_its_place(
    tmp_path: Path, monkeypatch, is_there: bool
) -> None:
    """By the order of calls: every file and folder is synced, the manifest is created after, and
    the folder of the context is synced last of all."""
    calls: list[tuple[str, str]] = []
    if is_there:
        example().save(tmp_path / "context")
    opened, synced = os.open, os.fsync

    def log_open(path, flags: int, *arguments, **options) -> int:
        if flags & os.O_CREAT:
            calls.append(("create", Path(path).name))
        return opened(path, flags, *arguments, **options)

    def log_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        synced(descriptor)

    monkeypatch.setattr(os, "open", log_open)
    monkeypatch.setattr(os, "fsync", log_sync)
    manifest = example().save(tmp_path / "context")
    at = calls.index(("create", "manifest.json"))
    before = {Path(name) for kind, name in calls[:at] if kind == "sync"}
    after = [Path(name) for kind, name in calls[at:] if kind == "sync"]
    (root,) = {path for path in before if path.parent == tmp_path}
    files = {root / name for name in manifest.files}
    folders = {parent for file in files for parent in file.parents if parent.is_relative_to(root)}
    assert before == files | folders
    assert {root / "manifest.json", root} <= set(after)
    assert after[-1] == tmp_path
    assert calls[-1][0] == "sync"


SMALL_DISK = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
disk = Path(sys.argv[2])
mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
if subprocess.run(mount, capture_output=True).returncode:
    sys.exit(77)
import torch
from saved_cases import Content, example, expect_same, read_all
from wavekv.errors import CapacityError
example().save(disk / "context")
for content in (
    Content({"a": torch.zeros(5 << 20)}),
    Content({}, {"t": {"c": torch.zeros(5 << 20)}}),
    Content({}, {}, {"p": torch.zeros(5 << 20, 4, dtype=torch.uint8)}),
):
    try:
        content.save(disk / "context")
        sys.exit("no error")
    except CapacityError as error:
        assert "MiB free for" in str(error), error
    expect_same(read_all(disk / "context"), example())
    assert [entry.name for entry in disk.iterdir()] == ["context"]
example(1).save(disk / "context")
expect_same(read_all(disk / "context"), example(1))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    try:
        command = ["unshare", "-m", sys.executable, "-c", SMALL_DISK, str(HERE), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a file system may not be mounted here")
    assert done.returncode == 0, done.stderr


def test_memory_of_pages_is_bounded(tmp_path: Path, monkeypatch) -> None:
    """While the disk is slow: no more than two files wait when the next pages are read."""
    sync, waiting, most = output._write_and_sync, [], 0

    def slow(*arguments) -> None:
        time.sleep(0.02)
        sync(*arguments)
        waiting.pop()

    monkeypatch.setattr(output, "_write_and_sync", slow)

    def read(first: int, last: int) -> torch.Tensor:
        nonlocal most
        most = max(most, len(waiting))
        waiting.append(first)
        return pages[first:last]

    pages = torch.zeros(20, 1 << 20, dtype=torch.uint8)
    with ContextWriter(tmp_path / "context") as writer:
        writer.pages("p", 20, (1 << 20,), torch.uint8, read)
        writer.commit({})
    assert most == 2
    expect_same(read_all(tmp_path / "context"), Content(pages={"p": pages}))
