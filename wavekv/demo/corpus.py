"""Real English text that every machine with Python has: the standard library's documentation.

Sources are parsed, never imported. Files are split once by a hash of their name: on the Python that
the demo model was trained with (3.12) it never saw the held-out text; others move a few files.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 4
"""One file in this many is held out from training."""

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
}


def passages(split: Split) -> list[str]:
    """Return the passages of a split, in a fixed order: docstrings and help topics as plain prose.

    A passage that stands in files of both splits belongs to "train".

    Raises:
        FileNotFoundError: this Python has no standard-library sources beside it.
    """
    named = _named_passages()
    train = dict.fromkeys(text for name, text in named if _split_of(name) == "train")
    if split == "train":
        return list(train)
    return list(dict.fromkeys(text for _, text in named if text not in train))


@cache
def _named_passages() -> tuple[tuple[str, str], ...]:
    """(source, passage) of everything there is; parsing takes seconds."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if _is_wanted(file.relative_to(root))]
    named = [(f.relative_to(root).as_posix(), text) for f in files for text in _texts(f)]
    named += _help_topics(root)
    if not named:
        raise FileNotFoundError(
            f"expected Python sources with docstrings under {root}, found none; "
            "pass your own text instead (wavekv demo --file TEXT)"
        )
    return tuple(named)


def _is_wanted(path: Path) -> bool:
    return not _SKIPPED_FOLDERS & set(path.parts) and path.name != "topics.py"


def _split_of(name: str) -> Split:
    return "heldout" if zlib.crc32(name.encode()) % HELDOUT_SHARE == 0 else "train"


def _texts(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            prose = _prose(text)
            if len(prose) >= 80:
                yield prose


def _help_topics(root: Path) -> Iterator[tuple[str, str]]:
    """The `help()` topics: the language reference as plain text."""
    file = root / "pydoc_data" / "topics.py"
    if not file.exists():
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield f"topic:{key.value!s}", _prose(str(value.value))


def _prose(text: str) -> str:
    """One paragraph a line: rejoin wrapped lines, drop rulers and repeated blanks."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    joined = (re.sub(r"\s+", " ", re.sub(r"[-=*~^]{4,}", " ", p)).strip() for p in paragraphs)
    return "\n".join(p for p in joined if p)
