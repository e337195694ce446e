"""Lines of WikiText become articles."""

from __future__ import annotations

from table_files import ARTICLES

from kd.data.rows.wikitext import wikitext_articles


def test_wikitext_lines_join_into_articles_at_level_one_titles():
    found = list(wikitext_articles(ARTICLES.splitlines(keepends=True), "wikitext-2", "train"))
    assert [e.id for e in found] == ["train/0", "train/1"]
    assert found[0].target.startswith("= Valkyria Chronicles =")
    assert "= = Gameplay = =" in found[0].target
    assert found[1].target == "= M = \n\n A film with a short name .\n"


def test_wikitext_articles_keep_every_line():
    found = list(wikitext_articles(ARTICLES.splitlines(keepends=True), "wikitext-2", "train"))
    assert "".join("".join(e.target for e in found).split()) == "".join(ARTICLES.split())
