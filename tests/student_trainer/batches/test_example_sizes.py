"""What a student reads of each example; a large cache is believed how long its examples may be, and held to it."""

from __future__ import annotations

import numpy as np
import pytest

from kd.cache_builder.store.readers.example_lengths import ListedLengths
from kd.common.errors import CacheDamageError
from kd.data.tokenizing.block_config import BlockConfig
from kd.student_trainer.batches.example_sizes import ExampleSizes

TOKENS, ROWS = np.array([5, 9, 4]), np.array([2, 6, 4])
CAUSAL, ENCODER = BlockConfig(seq_len=16), BlockConfig(seq_len=16, encoder=True, target_len=8)


class Many(ListedLengths):
    few = False


def test_a_causal_student_reads_all_tokens_and_a_decoder_the_targets_behind_its_start():
    lengths = ListedLengths(TOKENS, ROWS)
    numbers = np.array([2, 0])
    assert ExampleSizes(lengths)[numbers].tolist() == [[4], [5]]
    assert ExampleSizes(lengths, 2)[numbers].tolist() == [[0, 5], [3, 3]]
    assert ExampleSizes(lengths).longest() == [9]
    assert ExampleSizes(lengths, 1).longest() == [3, 6]


def test_all_examples_of_a_small_cache_are_looked_at():
    sizes = ExampleSizes(ListedLengths(TOKENS, ROWS))
    assert sizes.trusting(CAUSAL, (1024, 1024)) is sizes


@pytest.mark.parametrize("window", [9, 15])
def test_all_examples_are_looked_at_where_the_student_s_window_is_shorter_than_what_the_cache_allows(window):
    assert ExampleSizes(Many(TOKENS, ROWS)).trusting(CAUSAL, (window, None)).longest() == [9]
    assert ExampleSizes(Many(TOKENS, ROWS), 1).trusting(ENCODER, (None, 7)).longest() == [3, 6]


def test_a_large_cache_is_believed_and_an_example_beyond_is_an_error_that_names_it():
    trusted = ExampleSizes(Many(TOKENS, ROWS)).trusting(CAUSAL, (16, None))
    assert trusted.longest() == [16]
    assert trusted[np.array([1])].tolist() == [[9]]
    short = ExampleSizes(Many(TOKENS, ROWS)).trusting(BlockConfig(seq_len=8), (16, None))
    assert short[np.array([0, 2])].tolist() == [[5], [4]]
    with pytest.raises(CacheDamageError, match="example 1"):
        short[np.array([0, 1])]


def test_targets_without_a_bound_are_believed_where_the_decoder_has_none():
    blocks = BlockConfig(seq_len=16, encoder=True)
    trusted = ExampleSizes(Many(TOKENS, ROWS), 1).trusting(blocks, (None, None))
    assert trusted.at_most == (16, None)
    assert trusted[np.array([1])].tolist() == [[3, 6]]
    assert ExampleSizes(Many(TOKENS, ROWS), 1).trusting(blocks, (None, 512)).at_most == ()
