"""Cached conversations in the student's own tokens and template, aligned turn by turn with the teacher's.

The student's template renders the same messages. Each turn of the assistant that the teacher has scored is found in that
rendering. The two texts of a turn are compared without white space around them: where one holds the other (a template that
adds the reasoning, or a space before the answer), the common part is aligned by bytes. A turn whose texts have nothing in
common, or that the student's template shows in another rendering, has no groups; `unmatched` counts them. The control tokens
that end a turn are a group of their own. The cross-entropy compares nothing: it learns every turn of the student's rendering.

A student with the teacher's tokenizer, and without a template of its own choice, reads the cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kd.cache_builder.store.example_table import gaps_at
from kd.cache_builder.store.readers.reading import CachedExample, Reader
from kd.common.errors import DataError
from kd.data.chat_rows import as_far_as_written, first_turns, rows_of_turns
from kd.data.conversations.conversation import Conversation, conversation_from_json
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.chat.chat_template import ChatTemplate
from kd.models.chat.scored_turns import RenderedConversation, render_conversation
from kd.models.tokenizer import Tokenizer, token_bytes
from kd.student_trainer.batches.alignment import Alignment, Side, align, one_alignment
from kd.student_trainer.batches.student_text import StudentExample


class StudentChat:
    """Every conversation of a cache as the student reads it; tokenised once, before the first step."""

    def __init__(
        self, reader: Reader, tokenizer: Tokenizer, *, window: int | None, template: ChatTemplate | None
    ) -> None:
        """Render and tokenise every conversation.

        window     most tokens of a conversation; later turns that do not fit are cut off
        template   the student's; None = the cached tokens are the student's own

        Raises DataError where the template refuses a conversation.
        """
        self.truncated = 0
        """Conversations whose last turns did not fit the window."""
        self.turns = 0
        """Turns that the teacher has scored."""
        self.unmatched = 0
        """Those of them that are not compared."""
        self.unshown = 0
        """Those of them that are not in the student's text: its template shows them in another rendering, or they did not fit."""
        self.template = template
        self._pieces = [] if template is None else token_bytes(tokenizer)
        self._window = window or 2**31
        self._count = len(reader)
        self._examples: dict[int, StudentExample] = {}
        self._sides: dict[int, list[tuple[Side, Side]]] = {}
        for number, cached, conversation in _conversations(reader):
            row = cached if template is None else self._rendered(cached, conversation)
            fitted = row
            if row is not None and len(row.input_ids) > self._window:
                fitted = first_turns(row, self._window)
            self.truncated += fitted is not row
            self._add(number, cached, fitted)

    def __getitem__(self, example: int) -> StudentExample:
        return self._examples[example]

    def named_ids(self) -> Iterator[tuple[str, np.ndarray]]:
        """As `StudentText.named_ids`."""
        return ((f"conversation {number}", example.input_ids) for number, example in self._examples.items())

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """As `StudentText.lengths`."""
        tokens, rows = np.zeros(self._count, dtype=np.int64), np.zeros(self._count, dtype=np.int64)
        for number, example in self._examples.items():
            tokens[number], rows[number] = len(example.input_ids), len(example.target_ids)
        return tokens, rows

    def aligned(self, example: CachedExample, *, mode: str, eos: bool) -> Alignment:
        """As `StudentText.aligned`."""
        teacher_row = student_row = 0
        parts: list[Alignment] = []
        for teacher, student in self._sides[example.index]:
            parts.append(align(teacher, student, mode=mode, eos=eos).shifted(teacher_row, student_row))
            teacher_row, student_row = teacher_row + len(teacher.byte_end), student_row + len(student.byte_end)
        return one_alignment(parts)

    def _rendered(self, cached: TokenRows, conversation: Conversation) -> TokenRows | None:
        """The turns of a cached example in the student's rendering that shows most of them; None where it shows none.

        A turn of which the student's template writes no text (it knows no calls of tools) is not shown: its end token would
        teach the student to answer nothing.
        """
        assert self.template is not None
        try:
            renderings = render_conversation(
                self.template,
                self._pieces,
                conversation.for_template(),
                tools=conversation.tools,
                learned=cached.messages,
            )
        except DataError as error:
            details = {"where": f"conversation {cached.example.id}", "found": error.details.get("found")}
            raise DataError(f"the student's template: {error.headline}", **details) from error
        controls = self.template.control_ids
        renderings = tuple(as_far_as_written(rendering, conversation, controls) for rendering in renderings)
        best = max(reversed(renderings), key=lambda rendering: len(_shown(rendering, cached.messages)))
        written = {message for message, text, _ in _turns(cached) if text.strip()}
        shown = [turn for turn in _shown(best, cached.messages) if turn.text.strip() or turn.message not in written]
        return rows_of_turns(cached.example, best, shown) if shown else None

    def _add(self, number: int, cached: TokenRows, student: TokenRows | None) -> None:
        """Note an example, and the two sides of each of its turns."""
        if student is None:  # not even the first turn fits: nothing is left to score
            nothing = np.zeros(0, dtype=np.int64)
            student = TokenRows(cached.example, cached.context_ids[:1], cached.target_ids[:0], nothing)
        texts = {message: (text, side) for message, text, side in _turns(student)}
        sides: list[tuple[Side, Side]] = []
        for message, text, side in _turns(cached):
            theirs = texts.get(message)
            pair = None if theirs is None else common_sides(text, side, *theirs)
            self.turns += 1
            self.unmatched += pair is None
            self.unshown += theirs is None
            empty = Side(np.zeros(0, dtype=np.int64))
            sides.append(pair or (Side(side.byte_end), empty if theirs is None else apart(theirs[1])))
        self._sides[number] = sides
        first = sides[0][1] if sides else Side(np.zeros(0, dtype=np.int64))
        self._examples[number] = StudentExample(student.context_ids, student.target_ids, first, student.gaps)


