"""The `wavekv` command."""

from __future__ import annotations

import argparse
import sys

from wavekv import __version__
from wavekv.cli import demo
from wavekv.errors import WavekvError


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="wavekv", description="Answer from contexts that do not fit the GPU."
    )
    parser.add_argument("--version", action="version", version=f"wavekv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (WavekvError, OSError, ValueError) as error:
        print(f"wavekv {options.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
