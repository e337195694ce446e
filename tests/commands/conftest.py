"""The made-up GLUE rows and tiny classifiers of `glue_fixtures`, for the tests of this folder."""

from pathlib import Path

import pytest
from glue_fixtures import *  # noqa: F403

from kd.student_trainer.merging.pool import ModelPool


@pytest.fixture
def common(gpt2_pool: ModelPool, glue_root: Path) -> list[str]:
    """Options of the commands that read a pool of classifiers."""
    return ["--pool", str(gpt2_pool.file), "--task-root", str(glue_root), "--max-length", "64", "--device", "cpu"]
