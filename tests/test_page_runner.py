"""The runner of pages: what a page must say to pass, and that a page that lies fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_runner import alike, blocks, require_printed, run_page, typed_commands


def test_blocks_come_in_order_with_their_lines() -> None:
    text = "# Page\n\n    kd a \\\n        --b 1\n    other\n\n```yaml\n# x.yaml\na: 1\n```\n\n```\nout\n```\n"
    assert [(b.language, b.line) for b in blocks(text)] == [("shell", 3), ("yaml", 7), ("", 12)]


def test_commands_are_joined_over_lines(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "    kd a \\\n        --b 1\n    $EDITOR x\n    python examples/y.py  # why\n    python -m venv x\n",
        encoding="utf-8",
    )
    assert typed_commands(tmp_path / "page.md") == ["kd a --b 1", "python examples/y.py # why"]


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("perplexity  12.3 ± 1", "  perplexity 12.4 ± 1.02", True),
        ("perplexity  12.3", "perplexity 14", False),
        ("took …, done", "took 3 h, done", True),
        ("rows  1,234", "rows  1,230", True),
        ("a 1", "a 1 2", False),
        ("T=1 at 2", "T=1 at 2", True),
        ("kl [2]", "kl [2]", True),
    ],
)
def test_lines_are_compared_word_for_word_and_numbers_roughly(expected: str, found: str, same: bool) -> None:
    assert alike(expected, found) is same


def test_lines_must_come_in_order() -> None:
    require_printed("a\n…\nc\n", "a\nb\nc\n", "here")
    with pytest.raises(AssertionError, match="here: not printed: 'a'"):
        require_printed("c\na\n", "a\nb\nc\n", "here")


def test_a_page_that_lies_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    kd cache info nowhere  # exit code 1\n\n```\nCacheError: this is not a cache\n```\n", encoding="utf-8"
    )
    assert "no such directory" in run_page(page, tmp_path)["kd cache info nowhere # exit code 1"]
    page.write_text("    kd cache info nowhere\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="exit 1") as caught:
        run_page(page, tmp_path)
    assert "page.md, line 1" in str(caught.value.__notes__)
    page.write_text("```python\nprint(1 + 1)\n```\n\n```\n3\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="not printed: '3'"):
        run_page(page, tmp_path)
