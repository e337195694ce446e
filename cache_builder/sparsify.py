"""From a teacher's logits to what is kept of them, a few rows at a time, on the teacher's device.

Everything is taken from one chunk `[n, V]` of float32 logits: top-k on the raw logits, one log-normaliser per
temperature, gold log-probability and rank, seeded draws, rank bands. No log_softmax over the vocabulary is formed. On a
CPU the chunk is worked through in blocks of rows that stay in the cache from the first pass to the last, the top-k are
found by a threshold, and numpy's exp is taken: half of the time of whole-chunk passes, torch's exp and `torch.topk`
(docs/log.md). Several threads take whole blocks each: what torch shares out within every pass waits for the slowest
thread at each, which on a machine with other work costs more than the passes.

Where temperatures double (1, 2, 4), exp(x/2) is squared into exp(x): one pass of exp serves the whole grid.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kd.cache_builder.targets import PROFILES, TargetConfig, band_edges

LOG_MASS_FLOOR = -60.0
"""Log-mass of an empty rank band: e^-60 is below anything float32 can sum."""
BLOCK_BYTES = 3 * 2**20
"""Logits worked through at once on a CPU: larger blocks leave the caches between passes, below half of it the calls cost
more than the passes (benchmarks/chunks.py)."""
BLOCK_COLUMNS = 64
"""Most columns per block of the vocabulary; fewer where k is large, so that there are 8 k blocks, see `top_k_by_threshold`."""
Uniforms = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Chunk:
    """Kept numbers of n rows, still on the device (shapes as in `RawTargets`)."""

    log_z: torch.Tensor
    gold_logprob: torch.Tensor
    gold_rank: torch.Tensor
    token_ids: torch.Tensor | None = None
    relative: torch.Tensor | None = None
    tail_bands: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    sample_counts: torch.Tensor | None = None
    boundary_logprob: torch.Tensor | None = None
    doubt: torch.Tensor | None = None
    """[n] uint8, of `Sparsifier.marked` alone: 0, TIED or NOT_FINITE"""


TIED, NOT_FINITE = 1, 2
"""Ids of the row may be others than `Sparsifier.__call__` keeps; it would raise NonFiniteRow."""


class NonFiniteRow(Exception):
    """Row `row` of the chunk holds NaN or infinite logits."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(row)


