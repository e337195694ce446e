"""How many bits the ids of a row's kept tokens need, by what a decoder knows, and how many are stored.

    python benchmarks/ids.py --teacher teacher --data wiki.valid.tokens --limit 16        # teacher: train_teacher.py, 4,110 steps
    python benchmarks/ids.py --teacher demo --data demo:heldout --limit 24

The teacher scores the text once, 256 tokens a row. The first table has bits per id, for rows of a fixed length and for rows above
a probability. `order 0` and `by place` are entropies of the rows themselves. `other rows` and `token before` are learned from two
thirds of the rows and paid for on the last third, so no table is free of charge there: an id costs the logarithm of its share of
what is not yet listed in its row; what follows a token before is mixed with what all rows hold. `stored` is what blosc (zstd, bytes
shuffled, chunks of 4,096 rows, one shard) makes of codes by frequency, and of places in lists of followers, the lists counted.

`order` is what the order by probability is worth: log2(k!) / k bits per id. A set alone would need so much less, but its values
would then need it to be put in order again.

The second table has what a value may cost: its bits in steps of `graded` at several densities, and the error that rounding adds, as
RMS(p - p decoded) / RMS(p - q), with q the mean of the rows: about the gradient of a student that knows no context yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import lgamma, log
from typing import Any

import numpy as np
from numcodecs import blosc
from sizes import parser_of, plan_of, score

from kd.cache_builder.store.encoding.logprob_codecs import Graded
from kd.cache_builder.store.followers import follower_pairs, keys_of, to_places
from kd.cache_builder.store.ragged import columns_of_entries, offsets_of, row_steps, row_totals
from kd.cache_builder.store.targets import TargetConfig

WIDEST, CHUNK, SHARD = 256, 4096, 32768
RULES = (64, 16, 0.01, 0.003, 0.0015)
"""Tokens of every row, or the least probability of a kept token."""
DENSITIES = (46, 20, 14, 10, 7)
"""Steps per nat of `graded` near the top; 46 is graded, 20 is graded-coarse."""


def entropy(values: np.ndarray) -> float:
    """Bits per value, were each coded by its own frequency."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def entropy_by(values: np.ndarray, groups: np.ndarray) -> float:
    """The same, with frequencies of each group."""
    parts = [values[groups == group] for group in np.unique(groups)]
    return sum(entropy(part) * len(part) for part in parts) / len(values)


def packed_bits(values: np.ndarray, kept: np.ndarray, shuffle: int = blosc.SHUFFLE) -> float:
    """Bits per entry after compression in chunks of rows."""
    offsets = offsets_of(kept)
    size = 0
    for first in range(0, len(kept), CHUNK):
        part = values[offsets[first] : offsets[min(first + CHUNK, len(kept))]]
        size += len(blosc.compress(np.ascontiguousarray(part), b"zstd", 5, shuffle))
    return 8 * size / len(values)


def bits_after(keys: np.ndarray, codes: np.ndarray, kept: np.ndarray, size: int, context: bool) -> float:
    """Bits per id of the last third of the rows, by what the other rows hold: of all rows, or of those of each token before."""
    split = 2 * len(kept) // 3
    edge = int(kept[:split].sum())
    counts = np.bincount(codes[:edge], minlength=size) + 1e-3
    share = counts / counts.sum()
    wanted = keys * size + codes
    p = share[codes[edge:]]
    if context:
        pairs, often = np.unique(wanted[:edge], return_counts=True)
        at = np.minimum(np.searchsorted(pairs, wanted[edge:]), len(pairs) - 1)
        here = np.where(pairs[at] == wanted[edge:], often[at], 0)
        whole = np.bincount(keys[:edge], minlength=size)[keys[edge:]]
        p = (here + 30 * p) / (whole + 30)
    gone = row_totals(p, kept[split:]) - p
    return float(-np.log2(p / np.maximum(1 - gone, 1e-9)).mean())


def bits_from_row_before(codes: np.ndarray, kept: np.ndarray, size: int) -> float:
    """Bits per id where a flag says whether the row before holds it: its place there, or its frequency among the others."""
    rows = np.repeat(np.arange(len(kept)), kept)
    held = (rows + 1) * size + codes
    order = np.argsort(held)
    at = np.minimum(np.searchsorted(held, rows * size + codes, sorter=order), len(held) - 1)
    again = held[order[at]] == rows * size + codes
    places = columns_of_entries(kept)[order[at]]
    share = float(again.mean())
    inside = share * entropy_by(places[again], np.minimum(columns_of_entries(kept)[again], 32)) if share else 0.0
    return entropy(again) + inside + (1 - share) * entropy(codes[~again])


