"""docs/errors.md: its commands and its Python print what the page shows, and its table is that of the classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_runner import DOCS, blocks, run_page
from terminal import run_main

import kd
from kd.cli import PAGES
from kd.common.errors import PARTS
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
    assert shown == {one.__name__: (one.exit_code, (root / one.page).resolve()) for one in kinds()}


def test_the_table_of_parts_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| \[[^\]]+\]\(([^)]+)\) \|$", TEXT, flags=re.MULTILINE)
    assert {part: f"docs/{link}" for part, link in rows} == PARTS
    for part, page in PARTS.items():
        assert (DOCS.parent / part.replace(".", "/")).is_dir(), part
        assert (DOCS.parent / page).is_file(), page


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("cache build --teacher demo --data glue/sts2 --out out", "docs/how-to/flan.md"),
        ("cache build --teacher demo --data missing.txt --out out", "docs/building.md"),
        ("cache build --teacher demo --data demo --top-k 0 --out out", "docs/building.md"),
        ("cache pull hf://datasets/a out", "docs/sharing.md"),
        ("cache info nowhere", "docs/building.md"),
        ("eval demo --tasks perplexty", "docs/evaluation.md"),
        ("train --cache nowhere --student demo --out out --loss jsd --beta 2", "docs/training.md"),
        ("experiment no-such", "docs/experiments.md"),
        ("cache pull x hf://datasets/a/b", "docs/cli.md"),
    ],
)
def test_an_error_links_to_the_page_of_the_part_that_raised_it(
    words: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_main(*words.split(), "--json", code=1)
    assert json.loads(done.stdout)["error"]["page"] == f"{PAGES}/{page}", done.stderr


def test_every_error_points_to_a_page_that_is_there() -> None:
    assert MissingPackageError.page == "README.md"
    every: list[type[kd.KdError]] = [kd.KdError, *kinds()]
    for one in every:
        assert (DOCS.parent / one.page).is_file(), one
    assert PAGES in TEXT
