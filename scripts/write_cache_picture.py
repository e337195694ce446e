"""Write docs/figures/cache.png from the demo's cache: `python scripts/write_cache_picture.py`. Needs the extras train and eval."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import kd

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "cache.png"
WIDTH = 1100
"""Pixels: half of what is drawn."""


def main() -> None:
    """Build the cache of the first 20 pages of the demo's text, draw it, and save the overview with few colours."""
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.cache_builder.build.from_settings import build_of
    from kd.common.settings import make

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        settings = {"teacher": "demo", "spec": "demo", "limit": 20, "device": "cpu", "out": cache}
        build_of(make(BuildSettings, settings))
        with Image.open(kd.plot_cache(cache, out=Path(folder) / "plots")["overview"]) as drawn:
            small = drawn.convert("RGB").resize(
                (WIDTH, round(WIDTH * drawn.height / drawn.width)), Image.Resampling.LANCZOS
            )
        small.quantize(32).save(PICTURE, optimize=True)
    with Image.open(PICTURE) as written:
        print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes, {np.asarray(written).shape}")


if __name__ == "__main__":
    main()
