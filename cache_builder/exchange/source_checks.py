"""Signs that a source is not what it is said to be: rows shifted by a token, another tokenizer, a normaliser that is missing.

Each of them would make a cache that verifies and trains, and teaches nonsense. They are looked for in the first rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kd.cache_builder.exchange.checked_rows import SortedRows
from kd.cache_builder.exchange.source_sequences import SourceSequence, SourceText
from kd.cache_builder.exchange.spelled_text import Speller
from kd.common.errors import DataError
from kd.models.tokenizer import encode_with_ends

LOOKED_AT = 20_000
"""Rows that are looked at."""
FEWEST = 64
"""Rows below which nothing is concluded."""
SURE = 5.0
"""Standard errors by which another reading of the rows must be the better one: by chance once in millions of sources."""
WRITTEN_AGAIN = 0.98
"""Share of tokens that the right tokenizer writes again, at the same place, for the text that they spell. Measured on 40 kB of
prose with those of GPT-2, GPT-NeoX, SmolLM2, T5 and the embedded one: 0.999 and more of its own ids, 0.74 to 0.98 of another's. Of
ids in another order it writes 0.86 to 0.96 again; T5's, where most pieces are words, 0.998, which is not noticed."""
OFF = ("--no-check-source", "imports it as it is")


@dataclass
class SourceChecks:
    """Counts over the first rows of a source."""

    speller: Speller
    rows: int = 0
    better: dict[int, list[int]] = field(default_factory=lambda: {-1: [0, 0], 1: [0, 0]})
    """Shift -> rows that list the token there and not the predicted one, and rows of which the opposite holds"""
    tokens: int = 0
    same_tokens: int = 0
    """Tokens that the tokenizer writes again for the text that they spell"""
    whole_rows: int = 0
    """Rows whose listed probabilities sum to 1"""

    def add(self, sequence: SourceSequence, rows: SortedRows, text: SourceText, vocabulary_size: int) -> None:
        """Look at one more sequence; `text`: what its tokens spell."""
        if self.rows >= LOOKED_AT:
            return
        self.rows += len(rows.kept)
        self._look_for_a_shift(sequence, rows)
        masses = np.exp(rows.logprobs).sum(axis=1)
        self.whole_rows += int(((np.abs(masses - 1) < 2e-3) & (rows.kept < vocabulary_size)).sum())
        before = len(text.prompt.encode("utf-8"))
        again = encode_with_ends(self.speller.tokenizer, self.speller.pieces, text.prompt + text.target)
        tokens_again = set(zip(*(values.tolist() for values in again), strict=True))
        listed = list(zip(sequence.gold_ids.tolist(), (text.byte_end + before).tolist(), strict=True))
        if sequence.gold_ids[-1] == self.speller.eos:  # it stands for no text
            listed.pop()
        self.tokens += len(listed)
        self.same_tokens += sum(token in tokens_again for token in listed)

    def _look_for_a_shift(self, sequence: SourceSequence, rows: SortedRows) -> None:
        for shift, (better, worse) in self.better.items():
            places = sequence.context + np.arange(len(rows.kept)) + shift
            there = places < len(sequence.input_ids)
            other = sequence.input_ids[np.minimum(places, len(sequence.input_ids) - 1)]
            listed, of_other = ((rows.token_ids == ids[:, None]).any(axis=1) for ids in (sequence.gold_ids, other))
            self.better[shift] = [
                better + int((of_other & ~listed & there).sum()),
                worse + int((listed & ~of_other & there).sum()),
            ]

    def refuse(self, where: object) -> None:
        """Raise DataError where the rows speak against the source."""
        if self.rows < FEWEST:
            return
        for shift, (better, worse) in self.better.items():
            if better + worse and (better - worse) / math.sqrt(better + worse) > SURE:
                side = "before" if shift < 0 else "after"
                raise DataError(
                    "the rows seem to be shifted by one token",
                    where=where,
                    found=f"{better} rows list the token {side} the one that they should predict and not that one; "
                    f"the opposite holds for {worse}",
                    expected="row r of a sequence predicts its token context_length + r",
                    try_=f"other lengths of the context; {' '.join(OFF)}",
                )
        if self.same_tokens < self.tokens * WRITTEN_AGAIN:
            raise DataError(
                "the ids seem to be those of another tokenizer",
                where=where,
                found=f"{self.same_tokens} of {self.tokens} tokens come back when their text is tokenised again",
                expected=f"at least {WRITTEN_AGAIN:.0%}",
                try_=f"the --tokenizer of the teacher that wrote this; {' '.join(OFF)}",
            )

    def refuse_renormalised(self, where: object) -> None:
        """Raise DataError where the listed probabilities of every row sum to 1, as they do when they were renormalised."""
        if self.rows >= FEWEST and self.whole_rows == self.rows:
            raise DataError(
                "the kept probabilities seem to be renormalised",
                where=where,
                found=f"in all of {self.rows} rows they sum to 1",
                expected="probabilities over the whole vocabulary, of which the kept ones leave a rest",
                try_=f"--tail unknown; {' '.join(OFF)}, for a teacher that is so sure",
            )
