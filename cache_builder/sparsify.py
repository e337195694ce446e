"""From a teacher's logits to what is kept of them, chunk by chunk, on the teacher's device.

Everything is taken from one chunk `[n, V]` of float32 logits: top-k on the raw logits, one log-normaliser per
temperature, gold log-probability and rank, seeded draws, rank bands. No log_softmax over the vocabulary is formed, and
the two scratch tensors of that size are reused.

Where temperatures double (1, 2, 4), exp(x/2) is squared into exp(x): one pass of exp serves the whole grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kd.cache_builder.targets import PROFILES, TargetConfig, band_edges

LOG_MASS_FLOOR = -60.0
"""Log-mass of an empty rank band: e^-60 is below anything float32 can sum."""


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


class NonFiniteRow(Exception):
    """Row `row` of the chunk holds NaN or infinite logits."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(row)


class Sparsifier:
    """Applies one `TargetConfig` to chunks of logits over `vocabulary_size` ids."""

    def __init__(self, config: TargetConfig, vocabulary_size: int, boundary_ids: torch.Tensor | None = None) -> None:
        config.check_vocabulary(vocabulary_size)
        self.config = config
        self.edges = band_edges(config.top_k, vocabulary_size, config.tail_bands) if config.tail_bands else []
        self.vocabulary_size = vocabulary_size
        self.boundary_ids = boundary_ids
        self._buffers: list[torch.Tensor] = []

    def _buffer(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """A reused `[n, V]` float32 scratch tensor: fresh memory of this size costs more than the arithmetic in it."""
        if not self._buffers or self._buffers[0].shape[0] < like.shape[0] or self._buffers[0].device != like.device:
            with torch.inference_mode(False):
                self._buffers = [torch.empty(like.shape, device=like.device) for _ in range(2)]
        return self._buffers[number][: like.shape[0]]

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, gold_ids: torch.Tensor, uniforms: np.ndarray | None = None) -> Chunk:
        """`logits [n, V]` (any float dtype; columns beyond the vocabulary are ignored), `gold_ids [n]`,
        `uniforms [n, R]` in [0, 1) for the draws. Raises NonFiniteRow."""
        config = self.config
        logits = logits[:, : self.vocabulary_size].float()
        ids = relative = None
        if config.top_k:
            values, ids = logits.topk(config.top_k, dim=1)
            top = values[:, :1]
            relative = values - top
        else:
            top = logits.amax(dim=1, keepdim=True)
        shifted = torch.sub(logits, top, out=self._buffer(0, logits))
        log_z = self._log_normalisers(shifted)
        finite = torch.isfinite(log_z).all(dim=1) & torch.isfinite(top.squeeze(1))
        if not bool(finite.all()):
            raise NonFiniteRow(int((~finite).nonzero()[0]))
        one = log_z[:, config.temperatures.index(1.0)]
        gold = shifted.gather(1, gold_ids.unsqueeze(1))
        kept = gold if relative is None else torch.minimum(gold, relative[:, -1:])
        if not bool(torch.isfinite(kept).all()):  # minus infinity: no stored number can hold it
            raise NonFiniteRow(int((~torch.isfinite(kept)).nonzero()[0, 0]))
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
            # 0/1 as float32 sum exactly up to 2^24 ids, five times as fast as a sum of booleans
            gold_rank=torch.gt(shifted, gold, out=self._buffer(1, shifted)).sum(dim=1).long(),
            token_ids=ids if PROFILES[config.profile].ids else None,
            relative=relative,
            tail_bands=bands,
            sample_ids=sample_ids,
            sample_counts=counts,
            boundary_logprob=boundary,
        )

    def _log_normalisers(self, shifted: torch.Tensor) -> torch.Tensor:
        """`[n, V]` logits with maximum 0 -> `[n, T]`; the sum holds exp(0) = 1, so the logarithm is safe."""
        columns: dict[float, torch.Tensor] = {}
        previous, powers = 0.0, self._buffer(1, shifted)
        for temperature in reversed(self.config.temperatures):
            if previous == 2 * temperature:
                powers.mul_(powers)
            else:
                torch.div(shifted, temperature, out=powers).exp_()
            columns[temperature] = powers.sum(dim=1).log()
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


def draw(shifted: torch.Tensor, uniforms: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """R draws per row from softmax(shifted) by inverting its cumulative sum (float64) at `uniforms [n, R]`.

    Returns unique ids `[n, R]` and counts `[n, R]` (int64, most drawn first, unused slots 0). The draws depend
    on the row's logits and its uniforms only, never on batch or chunk.
    """
    points = torch.from_numpy(uniforms).to(shifted.device)
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