def apart(side: Side) -> Side:
    """A side that shares no byte with another: all its tokens end beyond any text."""
    return replace(side, byte_end=np.full(len(side.byte_end), 2**62), has_eos=False, start=2**62)


def common_sides(text: bytes, side: Side, other_text: bytes, other: Side) -> tuple[Side, Side] | None:
    """The two sides of a turn in the bytes of the text that both have; None where neither text holds the other.

    White space around the texts counts as no bytes.
    """
    bare, other_bare = text.strip(), other_text.strip()
    common = min(bare, other_bare, key=len)
    at, other_at = bare.rfind(common), other_bare.rfind(common)  # the answer ends a turn, reasoning comes before it
    if at < 0 or other_at < 0:
        return None
    return _moved(side, text, at), _moved(other, other_text, other_at)


def _moved(side: Side, text: bytes, at: int) -> Side:
    """A side whose byte 0 is the byte `at` of its text without white space."""
    lead = len(text) - len(text.lstrip())
    ends = np.minimum(np.maximum(side.byte_end - lead, 0), len(text.strip()))
    return replace(side, byte_end=ends - at, start=-at)


def _shown(rendering: RenderedConversation, messages: Sequence[int]) -> list[Any]:
    """The turns of a rendering that are among these messages."""
    return [turn for turn in rendering.turns if turn.message in messages]


def _turns(row: TokenRows) -> Iterator[tuple[int, bytes, Side]]:
    """Message, text and side of each scored turn of an example; the ends count in the turn's own text."""
    data, begin = row.example.target.encode("utf-8"), 0
    turns = row.gaps.turns(len(row.target_ids)) if row.messages else ()
    for (first, stop), ended, message in zip(turns, row.ended, row.messages, strict=True):
        end = int(row.byte_end[stop - 1])
        yield message, data[begin:end], Side(row.byte_end[first:stop] - begin, has_eos=ended)
        begin = end


def _conversations(reader: Reader) -> Iterator[tuple[int, TokenRows, Conversation]]:
    """`(number, the teacher's tokens, the messages)` of every example that was copied, in order."""
    for index in reader.shards:
        shard = reader.shard(index)
        table, gold, byte_end = shard.examples, shard.arrays["gold_ids"], shard.arrays["byte_end"]
        for i, name in enumerate(table["id"]):
            rows = slice(table["row_start"][i], table["row_end"][i])
            cached = TokenRows(
                Example(name, table["target"][i], table["prompt"][i]),
                np.asarray(table["context_ids"][i], dtype=np.int32),
                gold[rows].astype(np.int32),
                byte_end[rows].astype(np.int64),
                gaps_at(table, i),
                tuple(table["ended"][i]),
                tuple(table["messages"][i]),
            )
            yield shard.first_example + i, cached, conversation_from_json(name, table["conversation"][i])
