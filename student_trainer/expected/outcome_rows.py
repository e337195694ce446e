"""What the teacher expects of the text, as probabilities of sets of student tokens: the targets of `text-kl`.

Where a student token and a teacher's piece begin at the same byte, the cached row gives the probability of every kept piece,
and `PiecePaths` says which student tokens each stands for. The student's token may be longer than the piece that came. Then
the next row says how the text goes on after that piece, and so on along the cached rows until the token is covered: the
outcomes are all the pieces that did not come, after the pieces before them that did, and the token itself. An outcome's
probability is the product along its path. Outcomes that the student cannot tell apart are one outcome; everything
that no outcome names is the rest.

Where a student token ends with the piece but may be the beginning of longer ones (` the`, ` then`), the row after it says how
probable it is that the text goes on like this. At the next position this is known: the student's token before says that it does
not. So pieces that would have made that token longer are left out there, and the others share their probability.
Positions where no piece of the teacher begins hold the text's token alone.

Shapes: N scored positions, P those where a piece begins, R rows of the teacher, K kept pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from kd.cache_builder.store.soft_targets import SoftTargets
from kd.student_trainer.expected.piece_paths import AS_IT_IS, PiecePaths

LEAST = 1e-4
"""Least probability of an outcome that lies beyond the first row; less probable ones are in the rest."""


@dataclass(frozen=True)
class Starts:
    """The positions where a student token and a teacher's piece begin together, `[P]` each."""

    position: np.ndarray
    """Number of the student token among the scored ones."""
    token: np.ndarray
    """Id of the student token."""
    first: np.ndarray
    """Row of the teacher's piece."""
    stop: np.ndarray
    """One past the last row of the same bytes."""
    after: np.ndarray
    """Row of the text after the student token, -1 where it has none."""
    reading: np.ndarray
    """How the first piece reads (`PiecePaths.reading`)."""
    before: np.ndarray
    """Id of the student token before, where the rows of its bytes come just before; else -1."""


def joined_starts(parts: Sequence[Starts]) -> Starts:
    """The positions of several examples."""
    return Starts(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Starts)))


@dataclass
class _Outcomes:
    """Outcomes as they are found: entries of all positions in any order."""

    owner: list[np.ndarray]
    start: list[np.ndarray]
    stop: list[np.ndarray]
    logprob: list[np.ndarray]

    def add(self, owner: np.ndarray, start: np.ndarray, stop: np.ndarray, logprob: np.ndarray) -> None:
        """More outcomes; those without student tokens are left to the rest."""
        known = start >= 0
        for values, more in zip(
            (self.owner, self.start, self.stop, self.logprob), (owner, start, stop, logprob), strict=True
        ):
            values.append(more[known])


def text_rows(
    paths: PiecePaths, rows: SoftTargets, starts: Starts, gold_ids: np.ndarray, temperature: float
) -> dict[str, np.ndarray]:
    """The outcomes of all N positions, one position after another.

    rows      the teacher's rows of all examples
    gold_ids  [N] the student's tokens
    returns   `range_starts`, `range_stops` [E] in positions of `PiecePaths`, `logprobs` [E] of each outcome, `kept [N]`
              outcomes of each position, and `tail_mass [N]` the rest
    """
    outcomes = _Outcomes([], [], [], [])
    scale = _follow(paths, rows, starts, temperature, outcomes)
    gold = np.zeros(len(gold_ids))
    gold[starts.position] = scale
    numbers = paths.position[gold_ids]
    outcomes.add(np.arange(len(gold_ids)), numbers, numbers + 1, gold)
    owner, start, stop, logprob = (
        np.concatenate(v) for v in (outcomes.owner, outcomes.start, outcomes.stop, outcomes.logprob)
    )
    return _disjoint(owner, start, stop, np.exp(logprob), len(gold_ids), len(paths.position))


