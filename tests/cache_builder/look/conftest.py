"""Caches of every kind, small and built once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from glue_fixtures import *  # noqa: F403
from terminal import kd

from kd.cache_builder.store.readers.reader import CacheReader


@pytest.fixture(scope="session")
def of_profile(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Callable[..., CacheReader]:
    """`of_profile("uld", …)`: a cache of the stories with that profile."""
    made: dict[tuple[object, ...], CacheReader] = {}

    def build(profile: str, **targets: Any) -> CacheReader:
        key = (profile, *sorted(targets.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("look") / profile
            run_build(build_request(out, profile=profile, **targets))
            made[key] = CacheReader(out)
        return made[key]

    return build


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Conversations with tools, through the embedded template."""
    out = tmp_path_factory.mktemp("look") / "chat"
    data = ["--teacher", "demo", "--data", "mini-chat", "--limit", 3, "--chat-template", "plain", "--device", "cpu"]
    kd("cache", "build", *data, "--out", out)
    return CacheReader(out)


@pytest.fixture(scope="session")
def renormalised(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> CacheReader:
    """Imported rows of two tokens each, without what lies beyond them and without their text."""
    folder = tmp_path_factory.mktemp("look")
    ids = [[5, 7, 9, 11], [6, 8, 10, 12]]
    rows = [
        {"input_ids": i, "logprobs": [None, *([-0.5, -1.0],) * 3], "target_token_ids": [[], *([20, 21],) * 3]}
        for i in ids
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--tokenizer", tokenizer_dir, "--tail", "unknown", "--no-check-source", "--logprob-codec", "float32"]
    kd("cache", "import", "jsonl", folder / "rows.jsonl", *options, "--out", folder / "cache")
    return CacheReader(folder / "cache")


@pytest.fixture(scope="session")
def every_row(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Example and token of every row of `cache`."""
    reader = CacheReader(cache)
    lengths = [len(example.targets) for example in reader.read(range(len(reader)))]
    return np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths])
