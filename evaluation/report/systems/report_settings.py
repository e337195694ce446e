"""`ReportSettings`: every setting of `kd report`; the folders that it reads are named beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.common.errors import DataError
from kd.common.settings import check, setting


@dataclass(frozen=True)
class ReportSettings:
    """What a report shows, and where it is written."""

    out: Path = setting(folder=True)
    """Folder of the report."""
    baseline: str | None = None
    """Student that the others are compared with; those trained with ce by default."""
    table: str | None = setting(None, metavar="NAME|FILE")
    """Show the figures as a reference system does: oscarnav-four (system 000), oscarnav-ten (001), neo-wikitext (002), or a
    YAML file of your own (docs/evaluation.md)."""
    published: bool = False
    """With --table: show the published figures beside the measured ones."""

    def __post_init__(self) -> None:
        check(self)
        if self.published and self.table is None:
            raise DataError(
                "there is no table to put published figures into", found="--published", try_="--table oscarnav-ten"
            )
