"""An index after `close`, and one that is mapped from its file."""

import pytest

from wavekv.errors import ClosedError, InputError, ReadOnlyError
from wavekv.index import WaveIndex

from .index_cases import SMALL, make_data

KEYS, VALUES, QUERIES = make_data(0, 100)
PROPERTIES = [name for name, x in vars(WaveIndex).items() if isinstance(x, property)]


def test_a_closed_index_says_so_whatever_is_asked(tmp_path) -> None:
    with WaveIndex.build(KEYS, SMALL, values=VALUES) as index:
        assert len(index) == 100
    index.close()
    assert repr(index) == "WaveIndex(closed)"
    for use in (
        lambda: index.search(QUERIES, 1),
        lambda: index.attend(QUERIES),
        lambda: index.append(KEYS, VALUES),
        lambda: index.truncate(0),
        lambda: index.save(tmp_path / "index"),
        lambda: index.stats(),
        lambda: len(index),
        *(lambda name=name: getattr(index, name) for name in PROPERTIES),
    ):
        with pytest.raises(ClosedError, match=r"expected an open index, got one after close\(\)"):
            use()
    assert not list(tmp_path.iterdir())
    assert {"ntotal", "dim", "nbytes", "params", "device"} <= set(PROPERTIES)


def test_a_mapped_index_does_not_change(tmp_path) -> None:
    WaveIndex.build(KEYS, SMALL, values=VALUES).save(tmp_path / "index")
    mapped = WaveIndex.load(tmp_path / "index", mmap=True)
    for use in (lambda: mapped.append(KEYS, VALUES), lambda: mapped.truncate(3)):
        with pytest.raises(ReadOnlyError, match="expected an index in memory, got one that is map"):
            use()
    mapped.close()
    for use in (lambda: mapped.append(KEYS, VALUES), lambda: mapped.truncate(3)):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(InputError, match="lives on the CPU, got device='cuda'"):
        WaveIndex.load(tmp_path / "index", mmap=True, device="cuda")
