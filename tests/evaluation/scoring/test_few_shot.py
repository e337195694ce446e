"""`--shots`: examples of the same task from the split train, the same ones whatever else is asked, and never the row itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import kd
from kd.common.errors import DataError
from kd.common.settings import make
from kd.data.rows.example import Example
from kd.data.sources import load_corpus
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluator import load_tasks
from kd.evaluation.scoring.few_shot import drawn_shots, shown_before, with_shots

MINI = {"data": "mini", "split": "heldout", "limit": 12}


def asked(**settings: Any):
    model_settings = make(EvalSettings, {"tasks": "choices", **MINI, **settings})
    return load_tasks(model_settings, kd.load_teacher("demo")[1])


def test_the_same_examples_stand_before_a_question_whatever_else_is_asked() -> None:
    train, heldout = load_corpus("mini", split="train"), load_corpus("mini", split="heldout", limit=30)
    shots = drawn_shots(heldout, train.examples, 3, seed=0)
    few = replace(heldout, examples=heldout.examples[20:9:-2])
    assert drawn_shots(few, train.examples, 3, seed=0).items() <= shots.items()
    assert drawn_shots(heldout, train.examples, 1, seed=0) == {i: s[:1] for i, s in shots.items()}
    assert drawn_shots(heldout, train.examples, 3, seed=1) != shots
    for example in heldout.examples:
        assert len({s.id for s in shots[example.id]}) == 3
        assert {(s.task, s.split) for s in shots[example.id]} == {(example.task, "train")}
    assert len({s.id for chosen in shots.values() for s in chosen}) > 30, "questions have examples of their own"


def test_a_row_is_never_its_own_example() -> None:
    train = load_corpus("mini", split="train", limit=40)
    twin = replace(train.examples[0], id="twin")
    pool = (*train.examples, twin)
    tasks = [e.task for e in pool]
    most = min(tasks.count(task) for task in set(tasks)) - 2
    shots = drawn_shots(train, pool, most, seed=0)
    for example in train.examples:
        assert all(s.id != example.id and s.prompt != example.prompt for s in shots[example.id])


def test_examples_are_written_as_prompt_separator_target_and_an_empty_line() -> None:
    shots = (Example("a", "yes", "Is it?"), Example("b", "no", "Was it?"))
    assert shown_before("Will it?", shots, "\n") == "Is it?\nyes\n\nWas it?\nno\n\nWill it?"
    assert shown_before("Will it?", (), "\n") == "Will it?"


def test_through_a_template_examples_are_turns() -> None:
    plain, chat = asked(shots=2), asked(shots=2, chat=True)
    for text, turns in zip(plain.corpus.examples, chat.corpus.examples, strict=True):
        messages = turns.conversation.messages
        assert [m.role for m in messages] == ["user", "assistant"] * 3
        before = [m.content for m in messages]
        assert (
            text.prompt
            == "".join(f"{q}\n{a}\n\n" for q, a in zip(before[:-2:2], before[1:-2:2], strict=True)) + before[-2]
        )


def test_the_report_says_so_and_contamination_looks_at_the_question_alone() -> None:
    loaded = asked(shots=2)
    assert loaded.plain.digest == load_corpus("mini", split="heldout", limit=12).digest
    assert loaded.corpus.digest != loaded.plain.digest
    figures = kd.evaluate("demo", "choices", **MINI, shots=1)
    assert figures.settings["choices"]["shots"] == "1"
    assert (
        figures.settings["choices"]["text_digest"]
        != kd.evaluate("demo", "choices", **MINI).settings["choices"]["text_digest"]
    )
    assert asked(shots=0).corpus == load_corpus("mini", split="heldout", limit=12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": "perplexity", "data": "demo"}, "have no examples before them"),
        ({"shots": 5000}, "too few other rows"),
    ],
)
def test_what_has_no_examples_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        asked(**({"shots": 2} | settings))


def test_texts_of_other_tasks_keep_what_they_are() -> None:
    corpus = load_corpus("mini", split="heldout", limit=3)
    shots = drawn_shots(corpus, load_corpus("mini", split="train").examples, 1, seed=0)
    shown = with_shots(corpus, shots, "\n")
    for before, after in zip(corpus.examples, shown.examples, strict=True):
        assert after.prompt.endswith(before.prompt)
        assert replace(after, prompt=before.prompt) == before
