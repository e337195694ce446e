"""What is kept of a teacher's logits, computed a few rows at a time on the teacher's device.

Everything comes from one chunk `[n, V]` of float32 logits: top-k of the raw logits, one log-normaliser per temperature,
gold log-probability and rank, seeded draws, rank bands. No log_softmax over the vocabulary is formed. On a CPU the chunk is
processed in blocks of rows that stay in the processor's cache from the first pass to the last, and each of several threads
takes whole blocks (`kd.models.top_k`, `selection` and `normalisers` hold the passes).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kd.cache_builder.store.encoding.rank_bands import LOG_MASS_FLOOR
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.normalisers import entropies, log_normalisers, padded_width, subtract
from kd.cache_builder.teacher.selection import Uniforms, count_larger, draw
from kd.cache_builder.teacher.tail_draws import draw_tail
from kd.models.top_k import marks_for, top_k_at_once, top_k_by_threshold, top_k_by_topk

BLOCK_BYTES = 5 * 2**20
"""Bytes of logits in a block on a CPU. Larger blocks leave the caches between passes; in smaller ones the calls cost too much,
and several threads wait for the interpreter's lock between them (benchmarks/chunks.py)."""


@dataclass(frozen=True)
class Chunk:
    """What is kept of n rows, on the device that computed it. Shapes as in `RawTargets`."""

    log_z: torch.Tensor
    gold_logprob: torch.Tensor
    gold_rank: torch.Tensor
    token_ids: torch.Tensor | None = None
    relative: torch.Tensor | None = None
    tail_bands: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    sample_counts: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    tail_ids: torch.Tensor | None = None
    tail_draws: torch.Tensor | None = None
    boundary_logprob: torch.Tensor | None = None
    doubt: torch.Tensor | None = None
    """[n] uint8: 0, TIED or NOT_FINITE. Set only by `Sparsifier.marked`."""


TIED, NOT_FINITE = 1, 2
"""Marks of a row: ties at rank k may have other ids than `Sparsifier.__call__` keeps; or it would raise NonFiniteRow."""


