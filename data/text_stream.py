"""`TextStream`: a text whose examples are read one after another and never held together.

    text = stream_text("texts/*.jsonl.gz")          # a TextStream, or a Corpus where the source is shuffled whole
    for example in text.reading(LeftOut()): ...

Files, folders and data sets of the hub are streams. Instruction tasks and mixtures are drawn and shuffled over all their
examples, so they are a `Corpus`, which is in memory. Both give their examples by `reading`. `in_memory` makes a corpus of a
stream: the same examples, in the same order, with the same ids and the same record of what was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kd.data.corpus import Corpus, no_text
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example, check_unicode, repeated_id
from kd.data.rows.seen_ids import SeenIds

ReadExamples = Callable[[LeftOut], Iterator[Example]]
"""Reads the examples from the beginning, and counts what is left out."""


@dataclass(frozen=True)
class TextStream:
    """An ordered text and where it comes from."""

    spec: str
    """The spec as the user wrote it."""
    split: str
    kind: str
    """`documents`, `pairs` or `conversations`, see `Corpus`."""
    source: dict[str, str]
    """Facts that identify the source besides its text."""
    read: ReadExamples
    """The examples as the source gives them, with those that have no text."""
    limit: int | None = None
    """Number of examples to keep, from the first."""
    skip_bad: bool = False
    """As `Corpus.skip_bad`."""
    ids_given: bool = False
    """Whether a column holds the ids, so that one may occur twice."""
    endless: bool = False
    """Whether to stop at the limit, and not to count what comes after it: all of it would have to be fetched."""
    once: bool = False
    """Whether it can be read only once, as a generator."""

    def reading(self, left_out: LeftOut) -> Iterator[Example]:
        """The examples that have text, in their order. Raises DataError where there is none, or where an id occurs twice.

        left_out   receives what of the source is no example; it is whole when the last example was read
        """
        passed, seen, kept = LeftOut(), SeenIds(), 0
        for example in self.read(left_out):
            if not example.target.strip():
                passed.add("without_text", example.id)
            elif self.limit is not None and kept >= self.limit:
                passed.add("beyond_limit", example.id)
            else:
                check_unicode(self.spec, example)
                self._refuse_repeated(seen.add(example.id) if self.ids_given else None)
                kept += 1
                yield example
                if self.endless and kept == self.limit:
                    break
        self._refuse_repeated(seen.repeated())
        left_out.include(passed)
        if not kept:
            raise no_text(self.spec, self.split, left_out)

    def _refuse_repeated(self, name: str | None) -> None:
        if name is not None:
            raise repeated_id(self.spec, name)


Text = Corpus | TextStream
"""A text of either kind."""


def in_memory(text: Text) -> Corpus:
    """The text with all its examples in memory. Raises DataError as `TextStream.reading`."""
    if isinstance(text, Corpus):
        return text
    left_out = LeftOut()
    examples = tuple(text.reading(left_out))
    return Corpus(text.spec, text.split, text.kind, examples, text.source, left_out=left_out, skip_bad=text.skip_bad)


def without_examples(text: Text) -> Corpus:
    """What is known of a text besides its examples."""
    return Corpus(text.spec, text.split, text.kind, (), text.source, skip_bad=text.skip_bad)
