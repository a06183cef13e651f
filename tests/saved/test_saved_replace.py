"""A path names one whole context or another, whatever the file system can do and whenever it
stops."""

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from saved_cases import Content, example, expect_same, left_beside, read_all

from wavekv.errors import ContextFormatError
from wavekv.saved import opening, replace
from wavekv.saved.folder import Folder
from wavekv.saved.lock import locked
from wavekv.saved.reader import ContextReader
from wavekv.saved.replace import old_path, recover, swap, temporary_path
from wavekv.saved.writer import ContextWriter


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def no_exchange(monkeypatch) -> None:
    """A file system that cannot exchange names."""
    monkeypatch.setattr(replace, "_exchange", lambda first, second: False)


def directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def crash_after(monkeypatch, count: int) -> None:
    """The process ends after so many renames: whatever it does about it does not happen."""
    rename, done = os.rename, []

    def renamed(*arguments: Path) -> None:
        if len(done) == count:
            raise Crash
        done.append(rename(*arguments))

    monkeypatch.setattr(os, "rename", renamed)


def test_swap_to_a_new_path(tmp_path: Path) -> None:
    swap(directory(tmp_path / "new", "new"), tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"
    assert left_beside(tmp_path / "path") == []


def test_swap_for_another(tmp_path: Path) -> None:
    directory(tmp_path / "path", "old")
    swap(directory(tmp_path / "new", "new"), tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"
    assert left_beside(tmp_path / "path") == []


def test_an_exchange_has_no_moment_without_a_path(tmp_path: Path, monkeypatch) -> None:
    directory(tmp_path / "path", "old")
    crash_after(monkeypatch, 0)
    swap(directory(tmp_path / "new", "new"), tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_what_cannot_exchange_names_says_so(tmp_path: Path, monkeypatch, error) -> None:
    """File systems and kernels by an error, C libraries by having no such function."""

    class Library:
        def __init__(self, *arguments: object, **options: object) -> None:
            if error is not None:
                self.renameat2 = self._refuse

        def _refuse(self, *arguments: object) -> int:
            ctypes.set_errno(error)
            return -1

    directory(tmp_path / "path", "old")
    directory(tmp_path / "new", "new")
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", Library)
        swap(tmp_path / "new", tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"
    assert left_beside(tmp_path / "path") == []


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("is_left", [False, True])
def test_swap_without_an_exchange(tmp_path: Path, is_left: bool) -> None:
    directory(tmp_path / "path", "old")
    if is_left:
        directory(old_path(tmp_path / "path"), "older")
    swap(directory(tmp_path / "new", "new"), tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"
    assert left_beside(tmp_path / "path") == []


@pytest.mark.usefixtures("no_exchange")
def test_a_swap_that_fails_changes_nothing(tmp_path: Path) -> None:
    directory(tmp_path / "path", "old")
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "nothing", tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "old"
    assert left_beside(tmp_path / "path") == []


def test_an_exchange_that_fails_changes_nothing(tmp_path: Path) -> None:
    directory(tmp_path / "path", "old")
    with pytest.raises(FileNotFoundError, match="nothing"):
        swap(tmp_path / "nothing", tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "old"


def open_as_reader(path: Path) -> None:
    ContextReader.open(path).close()


def open_as_writer(path: Path) -> None:
    with ContextWriter(path):
        pass


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("renames", range(4))
@pytest.mark.parametrize("opens", [open_as_reader, open_as_writer])
def test_a_crash_between_renames_is_recovered(
    tmp_path: Path, renames: int, opens: Callable[[Path], None]
) -> None:
    path, new = tmp_path / "context", tmp_path / ".context.0123456789abcdef0123456789abcdef.tmp"
    example(0).save(path)
    example(1).save(tmp_path / "other")
    (tmp_path / "other").rename(new)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, renames)
        with suppress(Crash):
            swap(new, path)
    opens(path)
    assert path.exists()
    expect_same(read_all(path), example(int(renames >= 2)))
    open_as_writer(path)
    assert left_beside(path) == []


def test_a_reader_leaves_recovery_to_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "context"
    example().save(old_path(path))
    manifest = old_path(path) / "manifest.json"
    with locked(path), pytest.raises(FileNotFoundError):
        ContextReader.open(path)
    assert manifest.exists()
    expect_same(read_all(path), example())


def test_a_context_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch) -> None:
    """Between its directory and its manifest."""
    path, opened = tmp_path / "context", []
    example(0).save(path)

    class Late(Folder):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(path)
            if len(opened) == 1:
                example(1).save(path)

    monkeypatch.setattr(opening, "Folder", Late)
    expect_same(read_all(path), example(1))
    assert len(opened) == 2


def test_recover_leaves_a_path_that_is_there(tmp_path: Path) -> None:
    directory(tmp_path / "path", "new")
    directory(old_path(tmp_path / "path"), "old")
    recover(tmp_path / "path")
    assert (tmp_path / "path/file").read_text() == "new"


def test_only_left_overs_of_this_path_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "con.text"
    others = [
        temporary_path(tmp_path / "conXtext"),
        temporary_path(tmp_path / "con.text.b"),
        temporary_path(tmp_path / "b"),
        tmp_path / ".con.text.mine.tmp",
        tmp_path / ".con.text.old.b",
    ]
    for other in others:
        other.mkdir()
    Content().save(path)
    directory(temporary_path(path), "left")
    directory(old_path(path), "left")
    Content().save(path)
    assert left_beside(path) == sorted(other.name for other in others)


FOREIGN = {
    "an empty directory": lambda path: path.mkdir(),
    "a directory": lambda path: directory(path, "mine"),
    "a file": lambda path: path.write_text("mine"),
    "another format": lambda path: directory(path, "").joinpath("manifest.json").write_text("{}"),
    "no JSON": lambda path: directory(path, "").joinpath("manifest.json").write_text("mine"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_context_is_not_replaced(tmp_path: Path, make) -> None:
    path = tmp_path / "context"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ContextFormatError, match="a new path or a saved context, got a"):
        ContextWriter(path).__enter__()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_comes_meanwhile_is_not_replaced(tmp_path: Path, make) -> None:
    path = tmp_path / "context"
    with ContextWriter(path) as writer:
        make(path)
        with pytest.raises(ContextFormatError, match="a new path or a saved context, got a"):
            writer.commit({})
    assert path.exists()
    assert left_beside(path) == []


def test_a_damaged_context_may_be_replaced(tmp_path: Path) -> None:
    example().save(tmp_path / "context")
    (tmp_path / "context/zarr.json").unlink()
    example(1).save(tmp_path / "context")
    expect_same(read_all(tmp_path / "context"), example(1))
