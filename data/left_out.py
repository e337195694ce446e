"""What of a source did not become part of a text, by reason: counted where it happens, and said in the same words everywhere.

    left_out = LeftOut()
    left_out.add("without_text", "rows.csv:3")
    str(left_out)          # without text 1 (first rows.csv:3)

Reading adds what it passes over, tokenising adds what cannot be scored, and a plan joins the two. `kd data show`, `kd cache plan`,
`kd cache build`, `kd cache info` and a cache's manifest (`document`) hold the same record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Reason = Literal[
    "missing_tasks",
    "other_files",
    "hidden_files",
    "linked_folders",
    "empty_files",
    "other_fields",
    "bad_rows",
    "without_text",
    "without_prompt",
    "unlabelled",
    "filtered",
    "held_out",
    "null_value",
    "over_max_chars",
    "beyond_limit",
    "too_short",
    "too_long",
    "shortened",
    "prompt_shortened",
    "unanswered",
]
"""Why something was left out.

    missing_tasks     tasks of a mixture whose rows could not be loaded, with --skip-missing
    other_files       files of a folder whose type is not read
    hidden_files      files and folders of a folder whose name begins with a dot
    linked_folders    links to folders in a folder, which are not followed
    empty_files       files of a folder that hold nothing
    other_fields      columns beside conversations, and keys of their messages, that are not read; each once for a file
    bad_rows          rows that cannot be read, and conversations that the template refuses, under --bad-rows skip
    without_text      examples that are empty or only white space
    without_prompt    pairs whose prompt is empty; they stay, and their targets are scored without one
    unlabelled        rows of a task that have no answer
    filtered          rows of a task that its file leaves out: by `where`, `where_not`, `differs`, `skip` or `count`; or by --only
    held_out          rows of tasks of held-out clusters
    null_value        rows of a task that hold nothing in a column that their text needs
    over_max_chars    rows of a task that are longer than its `max_chars`
    beyond_limit      rows beyond the number that is kept of a task or of the text
    too_short         documents without a token to score
    too_long          pairs, conversations and texts to classify that do not fit and were dropped
    shortened         pairs, conversations and texts to classify that were cut to fit; only their ends are left out
    prompt_shortened  prompts that were cut to leave room for the teacher's answer
    unanswered        prompts whose answer by the teacher was empty and cut short
"""
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass
class LeftOut:
    """How many things were left out for each reason, and the name of the first."""

    counts: dict[Reason, int] = field(default_factory=dict)
    first: dict[Reason, str] = field(default_factory=dict)

    def add(self, reason: Reason, name: str, number: int = 1) -> None:
        """Count `number` more things, of which `name` is the first."""
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number
            self.first.setdefault(reason, name)

    def include(self, other: LeftOut) -> None:
        """Count what another record holds as well."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    def count(self, reason: Reason) -> int:
        """How many things were left out for this reason."""
        return self.counts.get(reason, 0)

    def document(self) -> dict[str, dict[str, Any]]:
        """The record as JSON holds it: reason -> count and name of the first, in the order of the reasons."""
        return {r: {"count": self.counts[r], "first": self.first[r]} for r in REASONS if self.count(r)}

    def __str__(self) -> str:
        return said(self.document())


def joined(records: Iterable[LeftOut]) -> LeftOut:
    """One record of several, in their order."""
    together = LeftOut()
    for record in records:
        together.include(record)
    return together


def recorded(provenance: Mapping[str, Any]) -> LeftOut | None:
    """The record in the provenance of a cache's manifest. None where the cache has none.

    Caches older than this record name only pairs that were dropped or truncated. What is not such a record is passed over.
    """
    document, older = provenance.get("left_out"), provenance.get("overlong")
    if not isinstance(document, Mapping):
        if not isinstance(older, Mapping):
            return None
        document = {"too_long": {"count": older.get("dropped")}, "shortened": {"count": older.get("truncated")}}
    record = LeftOut()
    for reason in REASONS:
        entry = document.get(reason)
        if isinstance(entry, Mapping) and type(entry.get("count")) is int:
            record.add(reason, str(entry.get("first", "unknown")), entry["count"])
    return record


def said(document: Mapping[str, Any] | None) -> str:
    """The document of a record in words, e.g. `hidden files 2 (first .git), without text 3 (first a.csv:7)`, or `nothing`."""
    if document is None:
        return "unknown"
    parts = [
        f"{reason.replace('_', ' ')} {entry['count']:,} (first {entry['first']})" for reason, entry in document.items()
    ]
    return ", ".join(parts) or "nothing"
