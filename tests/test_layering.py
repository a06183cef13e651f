"""Imports inside wavekv point one way, and each heavy library has one home.

    cli, server -> model_adapters -> offload -> {index, kvstore} -> kernels
    cli -> estimate -> machine -> offload
    model_adapters, remote -> saved -> kernels

The check reads source and runs none of it, so it sees imports inside functions, under
`if TYPE_CHECKING` and behind `try`, on machines that could not execute them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wavekv

ROOT = Path(__file__).resolve().parents[1]

# part -> the other parts it may import. "wavekv" is the root module itself: the version string.
COMMON = {"config", "errors", "growing", "wavekv"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "kernels": set(),
    "growing": set(),
    "demo": {"errors"},
    "config": {"errors"},
    "index": {"kernels"} | COMMON,
    "kvstore": {"kernels"} | COMMON,
    "saved": {"kernels"} | COMMON,
    "remote": {"saved"} | COMMON,
    "offload": {"index", "kvstore", "kernels"} | COMMON,
    "machine": {"offload", "index", "kvstore", "kernels"} | COMMON,
    "estimate": {"machine", "offload", "index", "kvstore", "kernels"} | COMMON,
    "model_adapters": {"saved", "offload", "index", "kvstore", "kernels"} | COMMON,
    "server": {"model_adapters", "offload", "index", "kvstore", "kernels"} | COMMON,
    "cli": {"server", "demo", "estimate", "machine", "model_adapters", "offload", "index"}
    | {"kvstore", "kernels", "saved", "remote"}
    | COMMON,
    "wavekv": {"model_adapters", "offload", "index", "kvstore", "saved", "config", "errors"},
}
# library -> the only part that may import it.
ONLY_HOME = {
    "transformers": "model_adapters",
    "numba": "kernels",
    "llvmlite": "kernels",
    "triton": "kernels",
    "fsspec": "remote",
}


def part_of(module: str) -> str:
    """The part a dotted name belongs to: `wavekv.index.flat` -> `index`, `wavekv` -> `wavekv`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "wavekv"


def resolve_from(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute module a `from ... import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted target of every import statement or literal dynamic import, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = resolve_from(node, module, is_package)
            if target != "wavekv":
                yield node.lineno, target
                continue
            # `from wavekv import X`: X is a part, a public name that lives in one, or the root's.
            for alias in node.names:
                home = wavekv._HOME.get(alias.name)
                own = alias.name.startswith("__")
                yield node.lineno, home or ("wavekv.__init__" if own else f"wavekv.{alias.name}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every import in `source` that the rules forbid to `module`, as readable lines."""
    part, found = part_of(module), []
    if part not in MAY_IMPORT:
        return [f"{module}: {part!r} is no known part of wavekv; give it a row in MAY_IMPORT"]
    for line, target in imported_modules(source, module, is_package):
        library = target.split(".")[0]
        if library != "wavekv":
            home = ONLY_HOME.get(library, part)
            if part != home:
                found.append(f"{module}:{line}: only {home} imports {library}")
        elif target == "wavekv":
            found.append(f"{module}:{line}: import the name you need, not all of wavekv")
        else:
            other = "wavekv" if target == "wavekv.__init__" else part_of(target)
            if other != part and other not in MAY_IMPORT[part]:
                found.append(f"{module}:{line}: {part} must not import {other}")
    return found


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


SOURCES = sorted((ROOT / "wavekv").rglob("*.py"))


def test_the_package_is_found() -> None:
    assert {"wavekv", "wavekv.errors"} <= {module_name(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    found = violations(
        path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py"
    )
    assert not found, "\n".join(found)


def test_public_names_live_where_the_root_may_reach() -> None:
    assert {part_of(home) for home in wavekv._HOME.values()} <= MAY_IMPORT["wavekv"]


BAD = {
    "index-imports-kvstore": ("wavekv.index.flat", "from wavekv.kvstore import pages"),
    "kvstore-imports-index": ("wavekv.kvstore.host", "import wavekv.index.flat as flat"),
    "upward": ("wavekv.offload.pool", "from wavekv.model_adapters.cache import OffloadedCache"),
    "in-a-function": ("wavekv.index.flat", "def f():\n    import wavekv.offload"),
    "in-a-method": ("wavekv.kernels.dispatch", "class A:\n  def f(self):\n    import transformers"),
    "type-checking": (
        "wavekv.offload.plan",
        "if TYPE_CHECKING:\n    import transformers.cache_utils",
    ),
    "in-a-try": ("wavekv.index.flat", "try:\n    import numba\nexcept ImportError:\n    pass"),
    "relative-sibling": ("wavekv.index.flat", "from ..kvstore import pages"),
    "relative-part": ("wavekv.index.flat", "from .. import kvstore"),
    "relative-deep": ("wavekv.index.tree.node", "from ...offload.pool import PagePool"),
    "part-from-root": ("wavekv.offload.pool", "from wavekv import index, model_adapters"),
    "public-name": ("wavekv.offload.pool", "from wavekv import OffloadedKV"),
    "whole-package": ("wavekv.offload.pool", "import wavekv"),
    "dynamic": (
        "wavekv.kvstore.host",
        "import importlib\nimportlib.import_module('triton.language')",
    ),
    "dunder-import": ("wavekv.kvstore.host", "__import__('wavekv.offload')"),
    "kernels-config": ("wavekv.kernels.cpu", "from wavekv.config import OffloadConfig"),
    "kernels-errors": ("wavekv.kernels.cpu", "from wavekv.errors import LayoutError"),
    "kernels-version": ("wavekv.kernels.cpu", "from wavekv import __version__"),
    "demo-config": ("wavekv.demo.corpus", "from wavekv.config import OffloadConfig"),
    "server-cli": ("wavekv.server.app", "from wavekv.cli import main"),
    "cli-transformers": ("wavekv.cli.main", "from transformers import AutoTokenizer"),
    "unknown-part": ("wavekv.helpers", "x = 1"),
}
GOOD = {
    "down": (
        "wavekv.offload.pool",
        "from wavekv.kvstore import pages\nfrom wavekv.index import WaveIndex",
    ),
    "two-levels-down": ("wavekv.model_adapters.cache", "from wavekv.kernels import reference"),
    "same-part": (
        "wavekv.index.flat",
        "from .base import KVIndex\nfrom wavekv.index import recall",
    ),
    "adapters-transformers": ("wavekv.model_adapters.cache", "from transformers import Cache"),
    "kernels-numba": ("wavekv.kernels.cpu", "def f():\n    import numba, triton"),
    "cli-demo": (
        "wavekv.cli.main",
        "from wavekv.demo import corpus\nfrom wavekv import OffloadedKV",
    ),
    "version": ("wavekv.kvstore.saved", "from wavekv import __version__"),
    "lookalike": ("wavekv.index.flat", "import wavekv_extras, numbers, tritonclient"),
}


@pytest.mark.parametrize(("module", "source"), BAD.values(), ids=BAD)
def test_a_violation_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(("module", "source"), GOOD.values(), ids=GOOD)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_in_a_package_init_resolve_from_the_package() -> None:
    assert violations("from .base import KVIndex", "wavekv.index", is_package=True) == []
    assert violations("from ..kvstore import pages", "wavekv.index", is_package=True)
