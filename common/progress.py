"""Progress of long work: a generator yields one record per step, and the last record carries the result.

for step in evaluate_perplexity(model, tokenizer, corpus): show(step.done, step.total)
result = final(evaluate_perplexity(model, tokenizer, corpus))      # the same, in silence
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")


class ProgressRecord(Protocol):
    """What every progress record says, whatever else it holds."""

    @property
    def done(self) -> int:
        """Units of work that are finished."""

    @property
    def total(self) -> int:
        """Units of work there are."""

    @property
    def note(self) -> str:
        """What is being done, in a few words."""


AnyStep = TypeVar("AnyStep", bound=ProgressRecord)


@dataclass(frozen=True)
class Progress(Generic[Result]):
    """One step of work that takes a while."""

    done: int
    """Units of work that are finished: rows, examples or models, as the generator says."""
    total: int
    """Units of work there are."""
    result: Result | None = None
    """What the work gives, on the last record; None on the others."""
    note: str = ""
    """What is being done, in a few words."""


def final(steps: Iterable[Progress[Result]]) -> Result:
    """Run the work to its end in silence and return its result."""
    result = None
    for step in steps:
        result = step.result
    assert result is not None, "the last record carries the result"
    return result
