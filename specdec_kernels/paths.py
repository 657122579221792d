"""Where this package keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$SPECDEC_CACHE`, else `$XDG_CACHE_HOME/specdec_kernels`, else `~/.cache/specdec_kernels`."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec_kernels"
