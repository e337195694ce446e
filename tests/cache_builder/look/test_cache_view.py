"""Every kind of cache shows what it holds, and says what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.cache_builder.look.cache_view import CacheView
from kd.cache_builder.showing import show_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError

KEYS = {"cache", "notes", "example", "picked", "question", "found", "total", "compared"}
TOKEN_KEYS = (
    *("token", "text", "id", "piece", "entropy_at_least", "entropy_at_most", "logprob", "probability", "rank"),
    *("is_bound", "kept", "tail_mass", "top", "draws"),
)


def test_the_first_view_is_the_first_example_and_says_how_to_go_on(cache: Path) -> None:
    view = show_cache(cache)
    assert view.example is not None
    assert view.example.number == 0
    assert CacheReader(cache)[0].target in str(view)
    assert f"kd cache show {cache} 0 --token" in str(view)
    assert view.notes == []


def test_documents_have_their_text_in_one_part_token_by_token(cache: Path) -> None:
    reader = CacheReader(cache)
    for number in (0, 3, len(reader) - 1):
        view = show_cache(reader, number)
        assert view.example is not None
        part = view.example.parts[-1]
        assert part.text == reader[number].target == "".join(t.text for t in part.tokens)
        nats = [t.entropy_at_least or 0 for t in view.picked]
        assert nats == sorted((t.entropy_at_least or 0 for t in view.example.tokens), reverse=True)[:3]


def test_the_document_has_its_keys_and_is_json(cache: Path) -> None:
    for view in (show_cache(cache, 1), show_cache(cache, uncertain=2), show_cache(cache, search="fox")):
        document = json.loads(json.dumps(view.document, allow_nan=False))
        assert set(document) == KEYS
        for found in document["found"]:
            assert {"example", "id", "before", "text", "after"} <= set(found)
    token = show_cache(cache, 1).document["example"]["parts"][-1]["tokens"][0]
    assert set(token) == set(TOKEN_KEYS)
    assert set(token["top"][0]) == {"id", "text", "probability"}


def test_found_tokens_stand_in_their_text(cache: Path) -> None:
    reader = CacheReader(cache)
    view = show_cache(cache, surprising=5)
    assert view.total == reader.manifest.rows
    for one in view.found:
        assert one.token is not None
        text = reader[one.example].target
        assert one.before + one.text + one.after in reader[one.example].prompt + text
        assert one.around[one.token.number - one.around[0].number] == one.token
    probabilities = [one.token.logprob for one in view.found if one.token]
    assert probabilities == sorted(probabilities)


def test_a_searched_text_is_shown_as_it_is_written(cache: Path) -> None:
    view = show_cache(cache, search="THE FOX", limit=1)
    assert [one.text.casefold() for one in view.found] == ["the fox"]
    assert view.total > 1
    assert "the fox]" in str(view)


def test_a_question_about_one_example_picks_its_tokens(cache: Path) -> None:
    view = show_cache(cache, 2, surprising=4)
    assert view.example is not None
    assert [t.logprob for t in view.picked] == sorted(t.logprob for t in view.example.tokens)[:4]


def test_conversations_are_shown_turn_by_turn(chat: CacheReader) -> None:
    view = show_cache(chat, 0)
    assert view.example is not None
    roles = [part.role for part in view.example.parts]
    assert roles[0] == "tools"
    assert "user" in roles
    scored = [part for part in view.example.parts if part.tokens]
    assert {part.role for part in scored} == {"assistant"}
    assert "".join(part.text for part in scored) == chat[0].target
    assert len(view.example.tokens) == len(chat[0].targets)
    for part in scored:
        assert "".join(t.text for t in part.tokens) == part.text


def test_classes_have_names(glue_root: Path, layouts: dict[str, Path], make_classifier, tmp_path: Path) -> None:
    from terminal import kd

    teacher = make_classifier(tmp_path, "sst2", layouts["gpt2"], seed=7)
    data = ["--teacher", teacher, "--data", "glue/sst2", "--task-root", glue_root, "--limit", 4, "--device", "cpu"]
    kd("cache", "build", *data, "--out", tmp_path / "c")
    view = show_cache(tmp_path / "c", 0)
    assert view.example is not None
    assert [part.role for part in view.example.parts] == ["text", "label"]
    (token,) = view.example.tokens
    labels = CacheReader(tmp_path / "c").manifest.labels
    assert {one.text for one in token.top} == set(labels)
    assert token.piece in labels
    assert token.entropy_at_least == pytest.approx(token.entropy_at_most)


@pytest.mark.parametrize(
    ("profile", "settings", "said"),
    [
        ("uld", {"tail_bands": 4}, "no ids of the most probable tokens"),
        ("sampled", {"samples": 6}, "Draws are kept in place"),
    ],
)
def test_what_a_profile_leaves_out_is_said(of_profile, profile: str, settings: dict, said: str) -> None:
    view = show_cache(of_profile(profile, **settings))
    assert any(said in note for note in view.notes)
    assert said in str(view)


def test_what_an_imported_cache_does_not_know_is_said(renormalised: CacheReader) -> None:
    said = str(show_cache(renormalised))
    for words in (
        "no other temperature",
        "Nobody knows the probability beyond",
        "upper bound",
        "spelled from the token ids",
    ):
        assert words in said
    assert "nats among the kept tokens" in said


def test_a_part_of_a_cache_is_shown_as_far_as_it_goes(cache: Path, tmp_path: Path) -> None:
    from kd.cache_builder.share.pull import pull
    from kd.common.progress import final

    final(pull(str(cache), tmp_path / "part", arrays=lambda _: []))
    view = show_cache(tmp_path / "part", 0)
    assert any("not in this copy" in note for note in view.notes)
    assert "entropy        unknown" in str(view)
    assert CacheReader(cache)[0].target in str(view)


@pytest.mark.parametrize(
    ("example", "settings", "words"),
    [
        (10**6, {}, "no such example"),
        (0, {"token": 10**6}, "no such token"),
        (None, {"uncertain": 1, "search": "x"}, "one question at a time"),
        (None, {"uncertain": 1, "token": 2}, "without a search"),
        (0, {"search": "x"}, "whole cache"),
        (None, {"search": ""}, "nothing to search"),
        (None, {"uncertian": 3}, "unknown setting"),
        (None, {"html": "."}, "this is a folder"),
    ],
)
def test_wrong_questions_are_refused(cache: Path, example: int | None, settings: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        show_cache(cache, example, **settings)


def test_a_mixture_is_refused(cache: Path, of_profile) -> None:
    with pytest.raises(DataError, match="several caches"):
        show_cache(f"{cache}=0.5,{cache}=0.5")


def test_a_view_is_its_text(cache: Path) -> None:
    view = show_cache(cache, 0)
    assert isinstance(view, CacheView)
    assert repr(view) == str(view)
