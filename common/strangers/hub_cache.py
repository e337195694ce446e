"""Ids of the hub that this machine has already fetched, to suggest the one that a misspelled id means. Nothing asks the network."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

ALIKE = 0.8
"""Least likeness of two ids. They share an owner more often than a meaning, so a suggestion must be nearer than for other names."""


def nearest_cached(kind: Literal["datasets", "models"], name: str) -> str | None:
    """The id in the hub's cache that is spelled most like `name`; None where none is near, or where `name` is there itself."""
    from huggingface_hub import constants

    try:
        folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{kind}--*"))
    except OSError:
        return None
    cached = [folder.name.removeprefix(f"{kind}--").replace("--", "/", 1) for folder in folders]
    near = difflib.get_close_matches(name, cached, n=1, cutoff=ALIKE)
    return near[0] if near and name not in cached else None
