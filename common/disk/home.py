"""The user's folder of kd: the registry of caches, and mirrors."""

from __future__ import annotations

import os
from pathlib import Path

from kd.common.paths import as_path


def kd_home() -> Path:
    """`$KD_HOME`, by default `~/.cache/kd`; it may not exist yet."""
    return as_path(os.environ.get("KD_HOME") or Path.home() / ".cache" / "kd")
