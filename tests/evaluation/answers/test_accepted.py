"""Worked cases of answer normalisation, and what SQuAD's own script gives."""

from __future__ import annotations

import pytest

from kd.evaluation.answers.accepted import best_over, exact_match, named_choice, normalise_answer, squad_words, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Yes. ", "yes"),
        ("It's\n not\tpossible  to say", "it's not possible to say"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("really?!", "really"),
        ("wait . . .", "wait"),
        ("C++", "c++"),
        ("50%", "50%"),
        ("f(x)", "f(x)"),
        ("3.14", "3.14"),
        ('"quoted".', '"quoted"'),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalise_answer(text, expected):
    assert normalise_answer(text) == expected
    assert normalise_answer(expected) == expected


def test_an_answer_of_marks_alone_is_not_equal_to_another():
    assert exact_match("?", "!") == 0
    assert exact_match("", "?") == 0


def test_articles_and_inner_marks_count_for_exact_match_and_not_for_f1():
    assert exact_match("the fox", "fox") == 0
    assert token_f1("the fox", "fox") == 1
    assert exact_match("red, fox", "red fox") == 0
    assert token_f1("red, fox", "red fox") == 1


def test_squad_words_drop_punctuation_before_articles():
    assert squad_words("The U.S. an  anthem, a-b") == ["us", "anthem", "ab"]


@pytest.mark.parametrize(
    ("got", "expected", "value"),
    [
        ("to the big river", "to the river", 4 / 5),  # 2 common of 3 and 2 words
        ("fox fox", "fox", 2 / 3),
        ("ships", "fox", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("fox", "", 0.0),
        ("...", "fox", 0.0),
    ],
)
def test_token_f1(got, expected, value):
    assert token_f1(got, expected) == pytest.approx(value, rel=1e-12)
    assert token_f1(expected, got) == pytest.approx(value, rel=1e-12)


def test_the_best_reference_counts():
    assert best_over(exact_match, "four", ("4", "Four.")) == 1
    assert best_over(token_f1, "a red fox", ("ships", "red fox", "fox")) == 1


@pytest.mark.parametrize(
    ("got", "choices", "index"),
    [
        ("Yes.", ("no", "yes"), 1),
        ("Yes, because it rained", ("no", "yes"), 1),
        ("Yesterday", ("no", "yes"), None),
        ("not sure", ("no", "not sure"), 1),
        ("no, not sure", ("no", "not sure"), 0),
        ("not sure at all", ("not", "not sure"), 1),
        ("It's impossible to say, no", ("Yes", "It's impossible to say", "No"), 1),
        ("The answer is yes", ("no", "yes"), None),
        ("", ("no", "yes"), None),
        ("C++ it is", ("C", "C++"), 1),
        ("same", ("Same", "same."), 0),
    ],
)
def test_an_answer_names_the_choice_it_begins_with(got, choices, index):
    assert named_choice(got, choices) == index
