"""Sources that are known by a name."""

from __future__ import annotations

import pytest

from kd.common.errors import DataError
from kd.data.sources import load_corpus


def test_an_unknown_demo_split_suggests_the_nearest():
    with pytest.raises(DataError) as caught:
        load_corpus("demo:heldot")
    assert caught.value.details["did you mean"] == "heldout"


def test_the_demo_loads_by_name_with_a_limit(monkeypatch: pytest.MonkeyPatch):
    from kd.data import named_sources
    from kd.data.demo import stdlib_text

    monkeypatch.setattr(stdlib_text, "documents", lambda split: iter([("topic:a", f"A of {split}"), ("topic:b", "B")]))
    named_sources._demo.cache_clear()
    try:
        corpus = load_corpus("demo:validation", limit=1)
    finally:
        named_sources._demo.cache_clear()
    assert [(e.id, e.target, e.split) for e in corpus.examples] == [("topic:a", "A of heldout", "heldout")]
