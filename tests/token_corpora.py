"""Small corpora as token rows, for the tests of `kd.data.tokenizing`."""

from __future__ import annotations

import numpy as np

from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.data.tokenizing.token_rows import TokenRows

TEXT = "The keeper of the lighthouse counted the ships: seven on Monday, five on Tuesday, and on Wednesday fog."
EMOJI = "a😀b👩‍👩‍👧 日本語 naïve — “too much” 😀😀😀"


def documents(*found: str) -> Corpus:
    return Corpus("x", "train", "documents", tuple(Example(f"d{i}", t) for i, t in enumerate(found)), {})


def pairs(*found: tuple[str, str]) -> Corpus:
    return Corpus("x", "train", "pairs", tuple(Example(f"p{i}", t, prompt=p) for i, (p, t) in enumerate(found)), {})


def rows_of(corpus: Corpus, tokenizer, **config) -> list[TokenRows]:
    return list(tokenize_corpus(corpus, tokenizer, BlockConfig(**config)))


def check_spans(row: TokenRows) -> None:
    """`byte_end` is non-decreasing, ends with the target text, and lies inside it."""
    assert len(row.byte_end) == len(row.target_ids) >= 1
    assert len(row.context_ids) >= 1
    assert (np.diff(row.byte_end) >= 0).all()
    assert row.byte_end[0] >= 0
    assert row.byte_end[-1] == len(row.example.target.encode())
