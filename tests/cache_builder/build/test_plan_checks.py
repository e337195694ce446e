"""Teachers, texts and settings that do not go together are refused before a weight is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config

from kd.cache_builder.build.plan_checks import (
    PADDED_COLUMNS,
    predicted_ids,
    refuse_long_sequences,
    refuse_no_such_part,
    refuse_other_kind,
)
from kd.common.errors import DataError


@pytest.mark.parametrize("part", [(1, 1), (2, 2), (1, 9)])
def test_parts_are_counted_from_one(part: tuple[int, int]):
    refuse_no_such_part(part)
    with pytest.raises(DataError, match="no such part"):
        refuse_no_such_part((0, part[1]))
    with pytest.raises(DataError, match="no such part"):
        refuse_no_such_part((part[1] + 1, part[1]))


@pytest.mark.parametrize("option", ["seq_len", "target_len"])
def test_a_sequence_may_be_as_long_as_the_positions(option: str):
    config = GPT2Config(n_positions=64)

    def check(length: int) -> None:
        blocks: Any = SimpleNamespace(**{"seq_len": None, "target_len": None, "forced": ()} | {option: length})
        refuse_long_sequences(SimpleNamespace(blocks=blocks), config)  # type: ignore[arg-type]

    check(64)
    with pytest.raises(DataError, match="longer than the teacher's positions") as error:
        check(65)
    assert error.value.details["try"] == f"--{option.replace('_', '-')} 64"


def test_padded_columns_are_left_out_and_those_of_random_weights_are_not(tokenizer):
    def ids(extra: int, random: bool) -> int:
        request: Any = SimpleNamespace(teacher=SimpleNamespace(random_shape="tiny" if random else None))
        return predicted_ids(request, SimpleNamespace(vocab_size=400 + extra), tokenizer)

    assert ids(0, False) == ids(PADDED_COLUMNS, False) == ids(PADDED_COLUMNS - 1, True) == 400
    assert ids(PADDED_COLUMNS, True) == 400 + PADDED_COLUMNS
    with pytest.raises(DataError, match="fewer logits than its tokenizer has entries"):
        ids(-1, False)


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("GPT2ForSequenceClassification", "documents", "a classifier can only score"),
        ("GPT2LMHeadModel", "classes", "only a classifier can score"),
    ],
)
def test_classifiers_and_labelled_rows_belong_together(architecture: str, kind: str, words: str):
    corpus = SimpleNamespace(kind=kind, spec="text")
    request: Any = SimpleNamespace(corpus=corpus, teacher=SimpleNamespace(name="teacher"))
    with pytest.raises(DataError, match=words):
        refuse_other_kind(request, SimpleNamespace(architectures=[architecture]))
