"""`Serving`: who runs a served teacher and how it is asked; and `LogprobEngine`, what both ways of running one have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kd.cache_builder.served.logprob_rows import TokenLogprobs
from kd.cache_builder.served.server_client import PATIENCE
from kd.cache_builder.served.server_dialects import Writing

TOKENS_IN_FLIGHT = 16384
"""Tokens that a server is asked about at once, where the settings name no number."""


@dataclass(frozen=True)
class Serving:
    """A teacher that an inference engine runs."""

    url: str | None = None
    """Address of the server, which ends with /v1; None = vLLM in this process."""
    model: str | None = None
    """What the server calls the model; None = its only one."""
    teacher_id: str | None = None
    """What the user calls the weights."""
    api: str = "auto"
    """Key of `server_dialects.DIALECTS`; `auto` asks the server."""
    tokens_in_flight: int = TOKENS_IN_FLIGHT
    patience: float = PATIENCE
    """Seconds for which a server that does not answer is asked again."""
    tensor_parallel: int = 1
    """GPUs that share each layer, for vLLM in this process."""
    pipeline_parallel: int = 1
    """GPUs that share the layers among them, likewise."""


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence of tokens, and where its predictions are wanted."""

    ids: list[int]
    """T token ids"""
    positions: np.ndarray
    """[n] of the tokens that are predicted, each from 1 to T - 1"""
    name: str
    """What errors call the sequence."""


class LogprobEngine(Protocol):
    """Runs a teacher."""

    def scores(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[int, TokenLogprobs] | None]:
        """`(number of the sequence, its log-probabilities)` in any order; None now and then while it waits."""

    def answers(self, prompts: Sequence[list[int]], how: Sequence[Writing]) -> Iterator[tuple[int, list[int]] | None]:
        """`(number of the prompt, ids of its answer)` in any order; None now and then while it waits."""

    def close(self) -> None:
        """End what is under way."""
