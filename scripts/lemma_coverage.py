"""How many of the words that CommonGen's references had to use each way of comparing words finds in them.

    python scripts/lemma_coverage.py DATA/tasks/common_gen/dev.jsonl

`right`: a row's own concepts in its own sentence, which people wrote to hold them all. `shuffled`: in another row's
sentence, where whatever is found beyond what the best way finds is a mistake. The last is the way of
`kd.evaluation.answers.answer_metrics`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import simplemma
from nltk.stem.porter import PorterStemmer

from kd.evaluation.answers.answer_metrics import word_forms

STEMMER = PorterStemmer()
WAYS: dict[str, Callable[[str], frozenset[str]]] = {
    "as it stands": lambda word: frozenset([word]),
    "stem (Porter)": lambda word: frozenset([STEMMER.stem(word)]),
    "lemma (simplemma)": lambda word: frozenset([simplemma.lemmatize(word, lang="en").lower()]),
    "form, lemma or stem": word_forms,
}


def share(forms: Callable[[str], frozenset[str]], rows: list[tuple[list[str], str]]) -> float:
    """Mean share of concepts found."""
    total = 0.0
    for concepts, text in rows:
        used = frozenset().union(*(forms(w) for w in re.findall(r"\w+(?:['’-]\w+)*", text.lower())))
        total += sum(bool(forms(c.lower()) & used) for c in concepts) / len(concepts)
    return total / len(rows)


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    rows = [(row["concepts"], row["target"]) for row in map(json.loads, lines)]
    texts = [text for _, text in rows]
    random.Random(0).shuffle(texts)
    shuffled = [(concepts, text) for (concepts, _), text in zip(rows, texts, strict=True)]
    print(f"{len(rows)} rows{'':>14}right  shuffled")
    for name, forms in WAYS.items():
        print(f"{name:<22} {share(forms, rows):7.4f}  {share(forms, shuffled):8.4f}")


if __name__ == "__main__":
    main()