class NonFiniteRow(Exception):
    """Row `row` of the chunk holds NaN or infinite logits."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(row)


@dataclass(frozen=True)
class Scratch:
    """Working memory for one block."""

    powers: torch.Tensor
    """[1 or 2, rows, padded_width(V)] float32"""
    marks: np.ndarray
    """See `marks_for`. It has no rows on other devices than a CPU."""


class Sparsifier:
    """Applies one `TargetConfig` to chunks of logits over `vocabulary_size` ids. For one thread at a time, see `twin`."""

    def __init__(
        self,
        config: TargetConfig,
        vocabulary_size: int,
        boundary_ids: torch.Tensor | None = None,
        *,
        block_rows: int | None = None,
    ) -> None:
        """`block_rows`: rows of a block; None = what stays in a CPU's cache, and whole chunks on other devices."""
        config.check_vocabulary(vocabulary_size)
        self.config = config
        # a row's bands begin beyond the tokens that it hands on, however many of these it will keep
        self.edges = [max(edge, config.top_k) for edge in config.edges(vocabulary_size)]
        self.vocabulary_size = vocabulary_size
        self.boundary_ids = boundary_ids
        self.block_rows = block_rows
        later = bool(self.edges or config.samples or config.certain_below or PROFILES[config.profile].boundary)
        doubling = all(high == 2 * low for low, high in pairwise(config.temperatures))
        self._own_threads = doubling and not later  # else torch's own threads sort and sum
        # the logits are not needed again once their powers replace them
        self._in_place = self._own_threads and not config.tail_samples
        self._scratches: list[Scratch] = []
        self._pool: ThreadPoolExecutor | None = None

    def twin(self) -> Sparsifier:
        """Another sparsifier of the same settings with its own working memory, for another thread."""
        return Sparsifier(self.config, self.vocabulary_size, self.boundary_ids, block_rows=self.block_rows)

    def _scratch(self, rows: int, workers: int, device: torch.device) -> list[Scratch]:
        """Working memory for each worker. It is reused, because new memory of this size costs more than the arithmetic in it."""
        current = self._scratches
        if len(current) < workers or current[0].powers.shape[1] < rows or current[0].powers.device != device:
            shape = (1 if self._in_place else 2, rows, padded_width(self.vocabulary_size, device.type))
            marks = rows if device.type == "cpu" else 0
            with torch.inference_mode(False):
                self._scratches = [
                    Scratch(torch.zeros(shape, device=device), marks_for(marks, self.vocabulary_size))
                    for _ in range(workers)
                ]
        return self._scratches

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, gold_ids: torch.Tensor, uniforms: Uniforms | None = None) -> Chunk:
        """`logits [n, V]` (any float dtype; columns beyond the vocabulary are ignored), `gold_ids [n]`,
        `uniforms [n, R]` in [0, 1) for the draws. Raises NonFiniteRow."""
        logits = logits[:, : self.vocabulary_size]
        workers = torch.get_num_threads() if logits.device.type == "cpu" and self._own_threads else 1
        step = self.block_rows or max(1, len(logits))
        if self.block_rows is None and logits.device.type == "cpu":
            count = -(-4 * self.vocabulary_size * len(logits) // BLOCK_BYTES)
            step = max(1, -(-len(logits) // (-(-count // workers) * workers)))  # as many blocks for each worker
        starts = range(0, len(logits), step)
        workers = max(1, min(workers, len(starts)))
        scratch = self._scratch(min(step, len(logits)), workers, logits.device)

        def work(worker: int) -> list[Chunk | NonFiniteRow]:
            """Process every `workers`-th block, up to one that is not finite."""
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
        rows = [block.row for share in shares for block in share if isinstance(block, NonFiniteRow)]
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
        """The same without a device sync, for a GPU: rows that would need one are marked in `doubt`."""
        scratch = self._scratch(len(logits), 1, logits.device)[0]
        return self._block(logits[:, : self.vocabulary_size].float(), gold_ids, uniforms, scratch, waits=False)

    def _block(
        self,
        logits: torch.Tensor,
        gold_ids: torch.Tensor,
        uniforms: Uniforms | None,
        scratch: Scratch,
        *,
        waits: bool = True,
    ) -> Chunk:
        """`logits [r, V]` float32, `gold_ids [r]`, `uniforms [r, R]`; `scratch` has room for r rows or more."""
        config = self.config
        ids = relative = tied = doubt = None
        if config.top_k:
            if not waits:
                values, ids, tied = top_k_at_once(logits, config.top_k)
            elif logits.device.type == "cpu":
                values, ids = top_k_by_threshold(logits, config.top_k, scratch.marks)
            else:
                values, ids = top_k_by_topk(logits, config.top_k)
            top = values[:, :1]
            relative = values - top
        else:
            top = logits.amax(dim=1, keepdim=True)
        shifted = subtract(logits, top, scratch.powers[0, : len(logits), : logits.shape[1]])
        gold = shifted.gather(1, gold_ids.unsqueeze(1))
        ranks = count_larger(shifted, gold, relative, scratch.marks)
        log_z = log_normalisers(shifted, config.temperatures, scratch.powers[-1, : len(logits)])
        one = log_z[:, config.temperatures.index(1.0)]
        kept = gold if relative is None else torch.minimum(gold, relative[:, -1:])
        # a kept logit of minus infinity cannot be stored
        bad = ~torch.isfinite(torch.cat([log_z, top, kept], dim=1)).all(dim=1)
        if not waits:
            doubt = bad.to(torch.uint8) * NOT_FINITE
            doubt = doubt if tied is None else torch.maximum(doubt, tied.to(torch.uint8) * TIED)
        elif bool(bad.any()):
            raise NonFiniteRow(int(bad.nonzero()[0]))
        bands = self._bands(shifted, log_z) if self.edges else None
        entropy = entropies(shifted, one, config.certain_below) if config.certain_below else None
        sample_ids = counts = None
        if config.samples:
            assert uniforms is not None
            sample_ids, counts = draw(shifted, uniforms)
        lengths = tail_ids = tail_draws = None
        if config.tail_samples and ids is not None and relative is not None:
            assert uniforms is not None
            lengths = config.lengths((relative.double() - one.double().unsqueeze(1)).exp(), entropy)
            powers = scratch.powers[-1, : len(logits)]
            tail_ids, tail_draws = draw_tail(shifted, one, ids, lengths, config.tail_samples, uniforms, powers)
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
            entropy=entropy,
            sample_ids=sample_ids,
            sample_counts=counts,
            kept=lengths,
            tail_ids=tail_ids,
            tail_draws=tail_draws,
            boundary_logprob=boundary,
            doubt=doubt,
        )

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


def uniforms_for(seed: int, example: int, rows: int, samples: int) -> np.ndarray:
    """`[rows, samples]` float64 in [0, 1), which depend only on seed and example number (counter-based Philox)."""
    return np.random.Generator(np.random.Philox(key=[seed, example])).random((rows, samples))


def boundary_token_ids(vocabulary: list[bytes], special_ids: set[int], device: torch.device) -> torch.Tensor:
    """Ids whose piece begins a word (with white space) or ends the text (special tokens)."""
    ids = [i for i, piece in enumerate(vocabulary) if i in special_ids or piece[:1].isspace()]
    return torch.tensor(ids, dtype=torch.long, device=device)
