"""`make_report`: what `kd report` writes, in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.common.paths import as_path
from kd.common.settings import make
from kd.evaluation.report.systems.report_settings import ReportSettings


def make_report(runs: Sequence[str | os.PathLike[str]], **settings: Any) -> dict[str, Path]:
    """Compare runs and evaluations; returns the files that were written, by name.

    runs       folders of `kd train`, `kd eval`, `kd merge` and `kd classify matrix`, or folders of them
    settings   the options of `kd report`, spelled with underscores: out, baseline, table, published

    Raises DataError for a folder that holds none of them; then nothing is written.

    >>> import kd
    >>> from pathlib import Path
    >>> report = kd.evaluate("demo", "perplexity", data="demo", split="heldout", limit=1)
    >>> saved = report.save(Path("scored"))
    >>> kd.make_report(["scored"], out="compared")["markdown"].name
    'report.md'
    """
    from kd.evaluation.report.writing import write_report

    chosen = make(ReportSettings, settings)
    files = write_report(
        [as_path(os.fspath(run)) for run in runs],
        chosen.out,
        baseline=chosen.baseline,
        table=chosen.table,
        published=chosen.published,
    )
    return {name: Path(path) for name, path in files.paths().items()}
