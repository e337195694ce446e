"""docs/errors.md: its commands and its Python print what the page shows, and its table is that of the classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from page_runner import DOCS, blocks, run_page

import kd
from kd.cli import PAGES
from kd.common.extras import MissingPackageError

PAGE = DOCS / "errors.md"
TEXT = PAGE.read_text(encoding="utf-8")


def kinds(error: type[kd.KdError] = kd.KdError) -> Iterator[type[kd.KdError]]:
    """Every public kind of error."""
    for one in error.__subclasses__():
        if one.__name__ in kd.__all__:
            yield one
        yield from kinds(one)


def test_the_page_prints_what_it_says(tmp_path: Path) -> None:
    printed = run_page(PAGE, tmp_path)
    (document,) = [json.loads(block.text) for block in blocks(TEXT) if block.language == "json"]
    said = printed["kd cache info runs/nowhere --json # exit code 1"]
    assert json.JSONDecoder().raw_decode(said)[0] == document


def test_the_table_has_every_kind_with_its_exit_code_and_its_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| .+? \| \[[^\]]+\]\(([^)]+)\) \|$", TEXT, flags=re.MULTILINE)
    shown = {name: (int(code), (DOCS / link).resolve()) for name, code, link in rows}
    root = DOCS.parent
    assert shown == {one.__name__: (one.exit_code, (root / one.page.partition("#")[0]).resolve()) for one in kinds()}


def test_every_error_points_to_a_page_that_is_there() -> None:
    assert MissingPackageError.page == "README.md#install"
    every: list[type[kd.KdError]] = [kd.KdError, *kinds()]
    for one in every:
        file, _, anchor = one.page.partition("#")
        assert (DOCS.parent / file).is_file(), one
        assert not anchor or f"## {anchor.capitalize()}\n" in (DOCS.parent / file).read_text(encoding="utf-8")
    assert PAGES in TEXT
