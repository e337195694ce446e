"""A part of a text in tokens: made of some consecutive examples, written whole, and found again by what it was made of.

    record = write_part(folder, 17, maker, maker.digest(), examples, width)      # in any process
    found = read_record(folder, 17, part_key(maker.digest(), examples))     # None where there is none, or another one
    rows = read_part_rows(folder, 17, found.key, 0)

A part is one Arrow file of one batch of rows, or of several where it is large. The metadata of an empty batch at its end hold what
tokenising found and how often each id occurs, so that a plan needs nothing else of the parts that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd.cache_builder.tokens.part_rows import SCHEMA, PartRows, added, batches_of_rows, columns_of_rows
from kd.common.files import canonical_json, process_tag, publish
from kd.data.left_out import LeftOut, recorded
from kd.data.rows.example import Example
from kd.data.text_rows import Found, RowMaker
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.too_long import TooLong

FORMAT = 2
"""Number of this format, part of every key: parts of another one are made again."""
FIGURES = ("targets", "read_only", "text_bytes", "longest")
"""Fields of `PartFigures` that are stored as they are."""
UNREADABLE = (OSError, pa.ArrowInvalid, KeyError, ValueError, TypeError)
"""What reading a part raises that is not there, or not whole."""
SHAPES = ("read_only", "targets", "together", "shortest")
"""Rows of a part that a teacher is tried with: those that have most of something, and the shortest."""


@dataclass
class PartFigures:
    """Figures of consecutive rows, to which those of the rows that come next can be added."""

    targets: int = 0
    """Scored tokens."""
    read_only: int = 0
    """Tokens that are read and not scored."""
    text_bytes: int = 0
    """Bytes of the scored texts."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """One of SHAPES -> (tokens, number of the first such row)."""
    longest: str = ""
    """Id of the row with most scored tokens."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[largest id + 1] how often each id occurs."""

    def add(self, other: PartFigures, before: int) -> None:
        """Go on with rows that come after `before` rows."""
        for name, (size, row) in other.shapes.items():
            known = self.shapes.get(name)
            if known is None or (size < known[0] if name == "shortest" else size > known[0]):
                self.shapes[name] = (size, before + row)
                self.longest = other.longest if name == "targets" else self.longest
        self.targets += other.targets
        self.read_only += other.read_only
        self.text_bytes += other.text_bytes
        self.counts = added(self.counts, other.counts)


@dataclass(frozen=True)
class PartRecord:
    """What is known of a part besides its rows."""

    key: str
    """Digest of the examples and of all that decides their rows."""
    examples: int
    """Examples of the text; it may be none that have a row."""
    batches: tuple[int, ...]
    """Rows of each batch; a row is an example of the cache."""
    figures: PartFigures
    findings: Found
    unknown: tuple[str, int] | None
    """Id of the first row with a token that the model does not have, and the token."""

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return sum(self.batches)


