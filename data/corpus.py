"""`Corpus`: an ordered list of examples, where it came from, and what of its source was left out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.draws import kept_rows
from kd.data.left_out import LeftOut, joined
from kd.data.rows.example import Example, check_examples, text_digest
from kd.data.rows.row_examples import rows_to_examples
from kd.data.rows.row_reading import AUTO, Columns, RowReading
from kd.data.rows.tables import rows_in

HELLASWAG_SOURCES = re.compile(r"hella.?swag|wiki.?how|activity.?net", re.IGNORECASE)
"""Names of the benchmark HellaSwag, and of where its text is from."""


@dataclass(frozen=True)
class Corpus:
    """An ordered list of examples and where it came from."""

    spec: str
    """The spec as the user wrote it."""
    split: str
    kind: str
    """`documents` (cut into blocks), `pairs` (prompt and target, kept whole), `conversations` (see `chat_rows`), or
    `classes` (see `glue.CLASSES`)."""
    examples: tuple[Example, ...]
    source: dict[str, str]
    """Facts that identify the source besides its text, e.g. hub id, configuration and revision."""
    metrics: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Task -> metrics that its file names; empty where there are no task files."""
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """What of the source did not become an example, and why."""
    skip_bad: bool = False
    """Whether conversations that a template refuses are left out and counted, as rows that cannot be read are."""

    @property
    def digest(self) -> str:
        """Digest of the ordered text."""
        return text_digest(self.examples)

    def reading(self, left_out: LeftOut) -> Iterator[Example]:
        """The examples in their order. `left_out` receives what of the source is none."""
        left_out.include(self.left_out)
        yield from self.examples


def corpus_of_rows(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    columns: Columns | None = None,
    form: str = AUTO,
    bad_rows: str = "error",
    prompts: bool = False,
    limit: int | None = None,
) -> Corpus:
    """Rows in memory as a corpus: `text` makes documents, `prompt` and `target` pairs, `messages` conversations. Raises DataError.

    name      what errors and the ids of the examples (`name:0`, …) call the source
    names     columns of the rows
    columns   columns that are not called as their field is
    form      what the rows are, one of `row_reading.FORMATS`; `auto` is seen by the columns
    bad_rows  `skip` leaves out and counts rows that cannot be read; `error` raises the first of them
    prompts   whether a teacher is going to answer, so that conversations need no turn of the assistant
    limit     number of examples to keep, from the first
    """
    left_out, reading = LeftOut(), RowReading(columns or {}, form, bad_rows == "skip", prompts)
    kind, examples = rows_to_examples(
        rows,
        names,
        reading,
        where=name,
        location=rows_in(name),
        prefix=name,
        split="train",
        left_out=left_out,
    )
    source = {"source": "memory"}
    corpus = Corpus(name, "train", kind, tuple(examples), source, left_out=left_out, skip_bad=reading.skip)
    return usable_corpus(corpus, limit)


def usable_corpus(corpus: Corpus, limit: int | None) -> Corpus:
    """The corpus with `limit` of its examples that have text (see `draws`). Raises DataError where none are left."""
    examples = tuple(e for e in corpus.examples if e.target.strip())
    left_out = joined([corpus.left_out])
    for example in corpus.examples:
        if not example.target.strip():
            left_out.add("without_text", example.id)
    if limit is not None and limit < len(examples):
        kept = dict.fromkeys(kept_rows([e.answer for e in examples], [e.id for e in examples], limit))
        first = next(e.id for number, e in enumerate(examples) if number not in kept)
        left_out.add("beyond_limit", first, len(examples) - limit)
        examples = tuple(examples[number] for number in kept)
    if not examples:
        raise no_text(corpus.spec, corpus.split, left_out)
    check_examples(corpus.spec, examples)
    return replace(corpus, examples=examples, left_out=left_out)


def no_text(spec: str, split: str, left_out: LeftOut) -> DataError:
    """The error for a source without any text."""
    counts = f"0 examples; left out: {left_out}"
    return DataError("no text found", where=f"{spec} (split {split})", found=counts, try_="kd data show SPEC")
