"""A part of a text in tokens: made of some consecutive examples, written whole, and found again by what it was made of.

    made = make_part(maker, examples, width)                # in any process
    write_part(folder, 17, made)
    found = read_part(folder, 17, part_key(maker.digest(), examples))     # None where there is none, or another one

A part is one Arrow file. Its metadata hold what tokenising found and how often each id occurs, so that a plan needs nothing
else of the parts that are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd.cache_builder.tokens.part_rows import SCHEMA, PartRows, columns_of_rows
from kd.common.files import canonical_json, process_tag, publish
from kd.data.left_out import LeftOut, recorded
from kd.data.rows.example import Example
from kd.data.text_rows import Found, RowMaker
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.too_long import TooLong

FORMAT = 1
"""Number of this format, part of every key: parts of another one are made again."""
SHAPES = ("read_only", "targets", "together", "shortest")
"""Rows of a part that a teacher is tried with: those that have most of something, and the shortest."""


@dataclass(frozen=True)
class PartRecord:
    """What is known of a part besides its rows."""

    key: str
    """Digest of the examples and of all that decides their rows."""
    examples: int
    """Examples of the text; it may be none that have a row."""
    rows: int
    """Rows, each of which is an example of the cache."""
    targets: int
    """Scored tokens."""
    read_only: int
    """Tokens that are read and not scored."""
    text_bytes: int
    """Bytes of the scored texts."""
    findings: Found
    shapes: dict[str, tuple[int, int]]
    """One of SHAPES -> (tokens, number of the first such row)."""
    longest: str
    """Id of the row with most scored tokens."""
    unknown: tuple[str, int] | None
    """Id of the first row with a token that the model does not have, and the token."""
    counts: np.ndarray
    """[largest id + 1] how often each id occurs."""


@dataclass(frozen=True)
class MadePart:
    """A part and its record."""

    record: PartRecord
    columns: pa.RecordBatch


def part_key(maker: str, examples: Sequence[Example]) -> str:
    """The digest of examples that are tokenised by the rules whose digest is `maker`."""
    digest = hashlib.blake2b(f"{FORMAT} {maker}".encode(), digest_size=32)
    for e in examples:
        talk = "" if e.conversation is None else e.conversation.to_json()
        for field in (e.id, e.task, e.split, e.prompt, e.target, str(e.complete), talk):
            data = field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def make_part(maker: RowMaker, rules: str, examples: Sequence[Example], width: int) -> MadePart:
    """Tokenise examples. Raises DataError naming the example that cannot be scored.

    rules   the digest of `maker`
    width   ids that the model has
    """
    findings = Found()
    columns = columns_of_rows(list(maker.rows(examples, findings)))
    rows = PartRows(columns)
    counts = rows.counts()
    targets, read_only = rows.targets, rows.read_only
    shapes = {}
    if len(rows):
        sizes = {"read_only": read_only, "targets": targets, "together": targets + read_only}
        shapes = {name: (int(values.max()), int(values.argmax())) for name, values in sizes.items()}
        shapes["shortest"] = (int(sizes["together"].min()), int(sizes["together"].argmin()))
    record = PartRecord(
        key=part_key(rules, examples),
        examples=len(examples),
        rows=len(rows),
        targets=int(targets.sum()),
        read_only=int(read_only.sum()),
        text_bytes=rows.text_bytes,
        findings=findings,
        shapes=shapes,
        longest=rows.name(shapes["targets"][1]) if shapes else "",
        unknown=_unknown(rows, width) if len(counts) > width else None,
        counts=counts,
    )
    return MadePart(record, columns)


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


def write_part(folder: Path, number: int, part: MadePart) -> None:
    """Write a part whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = part_path(folder, number)
    temporary = folder / f".staging-{process_tag()}.{number}"
    try:
        schema = SCHEMA.with_metadata(
            {"record": canonical_json(_document(part.record)), "counts": _sparse(part.record.counts)}
        )
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(part.columns)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_part(folder: Path, number: int, key: str) -> tuple[PartRecord, PartRows] | None:
    """The part with this key, mapped into memory; None where there is none, or another one."""
    try:
        with pa.memory_map(str(part_path(folder, number))) as file:
            opened = pa.ipc.open_file(file)
            metadata = opened.schema.metadata
            if key not in metadata[b"record"].decode():
                return None
            record = _record(metadata[b"record"], metadata[b"counts"])
            return (record, PartRows(opened.get_batch(0))) if record.key == key else None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError, TypeError):  # it is not there, or not whole
        return None


def _sparse(counts: np.ndarray) -> bytes:
    ids = np.flatnonzero(counts)
    return np.stack([ids, counts[ids]]).astype("<i8").tobytes()


def _document(record: PartRecord) -> dict[str, Any]:
    """The record as JSON, without the counts."""
    findings = record.findings
    return {
        **{n: getattr(record, n) for n in ("key", "examples", "rows", "targets", "read_only", "text_bytes", "longest")},
        "unknown": None if record.unknown is None else list(record.unknown),
        "shapes": {name: list(value) for name, value in record.shapes.items()},
        "left_out": findings.left_out.document(),
        "notes": findings.notes.document(),
        "changed": findings.notes.changed,
        "too_long": [findings.too_long.count, findings.too_long.first],
    }


def _record(text: bytes, counts: bytes) -> PartRecord:
    import json

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
        **document,
        findings=findings,
        shapes=shapes,
        unknown=None if unknown is None else (str(unknown[0]), int(unknown[1])),
        counts=dense,
    )
