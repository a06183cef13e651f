"""`wavekv bench`: the benchmarks of a source checkout, by name."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from wavekv.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "bench"


def add_parser(commands: Any) -> None:
    """Add the `bench` subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="run a benchmark of a source checkout, such as million"
    )
    parser.add_argument("name", nargs="?", help="which; without one, all are listed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the program in a process of its own; return its exit status.

    Raises:
        ConfigError: there is no checkout, or no such program.
    """
    programs = programs_in(FOLDER)
    if not programs:
        raise ConfigError(
            f"expected the benchmarks in {FOLDER}, found none: they come with the sources, not "
            "with the installed package; clone the repository and `pip install -e .` there"
        )
    if options.name is None:
        print("wavekv bench NAME [ARGUMENTS]; NAME --help says what each takes\n")
        for name, summary in programs.items():
            print(f"  {name:<22}{summary}")
        return 0
    if options.name not in programs:
        raise ConfigError(f"expected one of {', '.join(programs)}, got {options.name!r}")
    program = FOLDER / f"{options.name}.py"
    return subprocess.run([sys.executable, program, *options.arguments], check=False).returncode


def programs_in(folder: Path) -> dict[str, str]:
    """The first line of each program's docstring, by name: files that can be run by themselves."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found
