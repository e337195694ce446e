"""Settings of `kd cache show`. This module imports nothing heavy: the command line reads it to print its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.common.errors import DataError
from kd.common.settings import check, setting

QUESTION_NAMES = ("uncertain", "surprising", "search", "compare")
"""Settings that ask for something; one of them at a time."""


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """What is shown of a cache."""

    token: int | None = setting(None, minimum=0, metavar="I")
    """Show this token of the example in detail, counted from 0. By default the most uncertain ones."""
    top: int = setting(10, minimum=1, metavar="N")
    """Most probable tokens to list for a token."""
    uncertain: int | None = setting(None, minimum=1, metavar="N")
    """Find the N tokens at which the teacher's entropy is largest, in the whole cache or in the example."""
    surprising: int | None = setting(None, minimum=1, metavar="N")
    """Find the N tokens of the text that the teacher gave the least probability, in the whole cache or in the example."""
    search: str | None = setting(None, metavar="TEXT")
    """Find the examples whose text holds TEXT, upper and lower case alike."""
    limit: int = setting(20, minimum=1, metavar="N")
    """Most examples that --search lists, and most tokens that --compare does."""
    compare: str | None = setting(None, metavar="CACHE")
    """Find the tokens at which the teacher of another cache of the same text disagrees most, as many as --limit says."""
    html: Path | None = setting(None, metavar="FILE")
    """Write what is shown as one HTML page, which needs no network."""

    def __post_init__(self) -> None:
        check(self)
        asked = [name for name in QUESTION_NAMES if getattr(self, name) is not None]
        if len(asked) > 1:
            raise DataError(
                "one question at a time",
                found=" and ".join(f"--{name}" for name in asked),
                try_="one of them",
            )
        if asked and self.token is not None:
            raise DataError("a token is shown without a search", found=f"--token with --{asked[0]}", try_="one of them")
        if self.html is not None and self.html.is_dir():
            raise DataError(
                "the page is a file, and this is a folder", found=f"--html {self.html}", try_="--html FILE.html"
            )
        if self.search == "":
            raise DataError("there is nothing to search for", found="an empty text", try_="--search TEXT")

    @property
    def question(self) -> str | None:
        """What is looked for; None where an example is shown."""
        return next((name for name in QUESTION_NAMES if getattr(self, name) is not None), None)
