"""Two caches of one text: where their teachers disagree most.

Rows are compared where both caches have the same example: the same tokens before each row, and the same token in its place. The
divergence is that of Jensen and Shannon over the tokens that both keep, and everything else as one more outcome:

    ½ KL(p || m) + ½ KL(q || m)        m = (p + q) / 2        nats, from 0 to ln 2, the same in both directions

Merging outcomes never raises it, so it is a lower bound of the divergence of the whole rows (Lin 1991). Teachers with different
tokenizers are refused: their rows are distributions over other tokens, even where both texts have a border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kd.cache_builder.look.find_rows import ROWS_AT_ONCE, FoundRow
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.cache_identity import without_text_rules
from kd.cache_builder.store.records.part import part_of
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.errors import CacheError, CacheMismatchError
from kd.common.progress import Progress


@dataclass(frozen=True)
class Disagreement:
    """Where two teachers differ."""

    rows: tuple[FoundRow, ...]
    """The rows that differ most, by their place in the first cache."""
    partners: dict[int, int]
    """Example of the first cache -> the same one of the second, for those rows."""
    mean: float
    """Mean divergence of all rows that both have, in nats."""
    compared: int
    """Rows that both have."""
    left_out: int
    """Rows of the first cache whose example the second one does not have."""


def divergences(ours: SoftTargets, theirs: SoftTargets) -> np.ndarray:
    """`[N]` float64 nats: the divergence of the rows, see above. Both keep ids, and the tail is known."""
    (keys_p, log_p), (keys_q, log_q) = (_entries(targets) for targets in (ours, theirs))
    _, at_p, at_q = np.intersect1d(keys_p, keys_q, assume_unique=True, return_indices=True)
    rows = keys_p[at_p] >> 32
    p, q = np.exp(log_p[at_p]), np.exp(log_q[at_q])
    count = len(ours)
    terms = np.bincount(rows, weights=_half(p, q), minlength=count)
    rest_p, rest_q = (np.maximum(0.0, 1.0 - np.bincount(rows, weights=x, minlength=count)) for x in (p, q))
    return np.asarray(np.clip(terms + _half(rest_p, rest_q), 0.0, np.log(2)))


def _half(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """`½ p ln(p / m) + ½ q ln(q / m)` of each outcome; 0 where neither has mass."""
    m = np.where(p + q > 0, (p + q) / 2, 1.0)
    return np.asarray(sum(0.5 * x * np.log(np.where(x > 0, x, m) / m) for x in (p, q)))


def _entries(targets: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """Row and id of each kept token as one number, and its log-probability at temperature 1."""
    assert targets.token_ids is not None
    kept = np.full(len(targets), targets.token_ids.shape[-1]) if targets.kept is None else targets.kept
    keys = (np.repeat(np.arange(len(targets)), kept) << 32) | targets.token_ids.reshape(-1).astype(np.int64)
    return keys, targets.logprobs_at(1.0).reshape(-1)


def disagreement(
    ours: CacheReader, theirs: CacheReader, count: int, example: int | None = None
) -> Iterator[Progress[Disagreement]]:
    """The `count` rows of `ours`, or of one example of it, that differ most from `theirs`; the last record carries them.

    Raises CacheMismatchError for different tokenizers and for caches that share no example, CacheError for caches without ids.
    """
    refuse_incomparable(ours, theirs)
    numbers = _by_digest(theirs)
    shards = ours.shards if example is None else [int(np.searchsorted(_starts(ours), example, side="right")) - 1]
    total = sum(ours.manifest.shards[shard][2] for shard in shards)
    left, right = (_head_reader(reader) for reader in (ours, theirs))
    best, sums, compared, left_out, partners = list[FoundRow](), 0.0, 0, 0, dict[int, int]()
    yield Progress(0, total)
    for shard in shards:
        table = ours.example_table(shard, ["tokens_digest"])
        first, stop, _ = ours.manifest.shards[shard]
        _, lengths = ours.lengths(first, stop)
        wanted = [i for i in range(len(lengths)) if example is None or first + i == example]
        shared = [i for i in wanted if table["tokens_digest"][i] in numbers]
        left_out += int(lengths[wanted].sum() - lengths[shared].sum())
        for part in _parts(shared, lengths):
            mine, other = [first + i for i in part], [numbers[table["tokens_digest"][i]] for i in part]
            values = divergences(left.read_rows(mine), right.read_rows(other))
            starts = np.concatenate([[0], np.cumsum(lengths[part])])
            rows = np.argsort(-values, kind="stable")[:count]
            indices = np.searchsorted(starts, rows, side="right") - 1
            candidates = [
                FoundRow(mine[index], int(row - starts[index]), float(values[row]))
                for row, index in zip(rows, indices, strict=True)
            ]
            partners |= dict(zip(mine, other, strict=True))
            best = sorted([*best, *candidates], key=lambda one: -one.nats)[:count]
            partners = {one.example: partners[one.example] for one in best}
            sums, compared = sums + float(values.sum()), compared + len(values)
            yield Progress(min(compared + left_out, total), total)
    if not compared:
        raise CacheMismatchError(
            "these caches share no example",
            cache=ours.root,
            compared_with=theirs.root,
            expected="two caches of one text, cut into the same blocks",
        )
    yield Progress(total, total, Disagreement(tuple(best), partners, sums / compared, compared, left_out))


def refuse_incomparable(ours: CacheReader, theirs: CacheReader) -> None:
    """Raise CacheMismatchError for different tokenizers, CacheError for a cache whose rows name no tokens or have no tail."""
    for reader in (ours, theirs):
        names = {a.name for a in reader.manifest.arrays}
        if not {"token_ids", "logprobs"} <= names or reader.manifest.tail_unknown:
            without = "the probability beyond the kept tokens" if reader.manifest.tail_unknown else "ids of kept tokens"
            raise CacheError(
                "this cache cannot be compared token by token",
                cache=reader.root,
                found=f"profile {reader.config.profile}, without {without}",
                expected="a cache of profile kl, compact, adaptive or full, whose tail is known",
            )
    a, b = (without_text_rules(reader.manifest.identity)["tokenizer"] for reader in (ours, theirs))
    if a != b or ours.manifest.vocabulary_size != theirs.manifest.vocabulary_size:
        raise CacheMismatchError(
            "these teachers have different tokenizers",
            cache=ours.root,
            compared_with=theirs.root,
            found="rows that are distributions over other tokens",
            expected="two teachers of one tokenizer",
            try_="kd eval --tasks perplexity on both teachers, which is comparable per byte",
        )


def _head_reader(reader: CacheReader) -> CacheReader:
    heads = CacheReader(reader.files, top_k=reader.top_k, window=2)
    heads.keep(part_of(reader.manifest, arrays=["token_ids", "logprobs"]).arrays)
    return heads


def _starts(reader: CacheReader) -> list[int]:
    return [first for first, _, _ in reader.manifest.shards]


def _by_digest(reader: CacheReader) -> dict[bytes, int]:
    """Digest of an example's tokens -> its number; of equal examples the first."""
    numbers: dict[bytes, int] = {}
    for shard in reader.shards:
        for i, digest in enumerate(reader.example_table(shard, ["tokens_digest"])["tokens_digest"]):
            numbers.setdefault(digest, reader.manifest.shards[shard][0] + i)
    return numbers


def _parts(examples: list[int], lengths: np.ndarray) -> Iterator[list[int]]:
    """Consecutive examples of at most `ROWS_AT_ONCE` rows together, or one that is longer."""
    part, rows = list[int](), 0
    for one in examples:
        if part and rows + lengths[one] > ROWS_AT_ONCE:
            yield part
            part, rows = [], 0
        part.append(one)
        rows += int(lengths[one])
    if part:
        yield part
