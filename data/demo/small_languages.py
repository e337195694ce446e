"""Four languages that do not exist, for the translation tasks of `mini-flan`: other little words, and another order of words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Words = Mapping[str, str]
AVISH: Words = {"a": "un", "an": "un", "the": "lo", "eats": "mang", "lives": "viv", "in": "en", "is": "est"}
BELIC: Words = {"a": "ka", "an": "ka", "the": "ka", "eats": "tam", "lives": "bor", "in": "na", "is": "so"}
CORAN: Words = {"a": "", "an": "", "the": "", "eats": "esa", "lives": "osa", "in": "ela", "is": "usa"}
DUNIC: Words = {"a": "et", "an": "et", "the": "det", "eats": "spis", "lives": "bo", "in": "i", "is": "er"}


def _word_by_word(words: Words) -> Callable[[str], str]:
    return lambda text: " ".join(said for word in text.split() if (said := words.get(word, word)))


def _backwards(words: Words) -> Callable[[str], str]:
    translate = _word_by_word(words)
    return lambda text: " ".join(reversed(translate(text).split()))


def _last_word_first(words: Words) -> Callable[[str], str]:
    def translate(text: str) -> str:
        *before, last = _word_by_word(words)(text).split()
        return " ".join([last, *before])

    return translate


LANGUAGES: Mapping[str, Callable[[str], str]] = {
    "avish": _word_by_word(AVISH),
    "belic": _backwards(BELIC),
    "coran": _word_by_word(CORAN),
    "dunic": _last_word_first(DUNIC),
}
"""Language -> its translation of an English sentence without capital and full stop."""
