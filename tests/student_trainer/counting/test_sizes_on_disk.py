"""The sizes of a large cache lie in a temporary file, and are what its lengths say."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest

from kd.cache_builder.store.readers.example_lengths import ListedLengths
from kd.common.disk.disk_errors import WriteError
from kd.common.errors import CacheDamageError
from kd.student_trainer.batches.example_sizes import ExampleSizes
from kd.student_trainer.counting import sizes_on_disk

TOKENS = np.random.default_rng(0).integers(2, 300, 1000)
ROWS = np.random.default_rng(1).integers(1, TOKENS)


class Many(ListedLengths):
    few = False


@pytest.fixture(autouse=True)
def small_pages(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sizes_on_disk, "PAGE_EXAMPLES", 64)
    monkeypatch.setattr(sizes_on_disk, "GROUP", 24)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("at_most", [(), (300, 300), (300, None), (70_000, 300)])
def test_sizes_of_any_examples_are_those_that_are_looked_up(start, at_most, tmp_path) -> None:
    sizes = ExampleSizes(Many(TOKENS, ROWS), start, at_most[: 1 + start])
    examples = np.random.default_rng(2).permutation(1000)
    with sizes.held(3) as held:
        assert held[examples].tolist() == sizes[examples].tolist()
        assert held[examples[:7]].tolist() == sizes[examples[:7]].tolist()
    assert not list(tmp_path.iterdir())
    with ExampleSizes(ListedLengths(TOKENS, ROWS), start).held(1) as few:
        assert few[examples].tolist() == sizes[examples].tolist()


def test_an_example_that_the_cache_s_settings_do_not_allow_is_an_error() -> None:
    held = ExampleSizes(Many(TOKENS, ROWS), 0, (200,)).held(1)
    with pytest.raises(CacheDamageError, match=f"example {int(TOKENS[:64].argmax())}\\n"), held:
        pass


def test_a_full_disk_is_said_with_the_room_that_is_needed(monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(WriteError, match=r"TMPDIR=DIR with 0\.0 GB, or --max-steps"),
        ExampleSizes(Many(TOKENS, ROWS)).held(1),
    ):
        pass
