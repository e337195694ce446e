"""In a notebook an example shows its text by itself: shaded, escaped, without a script."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.shaded_text import MOST_TOKENS, example_html, token_texts
from kd.cache_builder.store.row_figures import entropy_bounds, shade_levels

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m & \"'"


def shown_text(html: str) -> str:
    """What a reader sees, but for the caption."""
    body = html.partition("</small>")[2]
    return unescape(re.sub("<[^>]*>", "", body))


def test_an_example_shows_its_whole_text_shaded_by_its_entropy(cache: Path) -> None:
    reader = CacheReader(cache)
    for example in reader.read(range(len(reader))):
        html = example._repr_html_()
        assert "<script" not in html
        assert example.target in shown_text(html).replace("▪", "")
        levels = shade_levels(entropy_bounds(example.targets, 400)[0])
        assert len(re.findall("background:", html)) == (levels > 0).sum()
        assert f"probability {np.exp(np.float64(example.targets.gold_logprob[0])):.2g}" in html


def test_text_of_strangers_is_text(cache: Path) -> None:
    example = replace(CacheReader(cache)[0], prompt=HOSTILE, id=HOSTILE)
    html = example._repr_html_()
    assert "<script" not in html
    assert not re.search("[\x1b\u202e]", html)
    assert "&lt;script&gt;alert(1)" in html


def test_a_probability_that_is_a_bound_is_called_one(cache: Path) -> None:
    example = CacheReader(cache)[0]
    assert "at most" not in example._repr_html_()
    bounded = replace(example, gold_known=False)._repr_html_()
    assert bounded.count("probability at most") == (example.targets.gold_rank >= 8).sum() > 0


def test_a_reader_without_the_head_shows_the_text(cache: Path) -> None:
    reader = CacheReader(cache)
    reader.keep(["gold_ids", "gold_logprob", "gold_rank", "byte_length"])
    html = reader[0]._repr_html_()
    assert "entropy" not in html
    assert reader[0].target in shown_text(html).replace("▪", "")


def test_a_long_example_says_how_much_is_left(cache: Path) -> None:
    reader = CacheReader(cache)
    example = reader[0]
    rows = reader.read_rows(list(range(len(reader))) * 4)
    html = example_html("x", "", example.target, rows, np.array([[0, len(rows)]]))
    assert f"{len(rows) - MOST_TOKENS:,} tokens more" in html


def test_secrets_are_not_shown_and_tokens_keep_their_places() -> None:
    text = "see https://ann:word@host/x?key=abc now"
    ends = np.arange(3, len(text) + 3, 3)
    texts = token_texts(text, ends)
    assert "".join(texts) == "see https://********@host/x?key=*** now"
    assert [len(one) for one in texts[:-1]] == [3] * (len(texts) - 1)


@pytest.mark.parametrize("text", ["日本語 😀", "naïve", ""])
def test_token_texts_are_the_text(text: str) -> None:
    ends = np.arange(1, len(text.encode()) + 1)
    assert "".join(token_texts(text, ends)) == text
