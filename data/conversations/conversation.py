"""`Conversation`: messages between a user, an assistant, a system text and tools, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a message. Templates decide which of them they accept."""
ASSISTANT = "assistant"
CONVERSATIONS = "conversations"
"""Kind of a corpus of conversations."""


@dataclass(frozen=True)
class Message:
    """One turn. Fields that are None are not given to the template."""

    role: str
    """One of ROLES."""
    content: str = ""
    """The text of the turn; empty where an assistant only calls tools."""
    name: str | None = None
    """Name of the speaker or of the tool that answers."""
    reasoning_content: str | None = None
    """What the assistant wrote before its answer."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of tools by the assistant, in the form of the OpenAI API."""
    tool_call_id: str | None = None
    """The call that a message of a tool answers."""
    complete: bool = True
    """Whether the text is whole. An answer that ran into a limit has no end token to score. Templates are not told."""
    scored: bool = True
    """Whether an assistant's turn is to be learned."""

    def for_template(self) -> dict[str, Any]:
        """The message as templates read it: a mapping with the fields that are set. `content` is always there."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if self.tool_calls:
            fields["tool_calls"] = [dict(call) for call in self.tool_calls]
        return fields

    def record(self) -> dict[str, Any]:
        """The message as JSON holds it: what templates read, whether it was cut short, and whether it is not to be learned."""
        marks = {name: False for name in ("complete", "scored") if not getattr(self, name)}
        return self.for_template() | marks


@dataclass(frozen=True)
class Conversation:
    """Messages in their order. A source always gives the same conversations with the same ids."""

    id: str
    """Identifier, unique within a source."""
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""
    task: str = "chat"
    """Name of the source or task."""
    split: str = "train"
    """Name of the split."""

    @property
    def asked(self) -> str:
        """What comes before the first turn of the assistant, for people."""
        before = self.messages[: self.answers[0]] if self.answers else self.messages
        return "\n".join(f"{message.role}: {message.content}" for message in before)

    @property
    def answered(self) -> str:
        """All turns of the assistant, for people."""
        return "\n".join(self.messages[number].content for number in self.answers)

    @property
    def answers(self) -> tuple[int, ...]:
        """Numbers of the assistant's messages."""
        return tuple(number for number, message in enumerate(self.messages) if message.role == ASSISTANT)

    @property
    def scored(self) -> tuple[int, ...]:
        """Numbers of the assistant's messages that are to be learned."""
        return tuple(number for number in self.answers if self.messages[number].scored)

    def for_template(self, stop: int | None = None) -> list[dict[str, Any]]:
        """The first `stop` messages as templates read them; None means all."""
        return [message.for_template() for message in self.messages[:stop]]

    def to_json(self) -> str:
        """The messages and tools as one line of JSON. The order of keys is kept, because templates write it."""
        document: dict[str, Any] = {"messages": [message.record() for message in self.messages]}
        if self.tools:
            document["tools"] = [dict(tool) for tool in self.tools]
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def conversation_from_json(name: str, text: str) -> Conversation:
    """The conversation with this id that `Conversation.to_json` has written. Raises DataError for another text."""
    try:
        document = json.loads(text)
        messages = tuple(
            Message(**{**fields, "tool_calls": tuple(fields.get("tool_calls", ()))}) for fields in document["messages"]
        )
        tools = tuple(dict(tool) for tool in document.get("tools", ()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError("a stored conversation cannot be read", where=name, found=type(error).__name__) from error
    return Conversation(name, messages, tools)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with `system` as its first message, unless it has a system message of its own."""
    if system is None or (conversation.messages and conversation.messages[0].role in ("system", "developer")):
        return conversation
    first = Message("system", system)
    return Conversation(
        conversation.id, (first, *conversation.messages), conversation.tools, conversation.task, conversation.split
    )
