"""The record of what was left out adds up, survives JSON, and reads the records of older caches."""

from __future__ import annotations

import json

from kd.data.left_out import LeftOut, joined, recorded, said


def record() -> LeftOut:
    left_out = LeftOut()
    left_out.add("without_text", "a.csv:7")
    left_out.add("hidden_files", ".git", 2)
    left_out.add("without_text", "a.csv:9")
    left_out.add("too_long", "none", 0)
    return left_out


def test_words_name_the_reason_the_count_and_the_first() -> None:
    assert str(record()) == "hidden files 2 (first .git), without text 2 (first a.csv:7)"
    assert (str(LeftOut()), said(None)) == ("nothing", "unknown")


def test_a_record_survives_json() -> None:
    provenance = json.loads(json.dumps({"left_out": record().document()}))
    assert recorded(provenance) == record()
    assert recorded({"left_out": {}}) == LeftOut()


def test_joining_adds_counts_and_keeps_the_first_name() -> None:
    other = LeftOut()
    other.add("without_text", "b.csv:0", 5)
    together = joined([record(), other])
    assert (together.counts["without_text"], together.first["without_text"]) == (7, "a.csv:7")
    assert record().count("without_text") == 2


def test_older_caches_name_pairs_alone_and_other_things_are_passed_over() -> None:
    older = recorded({"overlong": {"dropped": 3, "truncated": 0}})
    assert older is not None
    assert older.counts == {"too_long": 3}
    assert recorded({}) is None
    assert recorded({"left_out": {"without_text": 3, "gone": {"count": 1}, "too_long": {"count": "x"}}}) == LeftOut()
