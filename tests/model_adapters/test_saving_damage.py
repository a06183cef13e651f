"""What was saved and is damaged answers right or not at all. `pytest -s` prints how many cases
there were."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from saved_caches import manifest_of, page_files
from saver import answers, which_of
from torch import Tensor
from two_contexts import Two

from wavekv import OffloadedCache, SavedContext
from wavekv.errors import ContextFormatError
from wavekv.saved.manifest import NAME

FLIPS = 360


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two"))


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
