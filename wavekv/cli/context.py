"""`wavekv context`: copy, list, verify and delete saved contexts, here and in object stores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wavekv.cli.table import mib, print_table
from wavekv.errors import ConfigError
from wavekv.remote.copied import Copied
from wavekv.remote.listing import contexts, info
from wavekv.remote.pull import pull
from wavekv.remote.push import push
from wavekv.remote.remove import remove
from wavekv.remote.transfer import JOBS, Progress
from wavekv.remote.verify import verify

_PLACE = "a path, or a URL of s3://, gs://, az:// or file://"


def add_parser(commands: Any) -> None:
    """Add the `context` subcommand and its own."""
    help_text = "copy saved contexts to and from object stores, list, verify and delete them"
    parser: argparse.ArgumentParser = commands.add_parser("context", help=help_text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    push_parser = actions.add_parser("push", help="copy a saved context to a store")
    push_parser.add_argument("path", type=Path, metavar="PATH")
    push_parser.add_argument("url", metavar="URL", help=_PLACE)
    _finish_copy(push_parser, run_push, "delete another context at URL first")

    pull_parser = actions.add_parser("pull", help="copy a saved context from a store")
    pull_parser.add_argument("url", metavar="URL", help=_PLACE)
    pull_parser.add_argument("path", type=Path, metavar="PATH")
    _finish_copy(pull_parser, run_pull, "take the place of a context at PATH")

    for name, run, help_text in (
        ("ls", run_ls, "the contexts one level below a place"),
        ("info", run_info, "what a context holds"),
        ("verify", run_verify, "compare all files with their checksums"),
        ("rm", run_rm, "delete a context"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("place", metavar="URL_OR_PATH", help=_PLACE)
        if name == "verify":
            _add_jobs(action)
        if name == "rm":
            action.add_argument("--yes", action="store_true", help="do not ask")
        _finish(action, run)


def run_push(options: argparse.Namespace) -> int:
    """Copy a context to a store."""
    with _progress("push", options.json) as progress:
        copied = push(
            options.path,
            options.url,
            jobs=options.jobs,
            replace=options.replace,
            progress=progress,
        )
    return _say_copied(options, copied, options.url)


def run_pull(options: argparse.Namespace) -> int:
    """Copy a context from a store."""
    with _progress("pull", options.json) as progress:
        copied = pull(
            options.url,
            options.path,
            jobs=options.jobs,
            replace=options.replace,
            progress=progress,
        )
    return _say_copied(options, copied, str(options.path))


def run_ls(options: argparse.Namespace) -> int:
    """List contexts."""
    found = contexts(options.place)
    if options.json:
        print(json.dumps({"contexts": [it.to_dict() for it in found]}))
        return 0
    if not found:
        print(f"no saved contexts one level below {options.place}")
        return 0
    rows = [("name", "tokens", "size", "format")]
    for it in (it.to_dict() for it in found):
        if it["problem"] is not None:
            rows.append((it["name"], "", "", "damaged"))
        else:
            tokens = "" if it["num_tokens"] is None else str(it["num_tokens"])
            rows.append((it["name"], tokens, mib(it["nbytes"]), str(it["format_version"])))
    print_table(rows)
    for listed in found:
        if listed.problem is not None:
            print(f"\n{listed.name}: {listed.problem}")
    return 0


def run_info(options: argparse.Namespace) -> int:
    """Describe a context."""
    result = info(options.place)
    if options.json:
        print(json.dumps(result))
        return 0
    size = f"{mib(result['nbytes'])} in {result['files']} files"
    print(f"{options.place}: {size}, written by wavekv {result['wavekv']}")
    print_table([(name, _text(value)) for name, value in sorted(result["description"].items())])
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Compare a context with its manifest; 1 where they differ."""
    with _progress("verify", options.json) as progress:
        problems = verify(options.place, jobs=options.jobs, progress=progress)
    if options.json:
        found = [
            {"file": it.file, "field": it.field, "expected": it.expected, "got": it.got}
            for it in problems
        ]
        print(json.dumps({"context": options.place, "problems": found}))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{options.place}: all files are as its manifest says")
    return 1 if problems else 0


def run_rm(options: argparse.Namespace) -> int:
    """Delete a context; 1 where the user would rather not."""
    if not options.yes and not _agreed(options.place):
        return 1
    removed = remove(options.place)
    if options.json:
        result = {"files": removed.files, "nbytes": removed.nbytes, "foreign": removed.foreign}
        print(json.dumps({"context": options.place, **result}))
        return 0
    print(f"{options.place}: {removed.files} files, {mib(removed.nbytes)} deleted")
    for name in removed.foreign:
        print(f"{name} was no part of it and is still there")
    return 0


def _agreed(place: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(f"rm of {place} needs a yes, and nobody can be asked here; pass --yes")
    print(f"delete {place}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _say_copied(options: argparse.Namespace, copied: Copied, place: str) -> int:
    if options.json:
        result = {"files": copied.files, "nbytes": copied.nbytes, "kept": copied.kept}
        print(json.dumps({"context": place, **result}))
        return 0
    kept = f"; {copied.kept} were there already" if copied.kept else ""
    print(f"{place}: {copied.files} files, {mib(copied.nbytes)} copied{kept}")
    return 0


@contextmanager
def _progress(action: str, is_json: bool) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal and nothing else reads the output."""
    with tqdm(desc=action, unit="B", unit_scale=True, disable=is_json or None) as bar:

        def update(nbytes: int, total: int) -> None:
            bar.total = total
            bar.update(nbytes)

        yield update


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _finish_copy(parser: argparse.ArgumentParser, run: Any, replace_help: str) -> None:
    _add_jobs(parser)
    parser.add_argument("--replace", action="store_true", help=replace_help)
    _finish(parser, run)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"files at a time ({JOBS})")


def _finish(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.set_defaults(run=run)
