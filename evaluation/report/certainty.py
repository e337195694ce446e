"""How much the teacher's soft targets say beyond the text itself.

A teacher that is certain of the next token repeats the text. A teacher that knows little adds noise. Look here first
when distillation gains nothing. The figures are per row of a cache. p runs over the kept tokens, and everything else
counts as one more outcome:

    entropy        -Σ p ln p, nats; a lower bound, because the rest is one outcome
    certain        share of rows whose most probable token has more than CERTAIN
    top-1          share of rows whose most probable token is the text's
    NLL            -ln p(text), nats: the teacher's own score
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kd.evaluation.report.page import Section, Table

if TYPE_CHECKING:
    from kd.cache_builder.store.readers.reading import Reader
    from kd.cache_builder.store.soft_targets import SoftTargets

CERTAIN = 0.95
EXAMPLES = 64
"""Number of examples that are read at once."""


@dataclass(frozen=True)
class Certainty:
    """Means over the rows of a cache."""

    rows: int
    entropy: float
    """Mean entropy of the teacher, in nats."""
    certain: float
    top1: float
    nll: float
    """Mean NLL of the gold token under the teacher, in nats."""
    kept: float
    """Mean probability of the kept tokens."""


def certainty(reader: Reader) -> Certainty | None:
    """The means over every row of a cache; None for a cache that keeps draws alone, or does not say all of it."""
    if reader.manifest.gold_in_top_k or reader.manifest.tail_unknown:
        return None
    sums = np.zeros(5)
    rows = 0
    for start in range(0, len(reader), EXAMPLES):
        targets = reader.read_rows(range(start, min(start + EXAMPLES, len(reader))))
        if targets.logprobs is None:
            return None
        sums += _sums(targets)
        rows += len(targets)
    entropy, certain, top1, nll, kept = (sums / rows).tolist()
    return Certainty(rows, entropy, certain, top1, nll, kept)


def _sums(targets: SoftTargets) -> np.ndarray:
    assert targets.logprobs is not None
    logprobs = targets.logprobs.astype(np.float64)
    p, rest_N = np.exp(logprobs), np.maximum(targets.tail_mass_at(1.0).astype(np.float64), 0.0)
    tail_N = np.where(rest_N > 0, -rest_N * np.log(np.where(rest_N > 0, rest_N, 1.0)), 0.0)
    entropy_N = -targets.row_sums(p * logprobs) + tail_N
    largest_N = p.reshape(-1)[targets.most_probable]
    hit_N = targets.gold_rank == 0  # caches for ULD keep no ids
    return np.array(
        [entropy_N.sum(), (largest_N > CERTAIN).sum(), hit_N.sum(), -targets.gold_logprob.sum(), p.sum()],
        dtype=np.float64,
    )


def section(measured: Certainty) -> Section:
    """The section of a report that shows the means."""
    rows = [
        ["rows (target tokens)", f"{measured.rows:,}"],
        ["entropy, at least", f"{measured.entropy:.3f} nats"],
        [f"rows with one token above {CERTAIN:g}", f"{measured.certain:.1%}"],
        ["most probable token is the text's", f"{measured.top1:.1%}"],
        ["negative log-likelihood of the text", f"{measured.nll:.3f} nats"],
        ["probability kept in the cache", f"{measured.kept:.4f}"],
    ]
    note = "Soft targets say more than the text where the teacher is uncertain and right to be so: an entropy near 0 is the "
    note += "text once more, one far above the negative log-likelihood is a teacher that knows less than it could."
    return Section("What the cache holds", table=Table(["", "measured"], rows), note=note)
