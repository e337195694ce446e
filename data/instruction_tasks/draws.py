"""Seeded choices that depend on (seed, ids) alone, and which rows a limit keeps.

A limit keeps the first rows, as the reference systems do, so that a larger limit adds rows at the end. Where rows lie in the order
of their labels, the first ones may all have one answer: those of ANLI's third round lie in blocks of 35, and the first 30 are all
entailments. Then as many rows are drawn, by a digest of (seed, id), and stay in their order; a larger limit keeps all of them too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

ENOUGH = 16
"""Expected changes of label between neighbours from which on half of them cannot be chance (1 in 10,000 at most)."""

TENTH = 0.1
"""How far the share of a label among the first rows may be from its share among all."""


def keyed(seed: int, *parts: str | int) -> int:
    """A 256-bit number that depends only on the seed and the parts."""
    digest = hashlib.blake2b(digest_size=32, key=str(seed).encode()[:64])
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def in_label_order(labels: Sequence[Hashable]) -> bool:
    """Whether rows lie in the order of their labels, or in long blocks of one label.

    True where each of several labels is one block of at least two rows on average, or where a row has another label than the one
    before it less than half as often as in a shuffled order: (n - 1) (1 - Σ p²) times.
    """
    counts, n = Counter(labels), len(labels)
    if len(counts) < 2 or n < 2 * len(counts):
        return False
    changes = sum(a != b for a, b in pairwise(labels))
    expected = (n - 1) * (1 - sum(c * c for c in counts.values()) / n**2)
    return changes < len(counts) or (expected >= ENOUGH and changes < expected / 2)


def first_rows_are_unlike(labels: Sequence[Hashable], limit: int) -> bool:
    """Whether rows lie in label order and among the first `limit` a label is missing or its share is off by a tenth."""
    if limit >= len(labels) or not in_label_order(labels):
        return False
    of_all, of_first = Counter(labels), Counter(labels[:limit])
    shares = ((of_first[label] / limit, count / len(labels)) for label, count in of_all.items())
    return any(first == 0 or abs(first - share) > TENTH for first, share in shares)


def drawing_order(ids: Sequence[str], seed: int) -> list[int]:
    """Numbers of the rows in the order in which they are drawn."""
    return sorted(range(len(ids)), key=lambda i: (keyed(seed, "limit", ids[i]), i))


def kept_rows(labels: Sequence[Hashable], ids: Sequence[str], limit: int, seed: int = 0) -> list[int]:
    """Numbers of the rows that a limit keeps, ascending: the first, or drawn ones where the first are unlike the others."""
    if not first_rows_are_unlike(labels, limit):
        return list(range(min(limit, len(ids))))
    return sorted(drawing_order(ids, seed)[:limit])
