"""The manifest: what was written is read, anything else is refused."""

import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import ContextFormatError
from wavekv.saved.manifest import FileEntry, Manifest, check_name

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PART = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
NAME = st.lists(PART, min_size=1, max_size=4).map("/".join).filter(lambda n: n != "manifest.json")
ENTRY = st.builds(FileEntry, st.integers(0, 2**50), st.integers(0, 2**32 - 1))

SMALL = Manifest(
    {"tokens": 3, "é": 1.5e300}, {"a/c/0": FileEntry(12, 0xAB), "a/b": FileEntry(0, 0)}
)


def signed(body: dict[str, Any], **changes: Any) -> bytes:
    """A manifest of any content with a checksum that is right."""
    body = {**body, **changes}
    body.pop("crc32", None)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "crc32": f"{zlib.crc32(text.encode()):08x}"}).encode()


def body_of(manifest: Manifest) -> dict[str, Any]:
    return json.loads(manifest.to_bytes())


@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(NAME, ENTRY, max_size=5))
def test_round_trip(description: dict[str, Any], files: dict[str, FileEntry]) -> None:
    manifest = Manifest(description, files)
    assert Manifest.parse(manifest.to_bytes(), "here") == manifest


def test_the_helper_signs_as_the_writer_does() -> None:
    assert Manifest.parse(signed(body_of(SMALL)), "here") == SMALL


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_is_seen_or_changes_nothing(bit: int) -> None:
    raw = SMALL.to_bytes()
    harmless = 0
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << bit
        try:
            assert Manifest.parse(bytes(flipped), "here") == SMALL
            harmless += 1
        except ContextFormatError:
            pass
    # only the layout and the spelling of a number or an escape are no content
    assert harmless <= raw.count(b"\n") + raw.count(b" ") + 3


@given(st.integers(0, len(SMALL.to_bytes()) - 2))
def test_a_cut_manifest_is_damaged(length: int) -> None:
    with pytest.raises(ContextFormatError, match=r"here/manifest\.json"):
        Manifest.parse(SMALL.to_bytes()[:length], "here/")


NOT_MANIFESTS = {
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"3",
    "another format": signed(body_of(SMALL), format="other"),
    "no format": b"{}",
    "a deep one": b"[" * 200_000,
}


@pytest.mark.parametrize("raw", NOT_MANIFESTS.values(), ids=NOT_MANIFESTS)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(ContextFormatError, match=r"expected here/manifest\.json .*got"):
        Manifest.parse(raw, "here")


@pytest.mark.parametrize("version", [2, 0, -1, None, "1", True, 1.0])
def test_another_version_says_what_reads_it(version: Any) -> None:
    raw = signed(body_of(SMALL), format_version=version, wavekv_version="9.1")
    with pytest.raises(ContextFormatError, match=r"format_version=1, got .*'9\.1'"):
        Manifest.parse(raw, "here")


def test_another_version_is_told_before_its_checksum() -> None:
    raw = json.dumps({**body_of(SMALL), "format_version": 2}).encode()
    with pytest.raises(ContextFormatError, match="format_version=1, got 2"):
        Manifest.parse(raw, "here")


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../b", "/a", "a//b", "a/", "", ".", "..", ".a", "a/.b", "a\\b", "a\nb", "a\x00b",
     "ä", "manifest.json", "a b", "~", "C:", "-a"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    raw = signed(body_of(SMALL), files={name: {"bytes": 1, "crc32": "00000000"}})
    with pytest.raises(ContextFormatError, match="files inside the context"):
        Manifest.parse(raw, "here")
    with pytest.raises(ContextFormatError):
        check_name(name, "here")


@pytest.mark.parametrize(
    "entry",
    [None, [], {}, {"bytes": 1}, {"crc32": "00000000"}, {"bytes": -1, "crc32": "00000000"},
     {"bytes": 1.0, "crc32": "00000000"}, {"bytes": True, "crc32": "00000000"},
     {"bytes": 1, "crc32": 0}, {"bytes": 1, "crc32": "0000000G"}, {"bytes": 1, "crc32": "0" * 9},
     {"bytes": 1, "crc32": "ABCDEF01"}],
)  # fmt: skip
def test_entries_of_another_form_are_refused(entry: Any) -> None:
    with pytest.raises(ContextFormatError, match=r"(bytes|crc32)=.* for a"):
        Manifest.parse(signed(body_of(SMALL), files={"a": entry}), "here")


@pytest.mark.parametrize(("key", "value"), [("files", []), ("files", None), ("description", "x")])
def test_parts_of_another_form_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ContextFormatError, match=f"no {key}"):
        Manifest.parse(signed(body_of(SMALL), **{key: value}), "here")


def test_a_key_twice_is_refused() -> None:
    raw = SMALL.to_bytes().replace(b'"tokens": 3', b'"tokens": 4, "tokens": 3')
    with pytest.raises(ContextFormatError, match="a key twice"):
        Manifest.parse(raw, "here")
