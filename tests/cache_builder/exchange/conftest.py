"""A small cache at temperature 1, and its rows as plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.cache_builder.exchange.export_cache import export_cache
from kd.cache_builder.store.readers.reader import CacheReader

Arrays = dict[str, np.ndarray]
TEXT = ("prompts", "targets", "byte_ends")
GOLD = ("gold_logprobs", "gold_ranks")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """A finished cache of several shards, with exact log-probabilities."""
    out = tmp_path_factory.mktemp("exchange") / "original"
    run_build(build_request(out, temperatures=(1.0,), logprob_codec="float32", top_k=8))
    return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    out = tmp_path_factory.mktemp("exchange") / "arrays"
    export_cache("npz", original, out=out)
    return out


@pytest.fixture
def arrays(original: Path) -> Arrays:
    """The rows of the whole cache as the arrays of one source, worked out by hand from its examples."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "lengths", "token_ids", "logprobs", "context_lengths", "ids", *TEXT, *GOLD)
    }
    reader = CacheReader(original)
    for example in reader.read(range(len(reader))):
        targets = example.targets
        found["input_ids"] += [*example.context_ids, *targets.gold_ids]
        found["lengths"].append(len(example.context_ids) + len(targets))
        found["context_lengths"].append(len(example.context_ids))
        assert targets.token_ids is not None
        assert targets.logprobs is not None
        found["token_ids"] += list(targets.token_ids)
        found["logprobs"] += list(targets.logprobs)
        found["gold_logprobs"] += list(targets.gold_logprob)
        found["gold_ranks"] += list(targets.gold_rank)
        found["ids"].append(example.id)
        found["prompts"].append(example.prompt)
        found["targets"].append(example.target)
        found["byte_ends"] += list(targets.byte_end)
    return {name: np.array(values) for name, values in found.items()}


@pytest.fixture
def write(tmp_path: Path, arrays: Arrays) -> Callable[..., Path]:
    """`write(without=(…), name=array)`: a source like the arrays, but for the changes."""

    def written(*, without: tuple[str, ...] = (), **changes: np.ndarray) -> Path:
        path = tmp_path / "rows.npz"
        kept: dict[str, Any] = {n: array for n, array in (arrays | changes).items() if n not in without}
        np.savez(path, **kept)
        return path

    return written
