"""The `wavekv` command."""

from __future__ import annotations

import argparse
import os
import sys

from wavekv import __version__
from wavekv.errors import WavekvError


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="wavekv", description="Answer from contexts that do not fit the GPU."
    )
    parser.add_argument("--version", action="version", version=f"wavekv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["index"]:
        # before torch comes: threads of OpenMP that spin while idle take the cores from the others
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments[:1] not in (["index"], ["doctor"], ["estimate"], ["bench"], ["context"]):
        # not for these: it imports transformers, which takes seconds
        from wavekv.cli import demo

        demo.add_parser(commands)
    if arguments[:1] != ["context"]:
        # not for that one: they import torch, which takes seconds too
        from wavekv.cli import bench, doctor, estimate, index

        for command in (index, estimate, doctor, bench):
            command.add_parser(commands)
    from wavekv.cli import context

    context.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (WavekvError, OSError, ValueError) as error:
        print(f"wavekv {options.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
