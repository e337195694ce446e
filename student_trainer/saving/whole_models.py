"""Write a model so that its folder holds all of it or nothing new, also where files may only grow to a certain size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from kd.common.disk.disk_errors import is_size_limit
from kd.common.files import process_tag, sync_file

ADAPTER_FOLDER = "adapter"
"""Folder of the adapters of a run that keeps them beside the merged model."""
PART_OF_LIMIT = 0.9
"""Largest file of weights as a share of the size that files may have: the header needs room too."""


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write weights, configuration and tokenizer as `save_pretrained` does. Raises OSError, or what the writers raise.

    All files are written beside their place and moved into it when they are whole. Where one is larger than files may be here
    (`ulimit -f`), the weights are written in several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".staging-{process_tag()}"
    try:
        try:
            _write(staging, model, tokenizer, {})
        except Exception as error:
            if not is_size_limit(error):
                raise
            limit = _size_limit()
            _write(staging, model, tokenizer, {} if limit is None else {"max_shard_size": int(limit * PART_OF_LIMIT)})
        for path in sorted(staging.iterdir()):
            sync_file(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(staging: Path, model: Any, tokenizer: Any, shards: dict[str, int]) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    model.save_pretrained(staging, **shards)
    tokenizer.save_pretrained(staging)


def _size_limit() -> int | None:
    """Most bytes that a file may have; None where there is no limit. A limit that may be lifted is lifted first."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return None if hard == resource.RLIM_INFINITY else hard
