"""Examples before a question (`--shots N`): rows of the same task from the split train, drawn by (seed, id) alone.

As text, each example is its prompt, the separator and its target, and an empty line parts it from what follows, as in
lm-evaluation-harness. Through a chat template (`--chat`), each is a turn of the user and one of the assistant.

A row is never its own example: rows of its id or of its prompt are passed over. Brown et al. 2020, arXiv:2005.14165.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.rows.example import Example

BETWEEN_EXAMPLES = "\n\n"
POOL = 1000
"""Most rows of a task's split train that examples are drawn from."""
Shots = Mapping[str, Sequence[Example]]
"""Id of a question -> the examples before it."""


def drawn_shots(corpus: Corpus, pool: Sequence[Example], count: int, *, seed: int) -> dict[str, tuple[Example, ...]]:
    """`count` examples of the same task for every question. Raises DataError where a task has too few."""
    by_task: dict[str, list[Example]] = {}
    for example in pool:
        by_task.setdefault(example.task, []).append(example)
    return {e.id: _of_one(e, by_task.get(e.task, []), count, seed) for e in corpus.examples}


def _of_one(asked: Example, rows: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    digest = hashlib.blake2b(f"{seed}/{asked.id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(rows)).tolist()
    others = (rows[i] for i in order if rows[i].id != asked.id and rows[i].prompt != asked.prompt)
    chosen = tuple(example for example, _ in zip(others, range(count), strict=False))
    if len(chosen) < count:
        raise DataError(
            "a task has too few other rows for its examples",
            where=f"{asked.task}, split train",
            found=f"{len(chosen)} rows besides {asked.id}",
            expected=f"at least {count}, for --shots {count}",
        )
    return chosen


def with_shots(corpus: Corpus, shots: Shots, between: str) -> Corpus:
    """The corpus with the examples written before each prompt.

    between   text between a prompt and its target
    """
    return replace(
        corpus, examples=tuple(replace(e, prompt=shown_before(e.prompt, shots[e.id], between)) for e in corpus.examples)
    )


def shown_before(prompt: str, shots: Sequence[Example], between: str) -> str:
    """The examples, then the prompt."""
    return "".join(f"{shot.prompt}{between}{shot.target}{BETWEEN_EXAMPLES}" for shot in shots) + prompt
