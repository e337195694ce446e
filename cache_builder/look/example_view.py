"""`ExampleView`: one example of a cache as it is shown: what was read, and the tokens that the teacher was asked about.

The parts of an example stand in the order in which the teacher read them. A part has tokens where it was scored. Conversations
have a part for each message; documents have the text before the block, and the block; pairs have prompt and target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd.cache_builder.look.token_views import TokenView, token_views
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.row_figures import character_ends
from kd.common.errors import DataError
from kd.common.shown_text import masked
from kd.data.conversations.conversation import CONVERSATIONS, Message, conversation_from_json

CLASSES = "classes"
ROLES = {"documents": ("text before", "text"), CLASSES: ("text", "label")}
"""Kind of a corpus -> what its prompt and its target are called; others have `prompt` and `target`."""


@dataclass(frozen=True)
class ExamplePart:
    """A piece of what the teacher read."""

    role: str
    """`text before`, `text`, `prompt`, `target`, `label`, or the role of a message."""
    text: str
    """All of its text, without secrets."""
    tokens: Sequence[TokenView] = ()
    """The tokens that were scored; none where the text was only read."""

    @property
    def document(self) -> dict[str, Any]:
        """As `kd cache show --json` prints it."""
        return {"role": self.role, "text": self.text, "tokens": [token.document for token in self.tokens]}


@dataclass(frozen=True)
class ExampleView:
    """One example, ready to be shown."""

    number: int
    id: str
    parts: Sequence[ExamplePart]

    @property
    def tokens(self) -> list[TokenView]:
        """The scored tokens of all parts."""
        return [token for part in self.parts for token in part.tokens]

    @property
    def document(self) -> dict[str, Any]:
        """As `kd cache show --json` prints it."""
        return {"example": self.number, "id": self.id, "parts": [part.document for part in self.parts]}

    def uncertain(self, count: int) -> list[TokenView]:
        """The tokens at which the teacher was most uncertain, the most uncertain first; where that is unknown, most surprised."""
        return sorted(self.tokens, key=_uncertainty)[:count]

    def surprising(self, count: int) -> list[TokenView]:
        """The tokens that the teacher gave the least probability, the least first."""
        return sorted(self.tokens, key=lambda token: token.logprob)[:count]

    def token(self, number: int) -> TokenView:
        """One token. Raises DataError where there is none of that number."""
        tokens = self.tokens
        if not 0 <= number < len(tokens):
            raise DataError(
                "the example has no such token",
                where=f"example {self.number}",
                found=f"token {number}",
                expected=f"0..{len(tokens) - 1}",
            )
        return tokens[number]


def _uncertainty(token: TokenView) -> float:
    return token.logprob if token.entropy_at_least is None else -token.entropy_at_least


def view_example(reader: CacheReader, number: int, vocabulary: Sequence[bytes], top: int) -> ExampleView:
    """One example. Raises DataError where the cache has none of that number, CacheError where this copy does not hold it."""
    if not 0 <= number < len(reader):
        raise DataError(
            "the cache has no such example",
            where=reader.root,
            found=f"example {number}",
            expected=f"0..{len(reader) - 1}",
        )
    example = reader[number]
    tokens = token_views(example, reader.manifest, vocabulary, top)
    if reader.manifest.kind == CONVERSATIONS:
        return ExampleView(number, example.id, _turns(reader, example, tokens))
    before, scored = ROLES.get(reader.manifest.kind, ("prompt", "target"))
    prompt = example.prompt.replace("\x1f", "\n") if reader.manifest.kind == CLASSES else example.prompt
    parts = [ExamplePart(before, masked(prompt))] if prompt else []
    return ExampleView(number, example.id, [*parts, ExamplePart(scored, masked(example.target), tokens)])


def _turns(reader: CacheReader, example: CachedExample, tokens: Sequence[TokenView]) -> list[ExamplePart]:
    """A part for the tools and for each message; the messages that are runs of scored tokens have theirs."""
    shard, row = reader.locate(example.index)
    conversation = conversation_from_json(example.id, shard.examples["conversation"][row])
    ends = character_ends(example.target, example.targets.byte_end)
    hidden = masked(example.target)
    runs: dict[int, list[tuple[int, int]]] = {}
    for message, (start, stop) in zip(
        shard.examples["messages"][row], example.gaps.turns(len(example.targets)).tolist(), strict=True
    ):
        runs.setdefault(message, []).append((start, stop))
    parts = (
        [ExamplePart("tools", json.dumps(list(conversation.tools), ensure_ascii=False))] if conversation.tools else []
    )
    for number, message in enumerate(conversation.messages):
        if number not in runs:
            parts.append(ExamplePart(message.role, masked(_said(message))))
        for start, stop in runs.get(number, ()):
            text = hidden[ends[start - 1] if start else 0 : ends[stop - 1]]
            parts.append(ExamplePart(message.role, text, tokens[start:stop]))
    return parts


def _said(message: Message) -> str:
    """What a message says, with its reasoning before it and its calls of tools after it."""
    calls = [json.dumps(dict(call), ensure_ascii=False) for call in message.tool_calls]
    return "\n".join(text for text in (message.reasoning_content, message.content, *calls) if text)
