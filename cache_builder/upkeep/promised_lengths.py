"""What the settings of a cache promise of rows that differ in length: how many tokens they keep, and what their bands hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kd.cache_builder.store.row_figures import entropy_bounds
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import TargetConfig


def broken_lengths(
    targets: SoftTargets, config: TargetConfig, vocabulary_size: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield `(problem, array, mask of rows [N])` for every such promise; nothing where all rows keep as many tokens."""
    if targets.kept is None:
        return
    one = (targets.kept == 1) & bool(config.certain_below)
    yield f"rows of fewer tokens than {config.min_k}", "kept", (targets.kept < config.min_k) & ~one
    if targets.logprobs is not None and config.certain_below and config.min_k > 1:
        least, _ = entropy_bounds(targets, vocabulary_size)
        # the odds of the tail are float16 logarithms: their probability, and so the entropy, may be off by half a per cent
        unsure = one & (least > 1.02 * config.certain_below)
        yield f"rows of one token whose entropy is not below {config.certain_below:g} nats", "kept", unsure
    if targets.tail_bands is not None and targets.logprobs is not None:
        yield "bands that do not hold the mass of the tail", "tail_bands", _wrong_bands(targets)


def _wrong_bands(targets: SoftTargets) -> np.ndarray:
    """`[N]` whether the bands of a row hold another mass than its tail, at a temperature that has bands."""
    assert targets.tail_bands is not None
    wrong = np.zeros(len(targets), dtype=bool)
    for number, temperature in enumerate(targets.band_temperatures):
        mass = np.exp(targets.tail_bands[:, number].astype(np.float64)).sum(axis=1)
        # both are logarithms in float16, of at most 16 nats where they weigh: 2^-11 * 16 is 0.8 %, of the one and of the other
        wrong |= np.abs(mass - targets.tail_mass_at(temperature)) > 0.02 * mass + 1e-4
    return wrong
