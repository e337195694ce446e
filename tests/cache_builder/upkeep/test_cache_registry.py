"""Caches are found below a folder, and by the beginning of their fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from terminal import kd

from kd.cache_builder.opening import open_cache
from kd.common.errors import CacheError


def test_ls_finds_caches_by_folder_and_by_fingerprint(tmp_path, model_dir, text_file):
    kd(
        "cache",
        "build",
        "--teacher",
        model_dir,
        "--data",
        text_file,
        "--seq-len",
        32,
        "--top-k",
        8,
        "--device",
        "cpu",
        "--out",
        tmp_path / "deep" / "down",
    )
    kd("cache", "slice", tmp_path / "deep" / "down", "--top-k", 2, "--out", tmp_path / "cut")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    below = json.loads(kd("cache", "ls", tmp_path, "--json"))["caches"]
    assert [Path(row["path"]).name for row in below] == ["bad", "cut", "down"]
    assert below[0]["fingerprint"] is None
    noted = json.loads(kd("cache", "ls", "--json"))["caches"]
    assert sorted(Path(row["path"]).name for row in noted) == ["cut", "down"]
    prefix = below[1]["fingerprint"][:12]
    assert prefix in kd("cache", "ls")
    assert open_cache(prefix).root == (tmp_path / "cut").resolve()
    with pytest.raises(CacheError, match="no cache of this machine"):
        open_cache("0123456789ab")