def lines(raw: dict[str, Any], rule: float) -> Iterator[str]:
    """The rows of both tables for one rule."""
    p = np.exp(raw["relative"] - raw["log_z"])
    kept = (p >= rule).sum(1).clip(1) if rule < 1 else np.full(len(p), int(rule))
    inside = np.arange(p.shape[1]) < kept[:, None]
    codes, gold, size = raw["codes"][raw["ids"][inside]].astype(np.int64), raw["codes"][raw["gold"]], raw["size"]
    keys = np.repeat(keys_of(gold), kept)
    order = sum(lgamma(k + 1) for k in kept) / log(2) / len(codes)
    shard = slice(0, min(SHARD, len(kept)))
    mine = slice(0, int(kept[shard].sum()))
    pairs = follower_pairs(keys[mine], codes[mine], len(kept[shard]))
    places = to_places(keys[mine], codes[mine], pairs).astype(np.uint16)
    table = len(blosc.compress(np.ascontiguousarray(pairs.T.astype(np.uint16)), b"zstd", 8, blosc.SHUFFLE))
    stored = packed_bits(codes[mine].astype(np.uint16), kept[shard])
    lists = packed_bits(places, kept[shard]) + 8 * table / len(places)
    name = f"p >= {rule:g}" if rule < 1 else f"k = {rule:g}"
    columns = (
        entropy(codes),
        entropy_by(codes, np.minimum(columns_of_entries(kept), 64)),
        bits_after(keys, codes, kept, size, context=False),
        bits_after(keys, codes, kept, size, context=True),
        bits_from_row_before(codes, kept, size),
        order,
    )
    yield (
        f"| {name} | {kept.mean():.1f} | {np.log2(size):.1f} | "
        + " | ".join(f"{b:.2f}" for b in columns)
        + (f" | {stored:.2f} | **{lists:.2f}** | {stored * kept.mean() / 8:.1f} | {lists * kept.mean() / 8:.1f} |")
    )
    mean = np.bincount(raw["ids"].ravel(), weights=p.ravel(), minlength=size) / len(p)
    dense = np.sqrt((p**2).sum() - 2 * (p * mean[raw["ids"]]).sum() + len(p) * (mean**2).sum())
    cells = []
    for density in DENSITIES:
        codec = Graded(1 / density)
        flat = raw["relative"][inside][:, None]
        stored_values = codec.encode(flat)
        decoded = codec.decode(stored_values)[:, 0].astype(np.float64)
        steps = row_steps(stored_values["logprobs"][:, 0].astype(np.uint8), kept)
        mass = np.add.reduceat(p[inside], offsets_of(kept)[:-1])
        weights = np.exp(decoded)
        q = weights * np.repeat(mass / np.add.reduceat(weights, offsets_of(kept)[:-1]), kept)
        added = np.sqrt(((p[inside] - q) ** 2).sum()) / dense
        bits = packed_bits(steps[mine], kept[shard], blosc.BITSHUFFLE)
        cells.append(f"{bits:.2f}, {entropy(steps):.2f}, {added:.4f}")
    yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = parser_of(__doc__)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.work:
        plan = plan_of(args, TargetConfig(top_k=WIDEST))
        shards = score(plan)
    names = {"ids": "token_ids", "relative": "relative", "log_z": "log_z", "gold": "gold_ids"}
    raw: dict[str, Any] = {n: np.concatenate([getattr(s, name) for s in shards]) for n, name in names.items()}
    raw |= {"log_z": raw["log_z"][:, :1], "codes": plan.codes, "size": plan.manifest.vocabulary_size}
    ids, values = zip(*(lines(raw, rule) for rule in RULES), strict=True)
    print(f"{len(raw['ids']):,} rows\n\nbits per id; the last two columns are bytes per row\n")
    print(
        "| rule | tokens | nothing known | order 0 | by place | other rows | token before | row before | order |",
        end="",
    )
    print(" stored: frequency | followers | B | B |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(ids))
    print("\nvalues: bits stored, bits at order 0, error added\n")
    print("| rule | " + " | ".join(f"1/{d}" for d in DENSITIES) + " |\n|---|" + "---|" * len(DENSITIES))
    print("\n".join(values))


if __name__ == "__main__":
    main()
