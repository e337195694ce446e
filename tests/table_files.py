"""Tables and texts on disk, for the tests of `kd.data`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [{"text": "first, with a comma"}, {"text": 'second "quoted"\nand a line'}, {"text": "third é 😀"}]

PAIRS = [{"prompt": "2+2=", "target": "4"}, {"prompt": "3+3=", "target": "6"}]


def write(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def targets(corpus) -> list[str]:
    return [e.target for e in corpus.examples]


ARTICLES = """\

 = Valkyria Chronicles = \n
 Text of the first . \n
 = = Gameplay = = \n
 More text .
 = Not a title after a full line = \n
 = M = \n
 A film with a short name . \n
"""
