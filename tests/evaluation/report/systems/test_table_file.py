"""Files of tables: what they say, and what is refused with the place of the mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.evaluation.report.systems.table_file import load_table, table_names

OWN = """
about: Mine
columns:
  - {title: A, metric: accuracy/a, scale: 100, digits: 1}
  - {title: B, metric: rougeL/b}
  - {title: B2, metric: bertscore/b}
means: [metrics, tasks]
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


def test_a_table_of_ones_own_has_titles_units_and_means(tmp_path: Path) -> None:
    table = load_table(written(tmp_path, OWN))
    assert (table.name, table.about, dict(table.blocks)) == ("own", "Mine", {"": ""})
    assert [(c.title, c.task, c.scale, c.digits) for c in table.columns] == [
        ("A", "a", 100, 1),
        ("B", "b", 1, 3),
        ("B2", "b", 1, 3),
    ]
    assert table.mean_titles == {"metrics": "mean of 3 metrics", "tasks": "mean of 2 tasks"}


def test_the_tables_of_the_package_load() -> None:
    assert table_names() == ["neo-wikitext", "oscarnav-four", "oscarnav-ten"]
    assert [len(load_table(name).columns) for name in table_names()] == [3, 4, 11]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("about: x", "no columns"),
        ("columns: {}", "no columns"),
        ("columns: x", "not a list"),
        ("columns: [x]", "not a mapping"),
        ("columns: [{title: A}]", "missing"),
        ("columns: [{title: A, metric: 7}]", "missing"),
        ("columns: [{title: A, metrik: a}]", "unknown key"),
        ("columns: [{title: A, metric: a}, {title: A, metric: b}]", "same title"),
        ("columns: [{title: A, metric: a, digits: 70}]", "digits"),
        ("columns: [{title: A, metric: a, scale: true}]", "no number"),
        ("{columns: [{title: A, metric: a}], means: [median]}", "unknown mean"),
        ("{columns: [{title: A, metric: a}], blocks: [train]}", "not a mapping"),
        ("{columns: [{title: A, metric: a}], published: {row: []}}", "unknown key"),
        (
            "{columns: [{title: A, metric: a}], published: {rows: [{label: x, model: m, trained: SFT}]}}",
            "kind of training",
        ),
        (
            "{columns: [{title: A, metric: a}], published: {rows: [{label: x, model: m, figures: {test: {A: 1}}}]}}",
            "unknown block",
        ),
        (
            "{columns: [{title: A, metric: a}], published: {rows: [{label: x, model: m, figures: {'': {B: 1}}}]}}",
            "unknown column",
        ),
        (
            "{columns: [{title: A, metric: a}], published: {rows: [{label: x, model: m, figures: {'': {A: x}}}]}}",
            "no number",
        ),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_table(written(tmp_path, text))


def test_an_unknown_table_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match="unknown table") as caught:
        load_table("oscarnav-tem")
    assert caught.value.details["did you mean"] == "oscarnav-ten"
