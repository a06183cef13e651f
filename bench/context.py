"""Saved contexts and the disk tier: files, random pages, the first token, and generation.

    python bench/context.py                                     the bundled model, on the CPU
    python bench/context.py --parts first --device cuda         8B shape, 128K random tokens
    python bench/context.py --parts pages --folder /mnt/nvme

Parts: `files`, saving and loading against the raw disk; `pages`, random pages against a plain pool
of threads; `first`, the first token of a loaded context against the prefill of its tokens; `tiers`,
generation with a quarter of the pages in host memory against all of them there; `steps`, decode
steps of a loaded context one after another; `tokens`, whether saving and loading changes an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from comparison import context_length
from context_disk import filesystem_of
from context_files import files_rows
from context_first import first_rows
from context_pages import LAYOUTS, pages_rows
from context_prompt import SHAPE_NAMES
from context_steps import steps_rows
from context_table import lines
from context_tiers import tiers_rows
from context_tokens import FORMS, tokens_rows
from machine import machine_record

from wavekv.config import parse_size

RESULT = Path(__file__).parent / "results" / "context.json"
PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]]] = {
    "files": files_rows,
    "pages": pages_rows,
    "first": first_rows,
    "tiers": tiers_rows,
    "steps": steps_rows,
    "tokens": tokens_rows,
}


def size_of(text: str) -> int:
    """Bytes of "512MiB"."""
    return int(parse_size("size", text))


def numbers(text: str) -> list[int]:
    """Of "64,512"."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, in this order")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=context_length, help="default: 32K, on CUDA 128K")
    parser.add_argument("--shape", choices=SHAPE_NAMES, help="default: bundled; on CUDA llama-8b")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--questions", type=int, default=48, help="of tiers and tokens")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of tokens")
    parser.add_argument("--steps", type=int, default=200, help="of steps")
    parser.add_argument("--size", type=size_of, default="512MiB", help="of the files of pages")
    parser.add_argument("--page-bytes", type=numbers, default=list(LAYOUTS))
    parser.add_argument("--batches", type=numbers, default=[64, 512, 4096])
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown parts {unknown}; there are {list(PARTS)}")
    on_cuda = torch.device(args.device).type == "cuda"
    args.tokens = args.tokens or (1 << 17 if on_cuda else 1 << 15)
    args.shape = args.shape or ("llama-8b" if on_cuda else "bundled")
    return args


def main() -> None:
    args = parse()
    # parts that are measured at other times stay
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    record["machine"] = machine_record()
    with TemporaryDirectory(dir=args.folder, prefix="wavekv-bench-") as name:
        folder = Path(name)
        place = {"machine": record["machine"], "filesystem": filesystem_of(folder)}
        for part in args.parts:
            began = time.time()
            rows: list[dict[str, Any]] = []
            record[part] = {**place, "load_average": os.getloadavg()[0], "rows": rows}
            for row in PARTS[part](args, folder):
                rows.append(row)
                # what was measured is kept, however the others end
                args.out.write_text(json.dumps(record, indent=1) + "\n")
            record[part]["seconds"] = round(time.time() - began)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines(record)))


if __name__ == "__main__":
    main()
