"""docs/footguns.md: every sentence about what kd does has a test, and the test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "footguns.md"


def rows() -> list[list[str]]:
    """Mistake, reaction and test of every row of the page's tables."""
    text = PAGE.read_text(encoding="utf-8").replace(r"\|", "/")
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "| " in line]
    return [row for row in cells if row[0].startswith("**")]


def test_the_page_has_as_many_mistakes_as_its_title_says() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith("# Twenty mistakes")
    assert len(rows()) == 20
    assert all(len(row) == 3 for row in rows())


def test_every_mistake_names_a_test_that_is_there_and_runs_by_default() -> None:
    for mistake, _, named in rows():
        file, _, name = named.strip("`").partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert found, f"{mistake}: {named}"
        marks = " ".join(ast.unparse(decorator) for decorator in found[0].decorator_list)
        assert not re.search(r"\bslow\b", marks), named
