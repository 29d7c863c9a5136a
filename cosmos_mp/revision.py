"""Which commit this code is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def revision() -> str:
    """Short hash of the checkout's commit, or "unknown" where the package is in none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"
