"""What was found in texts is counted with its first example, and read back from any provenance."""

from __future__ import annotations

from kd.data.tokenizing.token_notes import TokenNotes, joined_notes, recorded_notes


def test_a_note_has_its_count_and_the_first_example() -> None:
    notes = TokenNotes()
    notes.add({"bos_in_text": 0, "control_tokens_kept": 2}, "a")
    notes.add({"control_tokens_kept": 1}, "b")
    assert notes.document() == {"control_tokens_kept": {"count": 3, "first": "a"}}


def test_notes_of_several_caches_are_added() -> None:
    one, two = ({"token_notes": {"eos_in_text": {"count": n, "first": str(n)}}} for n in (1, 2))
    assert joined_notes([one, {}, two]) == {"eos_in_text": {"count": 3, "first": "1"}}


def test_what_is_no_such_record_is_passed_over() -> None:
    assert recorded_notes({}) is None
    assert recorded_notes({"token_notes": "x"}) is None
    strange = {
        "unheard": {"count": 1},
        "bos_in_text": 3,
        "eos_in_text": {"count": "4"},
        "control_tokens_kept": {"count": 2},
    }
    assert recorded_notes({"token_notes": strange}) == {"control_tokens_kept": {"count": 2, "first": "unknown"}}
