"""`Example`, a piece of text to learn from, and the digest of an ordered list of examples."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from kd.common.errors import DataError
from kd.data.conversations.conversation import Conversation

IN_TEMPLATE = " in template "
"""What stands in the id of an example between its row and the number of its template, where a row is asked in several."""

_SIZE = struct.Struct("<Q").pack


def row_and_template(identity: str) -> tuple[str, int | None]:
    """The row and the template of an example's id `ROW in template K`; another id is its row, in no such template."""
    row, mark, number = identity.rpartition(IN_TEMPLATE)
    return (row, int(number)) if mark and number.isdecimal() else (identity, None)


@dataclass(frozen=True)
class Example:
    """A piece of text. A source always gives the same examples, in the same order, with the same ids."""

    id: str
    """Identifier, unique within a source, e.g. `train/12` or `module:json.decoder#3`."""
    target: str
    """The text whose tokens are scored."""
    prompt: str = ""
    """The text before the target, which models read but which is not scored."""
    task: str = "text"
    """Name of the source or task."""
    split: str = "train"
    """Name of the split: `train`, `heldout`, `validation`, `test`, …"""
    choices: tuple[str, ...] = ()
    """The possible answers of a task with choices; `target` is one of them."""
    answer: int | None = None
    """Index of the right answer in `choices`."""
    references: tuple[str, ...] = ()
    """All acceptable targets where there are several; empty means only `target`."""
    keywords: tuple[str, ...] = ()
    """Words that an answer has to use, in tasks with keywords."""
    complete: bool = True
    """Whether the target is whole. A target that was cut short has no end token to score."""
    conversation: Conversation | None = None
    """The messages of a conversation; `prompt` and `target` are then texts for people. None for other texts."""
    also_right: tuple[int, ...] = ()
    """Indices of further choices that are right, in tasks whose rows have several right answers."""


def text_digest(examples: Iterable[Example]) -> str:
    """Hex digest of ids, prompts and targets in their order (blake2b, 32 bytes, fields length-prefixed).

    A target that was cut short adds a fourth field. Of a conversation, id and messages count.
    """
    digest = TextDigest()
    for example in examples:
        digest.add(example)
    return digest.hexdigest()


class TextDigest:
    """The digest of `text_digest`, of examples that come one after another."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=32)

    def add(self, example: Example) -> None:
        """Go on with the next example."""
        parts = list[bytes]()
        for field in _digested(example):
            data = field.encode("utf-8", "surrogatepass")
            parts.append(_SIZE(len(data)))
            parts.append(data)
        self._digest.update(b"".join(parts))

    def hexdigest(self) -> str:
        """The digest of the examples so far."""
        return self._digest.hexdigest()


def _digested(example: Example) -> tuple[str, ...]:
    """The texts of an example that its digest is made of."""
    if example.conversation is not None:
        return example.id, example.conversation.to_json()
    return (example.id, example.prompt, example.target, *(() if example.complete else ("…",)))


def check_examples(spec: str, examples: Iterable[Example]) -> None:
    """Raise DataError for a text that is not valid Unicode, or for an id that occurs twice."""
    seen: set[str] = set()
    for example in examples:
        check_unicode(spec, example)
        if example.id in seen:
            raise repeated_id(spec, example.id)
        seen.add(example.id)


def repeated_id(spec: str, name: str) -> DataError:
    """The error for two examples with the same id."""
    advice = "another column for --columns id=…, or none"
    return DataError("two examples have the same id", where=spec, found=name, try_=advice)


def check_unicode(spec: str, example: Example) -> None:
    """Raise DataError where a text is not valid Unicode."""
    for text in (example.prompt, example.target):
        if text.isascii():
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer accepts
            raise DataError(
                "a text is not valid Unicode",
                where=f"{spec} example {example.id}",
                found=str(error),
                expected="text without lone surrogates",
            ) from error
