"""Choices beside messages and prompts: read for evaluations, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.common.errors import DataError
from kd.data.sources import load_corpus
from kd.evaluation.scoring.chat_asking import ChatAsking, with_chat
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.tokenizer import load_tokenizer

ASKED = {"role": "user", "content": "Two plus two?"}
FOUR = {"role": "assistant", "content": "Four."}
CHOICES = ["Five.", "Four."]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def corpus(*rows: dict[str, Any], **more: Any) -> Any:
        file = tmp_path / "chat.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_corpus(str(file), **{"choices": True, **more})

    return corpus


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED], "choices": CHOICES, "answer": 1},
        {"messages": [ASKED], "choices": CHOICES, "answer": "1"},
        {"messages": [ASKED], "choices": json.dumps(CHOICES), "answer": " Four."},
        {"messages": [ASKED, FOUR], "choices": CHOICES},
        {"messages": [ASKED, FOUR], "choices": CHOICES, "answer": 1},
        {"conversations": [{"from": "human", "value": "Two plus two?"}], "choices": CHOICES, "answer": 1},
    ],
)
def test_the_right_choice_is_the_last_turn(read, row: dict[str, Any]) -> None:
    corpus = read(row)
    (example,) = corpus.examples
    assert (example.choices, example.answer) == (tuple(CHOICES), 1)
    assert [(m.role, m.content) for m in example.conversation.messages] == [
        ("user", "Two plus two?"),
        ("assistant", "Four."),
    ]
    assert corpus.left_out.document() == {}


def test_a_choice_beside_messages_has_the_ids_of_one_beside_a_prompt(read) -> None:
    tokenizer = load_tokenizer("demo")
    asking = ChatAsking.of(tokenizer, ReadingOptions(chat_template="plain"))
    (chat,) = read({"messages": [ASKED], "choices": CHOICES, "answer": 1}).examples
    pairs = read({"prompt": ASKED["content"], "target": "Four.", "choices": CHOICES})
    (pair,) = with_chat(pairs).examples
    assert (pair.choices, pair.answer) == (chat.choices, chat.answer)
    (context, options), (other, others) = asking.options(chat), asking.options(pair)
    np.testing.assert_array_equal(context, other)
    assert [ids.tolist() for ids in options] == [ids.tolist() for ids in others]


def test_a_pair_without_a_target_gets_the_right_choice(read) -> None:
    (example,) = read({"prompt": "Two plus two?", "target": "", "choices": CHOICES, "answer": 1}).examples
    assert (example.target, example.answer) == ("Four.", 1)


def test_only_an_evaluation_reads_them(read) -> None:
    row = {"messages": [ASKED, FOUR], "choices": "no list", "answer": 9}
    corpus = read(row, choices=False)
    assert corpus.examples[0].choices == ()
    assert corpus.left_out.document()["other_fields"]["count"] == 2
    with pytest.raises(DataError, match="by an evaluation alone"):
        read(row, choices=False, columns={"choices": "options"})


def test_columns_may_have_other_names_and_a_row_may_have_no_choices(read) -> None:
    rows = [{"messages": [ASKED], "options": CHOICES, "label": 1}, {"messages": [ASKED, FOUR], "options": None}]
    first, second = read(*rows, columns={"choices": "options", "answer": "label"}).examples
    assert (first.answer, second.choices) == (1, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 2}, "none of the choices"),
        ({"answer": True}, "none of the choices"),
        ({"answer": "Six."}, "none of the choices"),
        ({"answer": None}, "nothing says which choice"),
        ({"messages": [ASKED, FOUR], "answer": 0}, "two right choices"),
        ({"messages": [ASKED, {"role": "assistant", "content": "Six."}], "answer": None}, "none of the choices"),
        ({"choices": ["Four."]}, "no choices"),
        ({"choices": ["Four.", " "]}, "no choices"),
        ({"choices": ["Four.", 4]}, "not text"),
        ({"choices": ["Four.", " Four."]}, "the same"),
        ({"choices": "Four."}, "not a list"),
    ],
)
def test_what_is_no_choice_is_an_error_or_left_out(read, change: dict[str, Any], words: str) -> None:
    good = {"messages": [ASKED], "choices": CHOICES, "answer": 1}
    with pytest.raises(DataError, match=words):
        read(good | change)
    corpus = read(good, good | change, bad_rows="skip")
    assert len(corpus.examples) == 1
    assert corpus.left_out.document()["bad_rows"]["count"] == 1