def _follow(
    paths: PiecePaths, rows: SoftTargets, starts: Starts, temperature: float, outcomes: _Outcomes
) -> np.ndarray:
    """Collect the outcomes along the rows; returns the log-probability `[P]` of each position's own token."""
    gold_piece = paths.piece[rows.gold_ids]
    row, node = starts.first.copy(), np.zeros(len(starts.first), dtype=np.int64)
    scale, length = np.zeros(len(row)), np.zeros(len(row), dtype=np.int64)
    size, live = paths.token_bytes[starts.token], np.arange(len(row))
    reading = starts.reading
    least = -np.inf
    kept = _Kept.of(paths, rows, temperature)
    gold_logprob = kept.of_gold(gold_piece, _gold_logprob(rows, temperature))
    ruled_out = _ruled_out(paths, kept, starts, gold_piece)
    scale -= np.log(np.maximum(1 - (np.exp(kept.logprob[starts.first]) * ruled_out).sum(axis=1), LEAST))
    while len(live):
        here = row[live]
        read = reading[live]
        on_path = live[node[live] >= 0]
        owner, piece, logprob = kept.others(row[on_path], gold_piece, scale[on_path], least, ruled_out[on_path])
        chosen = on_path[owner]
        outcomes.add(starts.position[chosen], *paths.ranges(node[chosen], piece, reading[chosen]), logprob)
        scale[live] += gold_logprob[here]
        length[live] += paths.piece_bytes[rows.gold_ids[here]] + np.choose(read, [0, -1, 1])
        node[live] = paths.child(node[live], gold_piece[here], read)
        row[live] += 1
        live = live[(length[live] < size[live]) & (row[live] < starts.stop[live])]
        reading, least, ruled_out = np.full(len(row), AS_IT_IS), math.log(LEAST), np.zeros((len(row), 1), dtype=bool)
    # the token ends with the piece, and the student has longer ones that begin like it
    at = np.maximum(node, 0)
    longer = (node > 0) & (length == size) & (starts.after >= 0) & (paths.stops[at] - paths.starts[at] > 1)
    going_on = np.flatnonzero(longer)
    owner, piece, logprob = kept.others(starts.after[going_on], gold_piece, scale[going_on], least, ruled_out[going_on])
    chosen = going_on[owner]
    below = paths.child(node[chosen], piece)
    taken = below >= 0
    chosen, below, logprob = chosen[taken], below[taken], logprob[taken]
    outcomes.add(starts.position[chosen], paths.starts[below], paths.stops[below], logprob)
    used = np.bincount(chosen, weights=np.exp(logprob), minlength=len(row))
    return np.log(np.maximum(np.exp(scale) - used, LEAST * np.exp(scale)))


def _ruled_out(paths: PiecePaths, kept: _Kept, starts: Starts, gold_piece: np.ndarray) -> np.ndarray:
    """`[P, K]` whether the student's token before would be a longer one if this kept piece of the first row came.

    Where the piece that came is one of them, its tokenizer does not join the two, and nothing is ruled out.
    """
    node = np.where(starts.before >= 0, paths.node[starts.before], -1)
    longer = paths.child(node[:, None], kept.piece[starts.first]) >= 0
    return np.asarray(longer & (paths.child(node, gold_piece[starts.first]) < 0)[:, None])


def _gold_logprob(rows: SoftTargets, temperature: float) -> np.ndarray:
    """`[R]` log-probability of the piece that came, as it is stored beside the kept ones."""
    gold = rows.gold_logprob.astype(np.float64)
    if temperature == 1.0:
        return gold
    at_one, at_t = (rows.log_z[:, rows.grid_index(t)].astype(np.float64) for t in (1.0, temperature))
    return np.asarray((gold + at_one) / temperature - at_t)


@dataclass(frozen=True)
class _Kept:
    """The kept pieces of every row."""

    piece: np.ndarray
    """[R, K] numbers as in `PiecePaths.piece`; -1 for what is no text."""
    logprob: np.ndarray
    """[R, K]; -inf where a row keeps less."""

    @classmethod
    def of(cls, paths: PiecePaths, rows: SoftTargets, temperature: float) -> _Kept:
        assert rows.token_ids is not None
        logprob = rows.padded(rows.logprobs_at(temperature), -np.inf)
        return cls(paths.piece[rows.padded(rows.token_ids)], logprob)

    def of_gold(self, gold_piece: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """`[R]` log-probability of the piece that came: the kept one, which has more digits than the `stored` one."""
        mass = (np.exp(self.logprob) * ((self.piece == gold_piece[:, None]) & (self.piece >= 0))).sum(axis=1)
        return np.asarray(np.where(mass > 0, np.log(np.maximum(mass, np.finfo(mass.dtype).tiny)), stored))

    def others(
        self,
        rows: np.ndarray,
        gold_piece: np.ndarray,
        scale: np.ndarray,
        least: float,
        left_out: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept pieces of `rows [A]` that did not come: the row of each (0..A-1), its number, its log-probability times `scale`."""
        logprob = self.logprob[rows] + scale[:, None]
        piece = self.piece[rows]
        wanted = (piece != gold_piece[rows][:, None]) & (piece >= 0) & (logprob > least)
        wanted &= ~left_out
        owner, column = np.nonzero(wanted)
        return owner, piece[owner, column], logprob[owner, column]


def _disjoint(
    owner: np.ndarray, start: np.ndarray, stop: np.ndarray, mass: np.ndarray, count: int, width: int
) -> dict[str, np.ndarray]:
    """Outcomes in order; of ranges that lie in one another the widest stays, with the mass of all."""
    begin, end = owner * (width + 1) + start, owner * (width + 1) + stop
    order = np.lexsort((-end, begin))
    begin, end = begin[order], end[order]
    reached = np.maximum.accumulate(np.concatenate([[-1], end[:-1]]))
    first = np.flatnonzero(begin >= reached)
    total = np.add.reduceat(mass[order], first)
    owner, chosen = owner[order][first], order[first]
    kept = np.bincount(owner, minlength=count)
    rest = 1.0 - np.bincount(owner, weights=total, minlength=count)
    return {
        "range_starts": start[chosen].astype(np.int32),
        "range_stops": stop[chosen].astype(np.int32),
        "logprobs": np.log(total).astype(np.float32),
        "kept": kept,
        "tail_mass": np.maximum(rest, 0.0).astype(np.float32),
    }
