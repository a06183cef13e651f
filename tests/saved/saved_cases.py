"""A small context of every kind of content, and ways to look at one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wavekv.saved.dtypes import DTYPES
from wavekv.saved.manifest import Manifest
from wavekv.saved.reader import ContextReader
from wavekv.saved.writer import ContextWriter


@dataclass
class Content:
    """What a context holds."""

    arrays: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    pages: dict[str, Tensor] = field(default_factory=dict)

    def write(self, writer: ContextWriter) -> None:
        for name, tensor in self.arrays.items():
            writer.array(name, tensor)
        for name, columns in self.tables.items():
            writer.table(name, columns)
        for name, pages in self.pages.items():
            writer.pages(name, len(pages), tuple(pages.shape[1:]), pages.dtype, reads(pages))

    def save(self, path: Path, description: dict | None = None) -> Manifest:
        with ContextWriter(path) as writer:
            self.write(writer)
            return writer.commit(description or {"of": "a test"})


def reads(pages: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: pages[first:last]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Any bits that the type may have."""
    random = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (*shape, dtype.itemsize), generator=random, dtype=torch.uint8)
    if dtype == torch.bool:
        return octets[..., 0] > 127
    return octets.flatten().view(dtype).view(shape)


def example(seed: int = 0) -> Content:
    """All types; arrays in groups, empty ones, tables, pages in one file, in several, and none."""
    every = {f"types/{name}": random_tensor(dtype, 3, 5) for name, dtype in DTYPES.items()}
    return Content(
        {**every, "empty": torch.empty(0, 4), "seed": torch.tensor([seed])},
        {
            "numbers": {
                "flat": torch.arange(7) + seed,
                "nested": random_tensor(torch.float16, 7, 2, 3),
                "brain": random_tensor(torch.bfloat16, 7, 4),
                "flags": random_tensor(torch.bool, 7, 2),
            },
            "none": {"of": torch.empty(0, 3, dtype=torch.int32)},
        },
        {
            "pages/0": random_tensor(torch.uint8, 700, 4096, seed=seed),
            "pages/1": random_tensor(torch.bfloat16, 3, 2, 4, 8, seed=seed),
            "pages/2": torch.empty(0, 2, 3),
        },
    )


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit: NaNs are the same as themselves."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.contiguous().flatten(), b.contiguous().flatten()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def read_all(path: Path) -> Content:
    """All that is in a context."""
    content = Content()
    with ContextReader.open(path) as reader:
        checksums = {name: name.replace("/", "_") for name in reader.arrays}
        for name in reader.arrays:
            if checksums[name] in reader.tables:
                pages = reader.pages(name)
                empty = torch.empty(0, *pages.stored_shape, dtype=pages.dtype)
                content.pages[name] = torch.cat([empty, *pages.map()])[: pages.num_pages]
            else:
                content.arrays[name] = reader.array(name)
        for name in set(reader.tables) - set(checksums.values()):
            content.tables[name] = reader.table(name)
    return content


def expect_same(found: Content, expected: Content) -> None:
    assert found.arrays.keys() == expected.arrays.keys()
    assert found.tables.keys() == expected.tables.keys()
    assert found.pages.keys() == expected.pages.keys()
    for name, tensor in {**expected.arrays, **expected.pages}.items():
        assert same({**found.arrays, **found.pages}[name], tensor), name
    for name, columns in expected.tables.items():
        assert list(found.tables[name]) == list(columns)
        for column, tensor in columns.items():
            assert same(found.tables[name][column], tensor), (name, column)


def left_beside(path: Path) -> list[str]:
    """Names in the folder of a path, but for its own."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)
