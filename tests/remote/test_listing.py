"""Lists of contexts, and what one says of itself."""

import pytest
from context_files import SIZES, make_context

from wavekv.errors import ContextFormatError
from wavekv.remote.address import store_at
from wavekv.remote.listing import contexts as listed
from wavekv.remote.listing import info
from wavekv.remote.push import push
from wavekv.saved.manifest import NAME


def test_contexts_one_level_below(base, contexts) -> None:
    push(contexts(1), f"{base}/b")
    push(contexts(2), f"{base}/a")
    push(contexts(2), f"{base}/deeper/c")
    store_at(f"{base}/damaged").write(NAME, [b"{}"])
    store_at(f"{base}/other").write("file", [b"x"])
    first, second, damaged = listed(base)
    assert first.to_dict() == {
        "name": "a",
        "problem": None,
        "format_version": 1,
        "num_tokens": 102,
        "files": len(SIZES),
        "nbytes": sum(SIZES.values()),
    }
    assert second.to_dict() == {**first.to_dict(), "name": "b", "num_tokens": 101}
    assert (damaged.name, damaged.manifest) == ("damaged", None)
    assert "of a saved context" in damaged.to_dict()["problem"]


def test_nothing_is_listed_where_nothing_is(base) -> None:
    assert listed(f"{base}/nowhere") == []


def test_what_is_being_gathered_is_not_listed(tmp_path) -> None:
    make_context(tmp_path / ".one.pull", 1)
    assert listed(str(tmp_path)) == []


def test_info_of_a_context(base, contexts) -> None:
    push(contexts(1), f"{base}/one")
    found = info(f"{base}/one")
    assert found["description"] == {"num_tokens": 101, "model": "tiny"}
    assert (found["context"], found["nbytes"]) == (f"{base}/one", sum(SIZES.values()))
    with pytest.raises(ContextFormatError, match=f"got no {NAME} there"):
        info(base)
