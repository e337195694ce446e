"""Write the table of docs/scale.md from `kd cache bill`: `python scripts/write_scale.py`. A test compares the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.cache_builder.build.bill import EXAMPLES, bill_of
from kd.cache_builder.build.build_settings import BillSettings
from kd.common.settings import make

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- table: made by scripts/write_scale.py -->\n", "<!-- end of table -->\n"
LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "disk, GB": lambda bill: f"{bill['bytes'] / 1e9:,.1f}",
    "shards": lambda bill: f"{bill['shards']:,}",
    "files": lambda bill: f"{bill['files']:,}",
    "requests to build into an object store": lambda bill: f"{bill['put_requests']:,}",
    "requests to read it once": lambda bill: f"{bill['get_requests_per_epoch']:,}",
    "GPU-hours of the teacher": lambda bill: f"{bill['gpu_hours']:,.1f}",
    "reader cores for the training": lambda bill: f"{bill['reader_cores']:.2f}",
    "MB/s that the training reads": lambda bill: f"{bill['reader_bytes_per_second'] / 1e6:,.1f}",
    "memory of a reader, MB": lambda bill: f"{bill['reader_memory'] / 1e6:,.0f}",
    "disk of a builder into an object store, MB": lambda bill: f"{bill['builder_disk'] / 1e6:,.0f}",
}
"""Line of the table -> its figure in a bill."""


def scale_table() -> str:
    """The table: a column for each text."""
    bills = [bill_of(make(BillSettings, {"rows": rows})) for rows in EXAMPLES.values()]
    head = ["", *(f"{name}: {rows:,} rows" for name, rows in EXAMPLES.items())]
    lines = [[name, *(figure(bill) for bill in bills)] for name, figure in LINES.items()]
    rule = ["---", *("---:" for _ in bills)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])


def with_table(page: str) -> str:
    """The page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + scale_table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
