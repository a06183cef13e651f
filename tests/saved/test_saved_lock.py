"""One writer at a time."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from saved_cases import Content

from wavekv.errors import LockedError
from wavekv.saved.lock import lock_path, locked
from wavekv.saved.writer import ContextWriter

HOLD = """
import sys
from pathlib import Path
from wavekv.saved.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that has the lock until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    with ContextWriter(tmp_path / "c") as writer:
        with pytest.raises(LockedError, match=f"got process {os.getpid()}"):
            Content().save(tmp_path / "c")
        writer.commit({})
    Content().save(tmp_path / "c")
    assert not lock_path(tmp_path / "c").exists()


def test_a_writer_in_another_process(tmp_path: Path) -> None:
    with holder(tmp_path / "c") as process:
        with pytest.raises(LockedError, match=f"the only writer of .*, got process {process.pid}"):
            Content().save(tmp_path / "c")
        process.communicate("")
    Content().save(tmp_path / "c")


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    with holder(tmp_path / "c") as process:
        process.kill()
        process.communicate()
    assert lock_path(tmp_path / "c").exists()
    Content().save(tmp_path / "c")
    assert not lock_path(tmp_path / "c").exists()


def test_two_paths_do_not_share_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a"):
        raise KeyError
    with locked(tmp_path / "a"):
        pass


def test_a_lock_file_that_lost_its_name_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """The holder unlinks the file between the moment that another opens and that it locks it."""
    path, opened, original = tmp_path / "a", [], os.open

    def open_late(*arguments, **options) -> int:
        opened.append(original(*arguments, **options))
        if len(opened) == 1:
            lock_path(path).unlink()
        return opened[-1]

    monkeypatch.setattr(os, "open", open_late)
    with locked(path):
        assert len(opened) == 2
        assert os.path.samestat(os.fstat(opened[1]), lock_path(path).stat())


def test_a_link_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    lock_path(tmp_path / "a").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "a"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_never_two_at_once(tmp_path: Path) -> None:
    inside, most = 0, 0
    count = threading.Lock()

    def take() -> None:
        nonlocal inside, most
        taken = 0
        while taken < 25:
            try:
                with locked(tmp_path / "a"):
                    with count:
                        inside, taken = inside + 1, taken + 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with count:
                        inside -= 1
            except LockedError:
                time.sleep(0.0003)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not lock_path(tmp_path / "a").exists()
