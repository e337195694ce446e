"""What a look into a cache has found, as plain values: an example, or the rows that answer a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.cache_builder.look.example_view import ExampleView
from kd.cache_builder.look.token_views import TokenView
from kd.cache_builder.store.readers.description import Facts


@dataclass(frozen=True)
class FoundView:
    """One answer to a question: a token with what stands around it, or a place of a text."""

    example: int
    id: str
    before: str
    text: str
    """The token's own characters, or the text that was searched for, as it is written there."""
    after: str
    token: TokenView | None = None
    """None for a text that was searched for."""
    around: Sequence[TokenView] = ()
    """The token among those around it."""
    other: TokenView | None = None
    """The same token in the cache that is compared with; None where there is none."""
    around_other: Sequence[TokenView] = ()
    divergences: Sequence[float] = ()
    """Divergences of the tokens around it, in nats (see `two_teachers`)."""

    @property
    def divergence(self) -> float | None:
        """Of the token itself; None where nothing is compared."""
        if self.token is None or not self.divergences:
            return None
        return self.divergences[self.token.number - self.around[0].number]

    @property
    def document(self) -> dict[str, Any]:
        """As `kd cache show --json` prints it."""
        shown = {name: getattr(self, name) for name in ("example", "id", "before", "text", "after")}
        compared = {} if self.other is None else {"other": self.other.document, "divergence": self.divergence}
        return shown | ({} if self.token is None else {"token": self.token.document}) | compared


@dataclass(frozen=True)
class ViewedCache:
    """What was found in a cache."""

    path: str
    facts: Facts
    notes: Sequence[str]
    """What this cache cannot say, in sentences."""
    example: ExampleView | None = None
    """The example that is shown; None where a question was asked of the whole cache."""
    picked: Sequence[TokenView] = ()
    """The tokens of the example that are shown in detail."""
    question: str | None = None
    """`uncertain`, `surprising`, `search` or `compare`; None where an example is shown."""
    found: Sequence[FoundView] = ()
    total: int = 0
    """How much was looked through: rows, or examples that hold the text."""
    first_view: bool = False
    """Whether neither an example nor a question was named."""
    compared: Mapping[str, Any] | None = None
    """The cache that was compared with: its path and teacher, and of the rows that both have their number (`rows`) and mean
    divergence in nats (`mean`); `left_out`: rows whose example it does not have."""

    @property
    def document(self) -> dict[str, Any]:
        """The whole as a JSON object; docs/how-to/look-into-a-cache.md describes its keys, which stay as they are."""
        return {
            "cache": {"path": self.path, **self.facts},
            "notes": list(self.notes),
            "example": None if self.example is None else self.example.document,
            "picked": [token.number for token in self.picked],
            "question": self.question,
            "found": [one.document for one in self.found],
            "total": self.total,
            "compared": None if self.compared is None else dict(self.compared),
        }
