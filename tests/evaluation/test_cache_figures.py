"""`kd cache info --plots` and `kd.plot_cache` draw what a cache holds, and say what they cannot draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from terminal import kd

from kd.cache_builder.look.row_statistics import row_statistics
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.progress import final
from kd.evaluation.cache_figures import draw_cache, plot_cache

NAMES = {"entropy", "kept-mass", "rank", "probability", "calibration", "bytes", "overview"}


def test_every_picture_is_drawn_and_the_figures_are_printed(cache: Path, tmp_path: Path) -> None:
    document = json.loads(kd("cache", "info", cache, "--plots", tmp_path / "plots", "--json"))
    assert set(document["plots"]) == NAMES
    for file in document["plots"].values():
        pixels = np.asarray(imread(file))
        assert pixels.shape[1] >= 1000
        assert pixels.std() > 0.03  # something is drawn
    figures = final(row_statistics(CacheReader(cache))).document
    array_bytes = document["figures"].pop("array_bytes_per_token")
    assert document["figures"] == figures
    assert array_bytes == document["array_bytes_per_token"]
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in NAMES}


def test_what_is_unknown_is_not_drawn(cache: Path, tmp_path: Path) -> None:
    figures = final(row_statistics(CacheReader(cache)))
    figures.tail_known = False
    figures.kept_mass.counts[:] = 0
    assert set(draw_cache(tmp_path, figures, {"gold_ids": 1.0})) == NAMES - {"kept-mass", "calibration"}


def test_without_matplotlib_the_extra_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from kd.common.extras import MissingPackageError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        plot_cache(cache, out=tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
