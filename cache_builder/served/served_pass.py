"""The pass of a served teacher: token rows in, kept targets out, one shard at a time, as `teacher.teacher_pass` gives them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from kd.cache_builder.served.logprob_rows import TokenLogprobs, raw_targets
from kd.cache_builder.served.serving import LogprobEngine, ScoredSequence
from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.data.tokenizing.token_rows import TokenRows


class ServedPass:
    """Scores shards through an engine."""

    def __init__(self, engine: LogprobEngine, config: TargetConfig, vocabulary_size: int) -> None:
        self.engine, self.config, self.vocabulary_size = engine, config, vocabulary_size
        self.seconds = {"forward": 0.0, "head": 0.0, "select": 0.0}
        """Time spent waiting for the engine, under the names of the other pass."""
        self.padding_share: float | None = None
        """Only the engine knows."""
        self.placed: dict[str, int] = {}
        """No weights are in this process."""

    def close(self) -> None:
        """End what is under way."""
        self.engine.close()

    def shard(self, rows: Sequence[TokenRows], first_example: int) -> Iterator[tuple[int, RawTargets | None]]:
        """Score `rows`: yields `(rows done so far, None)`, at last `(all, RawTargets)`; nothing is drawn by number."""
        sequences = [scored_sequence(row) for row in rows]
        scored_rows: list[TokenLogprobs | None] = [None] * len(rows)
        done, began = 0, time.perf_counter()
        for answer in self.engine.scores(sequences):
            if answer is not None:
                number, logprobs = answer
                scored_rows[number] = logprobs
                done += len(logprobs.gold_logprob)
            yield done, None
        self.seconds["forward"] += time.perf_counter() - began
        gold = np.concatenate([row.target_ids for row in rows]).astype(np.int64)
        ends = np.concatenate([row.byte_end for row in rows])
        answered = [one for one in scored_rows if one is not None]
        yield done, raw_targets(answered, gold, ends, self.config, self.vocabulary_size)


def scored_sequence(row: TokenRows) -> ScoredSequence:
    """An example as an engine is asked about it: all its tokens, and which of them are targets."""
    positions = row.gaps.positions(len(row.context_ids), len(row.target_ids)) + 1
    return ScoredSequence(row.input_ids.tolist(), positions, f"example {row.example.id}")
