"""`TokenView`: what a cache says of one token of a text, ready to be shown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.readers.shaded_text import token_texts
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.row_figures import beyond_kept, entropy_bounds
from kd.cache_builder.store.soft_targets import SoftTargets


@dataclass(frozen=True)
class Candidate:
    """One token that the teacher kept or drew in a row."""

    id: int | None
    """None where the cache holds no ids."""
    text: str | None
    """What the id stands for; bytes that are no whole characters are spelled `\\xNN`."""
    probability: float | None
    """At temperature 1; None for a draw."""
    draws: int | None = None
    """How often it was drawn; None for a kept token."""

    @property
    def document(self) -> dict[str, Any]:
        """The values that there are."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TokenView:
    """One token of the text, and what the teacher said in its place."""

    number: int
    """Number of the token in its example, from 0."""
    text: str
    """The characters of the text that it ends, without secrets."""
    id: int
    piece: str
    """What the id stands for."""
    entropy_at_least: float | None
    """Nats, at temperature 1; None where the arrays that tell it are not here."""
    entropy_at_most: float | None
    """None where nobody knows what lies beyond the kept tokens."""
    logprob: float
    """Log-probability of the token that is there, at temperature 1, in nats."""
    rank: int
    """Rank of the token that is there; 1 is the most probable."""
    is_bound: bool
    """True where the log-probability is an upper bound and the rank a lower one."""
    kept: int | None
    """Tokens that the row keeps."""
    tail_mass: dict[str, float] | None
    """Temperature -> probability beyond the kept tokens; None where nobody knows it, or where none are kept."""
    top: Sequence[Candidate]
    """The most probable kept tokens, as many as were asked for."""
    draws: Sequence[Candidate]

    @property
    def probability(self) -> float:
        """Of the token that is there, at temperature 1."""
        return float(np.exp(self.logprob))

    @property
    def document(self) -> dict[str, Any]:
        """As `kd cache show --json` prints it."""
        lists = {name: [one.document for one in getattr(self, name)] for name in ("top", "draws")}
        return {"token": self.number, "probability": self.probability} | {
            name: lists.get(name, value) for name, value in vars(self).items() if name != "number"
        }


def token_views(
    example: CachedExample,
    manifest: CacheManifest,
    vocabulary: Sequence[bytes],
    top: int,
    rows: Collection[int] | None = None,
) -> list[TokenView]:
    """The tokens of an example, or those of `rows` alone, with at most `top` candidates each."""
    targets = example.targets
    bounds = _entropies(targets, manifest)
    words = token_texts(example.target, targets.byte_end)
    bounded = _bounded_gold(targets, manifest)
    kept = _kept_counts(targets)
    tails = _tails(targets, manifest)
    return [
        TokenView(
            number=row,
            text=words[row],
            id=int(targets.gold_ids[row]),
            piece=piece_text(vocabulary, int(targets.gold_ids[row])),
            entropy_at_least=None if bounds is None else float(bounds[0][row]),
            entropy_at_most=None if bounds is None or manifest.tail_unknown else float(bounds[1][row]),
            logprob=float(targets.gold_logprob[row]),
            rank=int(targets.gold_rank[row]) + 1,
            is_bound=bool(bounded[row]),
            kept=None if kept is None else int(kept[row]),
            tail_mass=None if tails is None else {name: float(mass[row]) for name, mass in tails.items()},
            top=_top(targets, row, top, vocabulary),
            draws=_draws(targets, row, vocabulary),
        )
        for row in (range(len(targets)) if rows is None else sorted(rows))
    ]


def piece_text(vocabulary: Sequence[bytes], index: int) -> str:
    """What an id stands for, as text; an id that no piece belongs to is named by its number."""
    piece = vocabulary[index] if index < len(vocabulary) else b""
    return piece.decode("utf-8", "backslashreplace") if piece else f"<id {index}>"


def has_entropy(targets: SoftTargets) -> bool:
    """Whether the arrays that tell the entropy were read."""
    return targets.logprobs is not None or bool(targets.temperatures)


def _entropies(targets: SoftTargets, manifest: CacheManifest) -> tuple[np.ndarray, np.ndarray] | None:
    return entropy_bounds(targets, manifest.vocabulary_size) if has_entropy(targets) else None


def _bounded_gold(targets: SoftTargets, manifest: CacheManifest) -> np.ndarray:
    if not manifest.gold_in_top_k:
        return np.zeros(len(targets), dtype=bool)
    return beyond_kept(targets)


def _kept_counts(targets: SoftTargets) -> np.ndarray | None:
    if targets.kept is not None:
        return targets.kept
    return None if targets.logprobs is None else np.full(len(targets), targets.logprobs.shape[1])


def _tails(targets: SoftTargets, manifest: CacheManifest) -> dict[str, np.ndarray] | None:
    if targets.logprobs is None or manifest.tail_unknown:
        return None
    return {f"{t:g}": targets.tail_mass_at(t) for t in targets.temperatures}


def _top(targets: SoftTargets, row: int, top: int, vocabulary: Sequence[bytes]) -> list[Candidate]:
    if targets.logprobs is None:
        return []
    ids = None if targets.token_ids is None else _of_row(targets, targets.token_ids, row)[:top]
    probabilities = np.exp(_of_row(targets, targets.logprobs, row)[:top].astype(np.float64))
    return [
        Candidate(
            None if ids is None else int(ids[rank]),
            None if ids is None else piece_text(vocabulary, int(ids[rank])),
            float(probability),
        )
        for rank, probability in enumerate(probabilities)
    ]


def _of_row(targets: SoftTargets, values: np.ndarray, row: int) -> np.ndarray:
    if targets.kept is None:
        return np.asarray(values[row])
    return values[targets.offsets[row] : targets.offsets[row + 1]]


def _draws(targets: SoftTargets, row: int, vocabulary: Sequence[bytes]) -> list[Candidate]:
    if targets.tail_ids is not None and targets.tail_draws is not None:
        drawn_ids, counts = np.unique(targets.tail_ids[row, : targets.tail_draws[row]], return_counts=True)
        return [
            Candidate(int(i), piece_text(vocabulary, int(i)), None, int(n))
            for i, n in zip(drawn_ids, counts, strict=True)
        ]
    if targets.sample_ids is None or targets.sample_counts is None:
        return []
    drawn = [
        (int(i), int(n)) for i, n in zip(targets.sample_ids[row], targets.sample_counts[row], strict=True) if n > 0
    ]
    return [Candidate(i, piece_text(vocabulary, i), None, n) for i, n in drawn]
