"""Ids in fewer bytes: each shard lists which tokens often follow which, and stores an id as its place in such a list.

What a teacher expects depends on the token just read more than on anything else. So a shard holds pairs (token before, token that
the teacher expects), those of one token before together and the most frequent first. The *key* of a row is the token of the text in
the row before it. A value below LISTED is a place in the list of the row's key; any other is the id's own code plus LISTED.

Measured (benchmarks/ids.py): 17 to 25 % of the ids' bytes less with GPT-2's vocabulary, 7 to 15 % with one of 2,048 ids, the lists
counted. A list is made of
the shard's own rows. So a shard can be written without any other, whoever builds it, and each can be decoded alone.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FOLLOWERS = "followers"
"""Name of the array with the pairs: `[rows, 2]` codes of the token before and of the token that is expected."""
LISTED = 256
"""Most ids in a list: a place fits into a byte, and the other byte of a value is then zero."""
WORTH = 4
"""Rows of a key in which an id must be kept to be listed. Each pair takes some 11 bits, and saves about 3 in every row."""


def keys_of(gold_codes: np.ndarray) -> np.ndarray:
    """`[N]` int64 key of each row of a shard: the code of the text's token in the row before; 0 for the first row."""
    return np.concatenate([np.zeros(min(1, len(gold_codes)), dtype=np.int64), gold_codes[:-1].astype(np.int64)])


def per_entry(values: np.ndarray, entries: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """One value per row for each of its entries: `entries` are `[N, K]`, or `[E]` with `kept [N]` of each row."""
    return np.broadcast_to(values[:, None], entries.shape) if kept is None else np.repeat(values, kept)


def follower_pairs(keys: np.ndarray, codes: np.ndarray, rows: int) -> np.ndarray:
    """`[rows, 2]` int64 the pairs that are worth listing, by key, the most frequent first; then zeros.

    keys, codes   int64 of equal shape: key and code of every kept token
    rows          rows of the shard, and so the most pairs there may be; the most frequent are taken
    """
    base = 1 + int(max(keys.max(initial=0), codes.max(initial=0)))
    pairs, counts = np.unique(keys * base + codes, return_counts=True)
    often = np.flatnonzero(counts >= WORTH)
    often = often[np.argsort(-counts[often], kind="stable")][:rows]  # of equal counts, the lower pair
    chosen = pairs[often[np.argsort(pairs[often] // base, kind="stable")]]
    chosen = chosen[_places(chosen // base) < LISTED]
    listed = np.zeros((rows, 2), dtype=np.int64)
    listed[: len(chosen)] = np.stack(np.divmod(chosen, base), axis=1)
    return listed


def _places(keys: np.ndarray) -> np.ndarray:
    """How many equal keys stand before each one, where equal keys stand together."""
    _, starts, counts = np.unique(keys, return_index=True, return_counts=True)
    return np.arange(len(keys)) - np.repeat(starts, counts)


def to_places(keys: np.ndarray, codes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Codes of kept tokens as they are stored: places in the lists of `pairs`, or codes from LISTED on; shapes as above."""
    base = 1 + int(max(keys.max(initial=0), codes.max(initial=0), pairs.max(initial=0)))
    listed, first = np.unique(pairs[:, 0] * base + pairs[:, 1], return_index=True)  # zeros at the end repeat one pair
    _, starts, of_key = np.unique(pairs[:, 0], return_index=True, return_inverse=True)
    at_place = (first - starts[of_key[first]]) if len(pairs) else first
    wanted = keys * base + codes
    at = np.minimum(np.searchsorted(listed, wanted), max(len(listed) - 1, 0))
    is_listed = (listed[at] == wanted) & (at_place[at] < LISTED)
    return np.where(is_listed, at_place[at], codes + LISTED)


def from_places(
    values: np.ndarray, keys: np.ndarray, pairs: np.ndarray, ids: np.ndarray, kept: np.ndarray | None = None
) -> np.ndarray:
    """The inverse of `to_places`, in ids: `values [N, K]`, or `[E]` with `kept [N]`; `keys [N]`; `ids [V]` of every code.

    Raises IndexError for a code beyond the table.
    """
    begins, first = np.unique(pairs[:, 0], return_index=True)
    starts = np.zeros(len(ids), dtype=np.int32)
    starts[begins] = first
    numbers = values.astype(np.int32 if values.dtype.itemsize < 4 else np.int64)  # neither can overflow
    offset = np.where(values < LISTED, per_entry(starts[keys], values, kept), np.int32(len(pairs) - LISTED))
    numbers = np.add(numbers, offset, out=numbers)
    table = np.concatenate([ids[pairs[:, 1]], ids])
    if numbers.size and numbers.max() >= len(table):
        raise IndexError(f"code {values.max()} of {len(ids)}")
    # Arrow uses the indices as they are, numpy converts them to int64 first
    taken = pc.take(pa.array(table), pa.array(numbers.reshape(-1)), boundscheck=False).to_numpy()
    return taken.reshape(values.shape)  # type: ignore[no-any-return]
