"""A generated answer against the texts that are accepted: exact match, SQuAD's exact match and token F1, each 0..1.

All forgive what no reader would call a different answer, and say exactly what that is:

    exact match   equal after: white space collapsed and stripped, case folded, final . , ; : ! ? … removed
    SQuAD EM      equal words after SQuAD's own normalisation
    token F1      bag of words after SQuAD's own normalisation: lower case, ASCII punctuation and the articles
                  a, an, the removed, white space collapsed

A generated answer also stands for a choice where it is one, or begins with one (`named_choice`).

An example may have several references; its score is the best over them. Rajpurkar et al. 2016, arXiv:1606.05250;
`evaluate-v1.1.py` and, for answers without words, `evaluate-v2.0.py` of SQuAD.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from kd.data.rows.example import Example

FINAL = ".,;:!?…。！？"
"""Marks that may end a sentence. Brackets, signs and quotes are not among them, so `C++`, `50%` and `f()` keep theirs."""


def normalise_answer(text: str) -> str:
    """Collapse white space, fold case, drop final punctuation; a text of nothing else keeps it."""
    folded = " ".join(text.split()).casefold()
    return folded.rstrip(FINAL + " ") or folded


def exact_match(got: str, expected: str) -> float:
    """1 when both are the same answer after `normalise_answer`, else 0."""
    return float(normalise_answer(got) == normalise_answer(expected))


def squad_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation counts them."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def token_f1(got: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words, counted as often as they occur.

    2·common / (words got + words expected). Without words on either side: 1 when both have none, else 0.
    """
    words, wanted = squad_words(got), squad_words(expected)
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def squad_exact_match(got: str, expected: str) -> float:
    """1 when both are the same words after SQuAD's normalisation, else 0."""
    return float(squad_words(got) == squad_words(expected))


def references(example: Example) -> tuple[str, ...]:
    """The texts that are accepted."""
    return example.references or (example.target,)


def best_over(metric: Callable[[str, str], float], got: str, references: Sequence[str]) -> float:
    """The metric against the reference that suits the answer best."""
    return max(metric(got, expected) for expected in references)


def named_choice(got: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a generated answer names; None where it names none.

    The choice it equals after `normalise_answer`, else the longest one it begins with, as whole words: "Yes, because …"
    is yes, "Yesterday" is not, "no" and "not sure" differ. Of equal choices the first.
    """
    answer, texts = normalise_answer(got), [normalise_answer(choice) for choice in choices]
    if answer in texts:
        return texts.index(answer)
    begun = [text for text in texts if text and re.match(rf"{re.escape(text)}(?!\w)", answer)]
    return texts.index(max(begun, key=len)) if begun else None
