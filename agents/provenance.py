"""What a result was made with: versions, hardware, commit, hashes of data."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np


@lru_cache
def provenance() -> dict[str, Any]:
    """Return the git commit, the versions of what computes, and the hardware, as JSON."""
    import accelerate
    import torch
    import transformers

    return {
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
    }


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, "" for what is no file."""
    if not Path(path).is_file():
        return ""
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _git_commit() -> str | None:
    """Return the commit of this project's checkout, None if it is none."""
    here = str(Path(__file__).parent)
    try:
        found = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