class Sparsifier:
    """Applies one `TargetConfig` to chunks of logits over `vocabulary_size` ids."""

    def __init__(self, config: TargetConfig, vocabulary_size: int, boundary_ids: torch.Tensor | None = None, *,
                 block_rows: int | None = None) -> None:  # fmt: skip
        """`block_rows`: rows worked through at once; None: what stays in a CPU's cache, whole chunks elsewhere."""
        config.check_vocabulary(vocabulary_size)
        self.config = config
        self.edges = band_edges(config.top_k, vocabulary_size, config.tail_bands) if config.tail_bands else []
        self.vocabulary_size = vocabulary_size
        self.boundary_ids = boundary_ids
        self.block_rows = block_rows
        later = bool(self.edges or config.samples or PROFILES[config.profile].boundary)
        doubling = all(high == 2 * low for low, high in pairwise(config.temperatures))
        self._in_place = doubling and not later  # nothing looks at the logits again once they are powers
        self._buffers: list[torch.Tensor] = []
        self._pool: ThreadPoolExecutor | None = None

    def _scratch(self, rows: int, workers: int, device: torch.device) -> list[torch.Tensor]:
        """Of each worker a reused `[1 or 2, rows, V]` float32: fresh memory of this size costs more than the arithmetic in it."""
        shape = (1 if self._in_place else 2, rows, self.vocabulary_size)
        found = self._buffers
        if len(found) < workers or found[0].shape[1] < rows or found[0].device != device:
            with torch.inference_mode(False):
                self._buffers = [torch.empty(shape, device=device) for _ in range(workers)]
        return self._buffers

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, gold_ids: torch.Tensor, uniforms: Uniforms | None = None) -> Chunk:
        """`logits [n, V]` (any float dtype; columns beyond the vocabulary are ignored), `gold_ids [n]`,
        `uniforms [n, R]` in [0, 1) for the draws. Raises NonFiniteRow."""
        logits = logits[:, : self.vocabulary_size]
        whole = len(logits) if logits.device.type != "cpu" else max(1, BLOCK_BYTES // (4 * self.vocabulary_size))
        step = self.block_rows or max(whole, 1)
        starts = range(0, len(logits), step)
        # where bands or draws follow, torch's own threads sort and sum
        workers = 1
        if logits.device.type == "cpu" and self._in_place:
            workers = max(1, min(torch.get_num_threads(), len(starts)))
        scratch = self._scratch(min(step, len(logits)), workers, logits.device)

        def work(worker: int) -> list[Chunk | NonFiniteRow]:
            """Every `workers`-th block, up to one that is not finite."""
            done: list[Chunk | NonFiniteRow] = []
            for start in starts[worker::workers]:
                part = slice(start, start + step)
                drawn = None if uniforms is None else uniforms[part]
                try:
                    with torch.no_grad():
                        done.append(self._block(logits[part].float(), gold_ids[part], drawn, scratch[worker]))
                except NonFiniteRow as error:
                    return [*done, NonFiniteRow(start + error.row)]
            return done

        if workers < 2:
            shares = [work(0)]
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(torch.get_num_threads(), "kd-select")
            shares = list(self._pool.map(work, range(workers)))
        rows = [found.row for share in shares for found in share if isinstance(found, NonFiniteRow)]
        if rows:
            raise NonFiniteRow(min(rows))
        ordered = [shares[i % workers][i // workers] for i in range(len(starts))]
        blocks = [block for block in ordered if isinstance(block, Chunk)]
        if len(blocks) == 1:
            return blocks[0]
        columns: dict[str, list[Any]] = {f.name: [getattr(block, f.name) for block in blocks] for f in fields(Chunk)}
        merged: dict[str, Any] = {n: None if parts[0] is None else torch.cat(parts) for n, parts in columns.items()}
        return Chunk(**merged)

    @torch.no_grad()
    def marked(self, logits: torch.Tensor, gold_ids: torch.Tensor, uniforms: Uniforms | None = None) -> Chunk:
        """The same without a wait for the device: rows that would need one are marked in `doubt`. For a GPU."""
        scratch = self._scratch(len(logits), 1, logits.device)[0]
        return self._block(logits[:, : self.vocabulary_size].float(), gold_ids, uniforms, scratch, marks=True)

    def _block(self, logits: torch.Tensor, gold_ids: torch.Tensor, uniforms: Uniforms | None, scratch: torch.Tensor, *,
               marks: bool = False) -> Chunk:  # fmt: skip
        """`logits [r, V]` float32, `gold_ids [r]`, `uniforms [r, R]`; `scratch [1 or 2, >= r, V]` is written over."""
        config = self.config
        ids = relative = tied = doubt = None
        if config.top_k:
            if marks:
                values, ids, tied = top_k_at_once(logits, config.top_k)
            else:
                values, ids = (top_k_by_threshold if logits.device.type == "cpu" else top_k_by_topk)(
                    logits, config.top_k
                )
            top = values[:, :1]
            relative = values - top
        else:
            top = logits.amax(dim=1, keepdim=True)
        shifted = subtract(logits, top, scratch[0, : len(logits)])
        gold = shifted.gather(1, gold_ids.unsqueeze(1))
        ranks = self._ranks(shifted, gold, relative)
        log_z = self._log_normalisers(shifted, scratch[-1, : len(logits)])
        one = log_z[:, config.temperatures.index(1.0)]
        kept = gold if relative is None else torch.minimum(gold, relative[:, -1:])
        # a kept logit of minus infinity: no stored number can hold it
        bad = ~torch.isfinite(torch.cat([log_z, top, kept], dim=1)).all(dim=1)
        if marks:
            doubt = bad.to(torch.uint8) * NOT_FINITE
            doubt = doubt if tied is None else torch.maximum(doubt, tied.to(torch.uint8) * TIED)
        elif bool(bad.any()):
            raise NonFiniteRow(int(bad.nonzero()[0]))
        bands = self._bands(shifted, log_z) if self.edges else None
        sample_ids = counts = None
        if config.samples:
            assert uniforms is not None
            sample_ids, counts = draw(shifted, uniforms)
        boundary = None
        if PROFILES[config.profile].boundary and self.boundary_ids is not None:
            boundary = shifted.index_select(1, self.boundary_ids).logsumexp(dim=1) - one
            boundary = boundary.clamp(LOG_MASS_FLOOR, 0.0)
        return Chunk(
            log_z=log_z,
            gold_logprob=gold.squeeze(1) - one,
            gold_rank=ranks,
            token_ids=ids if PROFILES[config.profile].ids else None,
            relative=relative,
            tail_bands=bands,
            sample_ids=sample_ids,
            sample_counts=counts,
            boundary_logprob=boundary,
            doubt=doubt,
        )

    def _ranks(self, shifted: torch.Tensor, gold: torch.Tensor, relative: torch.Tensor | None) -> torch.Tensor:
        """`[r]` int64: how many of `shifted [r, V]` are larger than `gold [r, 1]`.

        Where gold is no smaller than the last of the kept logits `relative [r, K]`, those alone have to be looked at.
        """
        if shifted.device.type != "cpu":
            return torch.gt(shifted, gold).sum(dim=1)
        if relative is None:
            ranks, beyond = torch.zeros(len(gold), dtype=torch.long), list(range(len(gold)))
        else:
            ranks = (relative > gold).sum(dim=1)
            beyond = (gold < relative[:, -1:]).squeeze(1).nonzero().squeeze(1).tolist()
        rows, values = shifted.numpy(), gold.numpy()
        for row in beyond:  # numpy counts a row of booleans ten times as fast as torch sums it
            ranks[row] = int(np.count_nonzero(rows[row] > values[row]))
        return ranks

    def _log_normalisers(self, shifted: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
        """`[n, V]` logits with maximum 0 -> `[n, T]`; the sum holds exp(0) = 1, so the logarithm is safe.

        `powers` is written over; it may be `shifted` where temperatures double.
        """
        columns: dict[float, torch.Tensor] = {}
        previous = 0.0
        for temperature in reversed(self.config.temperatures):
            if previous == 2 * temperature:
                square(powers)
            else:
                exp_of_quotient(shifted, temperature, powers)
            columns[temperature] = row_sums(powers).log()
            previous = temperature
        return torch.stack([columns[t] for t in self.config.temperatures], dim=1)

    def _bands(self, shifted: torch.Tensor, log_z: torch.Tensor) -> torch.Tensor:
        """`[n, band temperatures * bands]` log-mass of each rank band beyond k."""
        ordered = shifted.sort(dim=1, descending=True).values
        columns = []
        for temperature in self.config.band_temperatures:
            norm = log_z[:, self.config.temperatures.index(temperature)]
            for low, high in zip(self.edges[:-1], self.edges[1:], strict=True):
                if high <= low:
                    columns.append(torch.full_like(norm, LOG_MASS_FLOOR))
                else:
                    columns.append((ordered[:, low:high] / temperature).logsumexp(dim=1) - norm)
        return torch.stack(columns, dim=1).clamp(min=LOG_MASS_FLOOR)


def subtract(logits: torch.Tensor, top: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`logits [n, V] - top [n, 1]` into `out`."""
    if logits.device.type != "cpu":
        return torch.sub(logits, top, out=out)
    with np.errstate(invalid="ignore"):  # infinity less infinity: such rows are refused by their normalisers
        np.subtract(logits.numpy(), top.numpy(), out=out.numpy())
    return out


def exp_of_quotient(shifted: torch.Tensor, temperature: float, out: torch.Tensor) -> None:
    """`exp(shifted / temperature)` into `out`, which may be `shifted`; all `[n, V]` float32.

    numpy's exp rounds a little worse than torch's and takes half as long on a CPU; what `log_z` is off by does not
    change, as its own rounding weighs more. A quotient by a power of two is a product, exactly.
    """
    if shifted.device.type != "cpu":
        torch.div(shifted, temperature, out=out).exp_()
        return
    x, y = shifted.numpy(), out.numpy()
    if math.frexp(temperature)[0] == 0.5:
        np.multiply(x, np.float32(1 / temperature), out=y)
    else:
        np.divide(x, np.float32(temperature), out=y)
    np.exp(y, out=y)


def square(x: torch.Tensor) -> None:
    """In place."""
    if x.device.type != "cpu":
        x.mul_(x)
    else:
        np.multiply(x.numpy(), x.numpy(), out=x.numpy())


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """`[n, V] -> [n]`; on a CPU of 32 columns a stride apart first: whole vectors, and as accurate as sums by pairs."""
    if x.device.type != "cpu":
        return x.sum(dim=1)
    rows = x.numpy()
    width = rows.shape[1] // 32
    sums = rows[:, : 32 * width].reshape(len(rows), 32, width).sum(axis=1).sum(axis=1)
    return torch.from_numpy(sums + rows[:, 32 * width :].sum(axis=1))


def top_k_by_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids `[n, k]` of the largest of `logits [n, V]`, descending, the lowest id first where logits are equal.

    `torch.topk` leaves the order of equal logits open: rows where one of the first k + 1 equals the next are sorted.
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    values, ids = values[:, :k], ids[:, :k]
    if len(tied):
        ordered = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, ids


def top_k_at_once(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same where nothing may wait for the device, and `tied [n]`: where the k-th logit equals one that is left out.

    Equal logits among the kept are put in order by sorting those alone. Which of several at the k-th place are kept is
    `torch.topk`'s choice, and looking for the lowest ids takes as long as topk itself for every row: such rows are
    told, to be looked at again (docs/log.md).
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, k - 1 : k] == values[:, k : k + 1]).any(dim=1)
    ids, order = ids[:, :k].sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order), tied


def top_k_by_threshold(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a CPU, twice as fast: `logits [n, V]` float32 with contiguous rows -> values, ids `[n, k]`.

    The columns are dealt out to B blocks, column v to block v mod B. The k largest of the B block maxima are k logits of
    the row, so that the k-th of them is at most the row's k-th largest logit; what reaches it (about k * (1 + k / 2B)
    columns) holds the top-k and everything equal to the last of them, and is sorted. Block maxima are one elementwise maximum
    after another over neighbouring columns; blocks of neighbouring columns were slower than `topk` itself.
    """
    n, size = logits.shape
    columns = min(BLOCK_COLUMNS, size // (8 * k))
    if columns < 4:
        return top_k_by_topk(logits, k)
    rows, blocks = logits.numpy(), size // columns
    maxima = rows[:, : blocks * columns].reshape(n, columns, blocks).max(axis=1)
    threshold = torch.from_numpy(maxima).topk(k, dim=1).values[:, -1:].numpy()
    row, ids = np.divmod(np.flatnonzero(rows >= threshold), size)
    counts = np.bincount(row, minlength=n)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    # rows with NaN may fill fewer than k slots: the sparsifier refuses them when it sees their normalisers
    values = np.full((n, max(k, int(counts.max()))), -np.inf, dtype=np.float32)
    places = np.zeros(values.shape, dtype=np.int64)
    values[row, slot], places[row, slot] = rows[row, ids], ids
    ordered = torch.from_numpy(values).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], torch.from_numpy(places).gather(1, ordered.indices[:, :k])


def draw(shifted: torch.Tensor, uniforms: Uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """R draws per row from softmax(shifted) by inverting its cumulative sum (float64) at `uniforms [n, R]`.

    Returns unique ids `[n, R]` and counts `[n, R]` (int64, most drawn first, unused slots 0). The draws depend
    on the row's logits and its uniforms only, never on batch or chunk.
    """
    points = torch.as_tensor(uniforms).to(shifted.device)
    cumulative = shifted.double().exp().cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=shifted.shape[1] - 1).sort(dim=1).values
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = fresh.cumsum(dim=1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn))
    counts, order = counts.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), counts


def uniforms_for(seed: int, example: int, rows: int, samples: int) -> np.ndarray:
    """`[rows, samples]` float64 in [0, 1): a function of (seed, example number) alone (counter-based Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, example])).random((rows, samples))


def boundary_token_ids(vocabulary: list[bytes], special_ids: set[int], device: torch.device) -> torch.Tensor:
    """Ids whose piece starts a word (white space first) or ends the text (special tokens)."""
    ids = [i for i, piece in enumerate(vocabulary) if i in special_ids or piece[:1].isspace()]
    return torch.tensor(ids, dtype=torch.long, device=device)
