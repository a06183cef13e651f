"""What a result was measured on: machine, versions, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch


def machine_record() -> dict[str, Any]:
    """A JSON-ready description of this run."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numba", "numpy")},
    }


def _commit() -> str:
    if "GIT_COMMIT" in os.environ:  # where the sources are without their history
        return os.environ["GIT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
