"""What tokenising found in the texts of a source that a reader should know: counted, and said in the same words everywhere.

    notes = TokenNotes()
    notes.add("control_tokens_as_text", "page.jsonl:7", 2)
    notes.document()       # {"control_tokens_as_text": {"count": 2, "first": "page.jsonl:7"}}

Nothing of this is left out (see `left_out` for that). `kd cache plan`, `kd cache build`, `kd cache info`, `kd data show
--tokenizer` and a cache's manifest hold the same record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Note = Literal[
    "control_tokens_kept",
    "control_tokens_as_text",
    "bos_in_text",
    "eos_in_text",
    "separator_in_prompt",
    "border_scored",
    "space_scored",
    "border_in_context",
    "border_cut",
    "reasoning_not_shown",
    "tools_not_shown",
]
"""What was found.

    control_tokens_kept     control tokens spelled in a text and read as control tokens
    control_tokens_as_text  control tokens spelled in a text whose characters were read as text
    bos_in_text             texts that begin with the BOS token themselves; they got no second one
    eos_in_text             texts that end with the end token themselves; they got no second one
    separator_in_prompt     prompts of a chat template, after which no separator was put
    border_scored           pairs and turns in which a token has text of the prompt and of the target; it is scored
    space_scored            pairs whose prompt ends with white space that is a token of its own only before this target: scored
    border_in_context       such pairs and turns in which it is context, and the target is scored from the token after it
    border_cut              such pairs whose prompt and target were tokenised apart, because no other token was context
    reasoning_not_shown     scored turns whose reasoning the chat template does not write
    tools_not_shown         tools of conversations that the chat template does not write
"""
NOTES: tuple[Note, ...] = get_args(Note)


@dataclass
class TokenNotes:
    """How often each thing was found, and the name of the first example."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    changed: bool = False
    """Whether a row has other ids than the first rules give it (`kd.data.tokenizing.pair_rows.first_rules`)."""

    @property
    def rules(self) -> int | None:
        """Number of the earliest rules of texts that give these rows; None for the first."""
        if self.counts["space_scored"]:
            return 3
        return 2 if self.changed else None

    def add(self, counts: Mapping[str, int], name: str) -> None:
        """Count what was found in the example `name`."""
        for note, count in counts.items():
            if count:
                self.counts[note] += count
                self.first.setdefault(note, name)

    def document(self) -> dict[str, dict[str, Any]]:
        """The record as JSON holds it: note -> count and name of the first, in the order of the notes."""
        return {n: {"count": self.counts[n], "first": self.first[n]} for n in NOTES if self.counts[n]}


def recorded_notes(provenance: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The document in the provenance of a cache's manifest; None where the cache has none, which older ones have not."""
    document = provenance.get("token_notes")
    if not isinstance(document, Mapping):
        return None
    return {
        note: {"count": entry["count"], "first": str(entry.get("first", "unknown"))}
        for note in NOTES
        if isinstance(entry := document.get(note), Mapping) and type(entry.get("count")) is int
    }


def joined_notes(provenances: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The document of a cache made of others, from their provenances."""
    together = TokenNotes()
    for provenance in provenances:
        for note, entry in (recorded_notes(provenance) or {}).items():
            together.add({note: entry["count"]}, entry["first"])
    return together.document()