def part_key(maker: str, examples: Sequence[Example]) -> str:
    """The digest of examples that are tokenised by the rules whose digest is `maker`."""
    digest = hashlib.blake2b(f"{FORMAT} {maker}".encode(), digest_size=32)
    for e in examples:
        talk = "" if e.conversation is None else e.conversation.to_json()
        sizes = f"[{len(e.id)}, {len(e.task)}, {len(e.split)}, {len(e.prompt)}, {len(e.target)}, {len(talk)}]"
        head = f"{sizes}{e.complete}{e.id}{e.task}{e.split}{e.prompt}{talk}"
        digest.update(head.encode("utf-8", "surrogatepass"))
        digest.update(e.target.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def make_part(
    maker: RowMaker, rules: str, examples: Sequence[Example], width: int, put: Callable[[pa.RecordBatch], None]
) -> PartRecord:
    """Tokenise examples and hand out their rows, a batch after another. Raises DataError naming the example that cannot be scored.

    rules   the digest of `maker`
    width   ids that the model has
    put     receives the batches
    """
    findings, figures, batches = Found(), PartFigures(), list[int]()
    unknown: tuple[str, int] | None = None
    for columns in batches_of_rows(maker.rows(examples, findings)):
        put(columns)
        rows = PartRows(columns)
        counts = rows.counts()
        if unknown is None and len(counts) > width:
            unknown = _unknown(rows, width)
        figures.add(figures_of_rows(rows, counts), sum(batches))
        batches.append(len(rows))
    return PartRecord(
        key=part_key(rules, examples),
        examples=len(examples),
        batches=tuple(batches),
        figures=figures,
        findings=findings,
        unknown=unknown,
    )


def figures_of_rows(rows: PartRows, counts: np.ndarray) -> PartFigures:
    """The figures of at least one row; `counts` are theirs."""
    targets, read_only = rows.targets, rows.read_only
    sizes = {"read_only": read_only, "targets": targets, "together": targets + read_only}
    shapes = {name: (int(values.max()), int(values.argmax())) for name, values in sizes.items()}
    shapes["shortest"] = (int(sizes["together"].min()), int(sizes["together"].argmin()))
    return PartFigures(
        targets=int(targets.sum()),
        read_only=int(read_only.sum()),
        text_bytes=rows.text_bytes,
        shapes=shapes,
        longest=rows.name(shapes["targets"][1]),
        counts=counts,
    )


def _unknown(rows: PartRows, width: int) -> tuple[str, int] | None:
    """The first row that has an id beyond the model's, and its largest."""
    for row in rows.rows(0, len(rows)):
        largest = int(row.input_ids.max())
        if largest >= width:
            return row.example.id, largest
    return None


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"{number:06d}.arrow"


def write_part(
    folder: Path, number: int, maker: RowMaker, rules: str, examples: Sequence[Example], width: int
) -> PartRecord:
    """Make a part and write it whole. Parameters and errors as those of `make_part`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = part_path(folder, number)
    temporary = folder / f".staging-{process_tag()}.{number}"
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            record = make_part(maker, rules, examples, width, writer.write_batch)
            metadata = {"record": canonical_json(_document(record)), "counts": _sparse(record.figures.counts)}
            writer.write_batch(columns_of_rows([]), custom_metadata=metadata)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return record


def read_record(folder: Path, number: int, key: str) -> PartRecord | None:
    """What is known of the part with this key; None where there is none, or another one."""
    try:
        with pa.memory_map(str(part_path(folder, number))) as file:
            record = _record(*_metadata(pa.ipc.open_file(file)))
    except UNREADABLE:
        return None
    return record if record.key == key else None


def read_part_rows(folder: Path, number: int, key: str, batch: int) -> PartRows | None:
    """A batch of the part with this key, mapped into memory; None where there is none, or another one."""
    try:
        with pa.memory_map(str(part_path(folder, number))) as file:
            opened = pa.ipc.open_file(file)
            return PartRows(opened.get_batch(batch)) if json.loads(_metadata(opened)[0])["key"] == key else None
    except UNREADABLE:
        return None


def _metadata(opened: Any) -> tuple[bytes, bytes]:
    """The record and the counts at the end of a part's file."""
    _, metadata = opened.get_batch_with_custom_metadata(opened.num_record_batches - 1)
    return metadata[b"record"], metadata[b"counts"]


def _sparse(counts: np.ndarray) -> bytes:
    ids = np.flatnonzero(counts)
    return np.stack([ids, counts[ids]]).astype("<i8").tobytes()


def _document(record: PartRecord) -> dict[str, Any]:
    """The record as JSON, without the counts."""
    findings, figures = record.findings, record.figures
    return {
        "key": record.key,
        "examples": record.examples,
        "batches": list(record.batches),
        **{name: getattr(figures, name) for name in FIGURES},
        "unknown": None if record.unknown is None else list(record.unknown),
        "shapes": {name: list(value) for name, value in figures.shapes.items()},
        "left_out": findings.left_out.document(),
        "notes": findings.notes.document(),
        "changed": findings.notes.changed,
        "too_long": [findings.too_long.count, findings.too_long.first],
    }


def _record(text: bytes, counts: bytes) -> PartRecord:
    document = json.loads(text)
    notes = TokenNotes(changed=document.pop("changed"))
    for name, entry in document.pop("notes").items():
        notes.add({name: entry["count"]}, entry["first"])
    left_out = recorded({"left_out": document.pop("left_out")}) or LeftOut()
    findings = Found(left_out, notes, TooLong(*document.pop("too_long")))
    ids, numbers = np.frombuffer(counts, dtype="<i8").reshape(2, -1)
    dense = np.zeros(int(ids[-1]) + 1 if len(ids) else 0, dtype=np.int64)
    dense[ids] = numbers
    shapes = {name: (int(value[0]), int(value[1])) for name, value in document.pop("shapes").items()}
    unknown = document.pop("unknown")
    return PartRecord(
        key=document["key"],
        examples=document["examples"],
        batches=tuple(document["batches"]),
        figures=PartFigures(shapes=shapes, counts=dense, **{name: document[name] for name in FIGURES}),
        findings=findings,
        unknown=None if unknown is None else (str(unknown[0]), int(unknown[1])),
    )
