"""The perplexity that `kd train` prints is that of the text as the student is trained on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from terminal import kd


@pytest.mark.parametrize("separator", [" => ", "\n"])
def test_held_out_text_is_read_as_the_text_of_the_cache(
    model_dir: Path, student_dir: Path, pairs_file: Path, tmp_path: Path, separator: str
) -> None:
    """A step over all examples reports the loss of the weights before it: the same rows, so the same perplexity."""
    cache, out = tmp_path / "cache", tmp_path / "student"
    kd(
        "cache",
        "build",
        "--teacher",
        model_dir,
        "--data",
        pairs_file,
        "--separator",
        separator,
        "--out",
        cache,
        "--json",
    )
    words = ("--loss", "ce", "--batch-size", 99, "--max-steps", 1, "--eval-data", pairs_file, "--allow-contaminated")
    done = json.loads(kd("train", "--cache", cache, "--student", student_dir, *words, "--out", out, "--json"))
    assert math.log(done["perplexity_before"]) == pytest.approx(
        done["ce"], rel=1e-5
    )  # sums of float32 in another order
