"""`TooLong`: the examples that are longer than the limits, where that is an error: all are counted before it is raised."""

from __future__ import annotations

from dataclasses import dataclass

from kd.common.errors import DataError
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.tokenizing.block_config import BlockConfig


@dataclass
class TooLong:
    """How many there are, and the first in words."""

    count: int = 0
    first: str = ""

    def add(self, words: str, number: int = 1) -> None:
        """Count `number` more, of which the first is described by `words`."""
        if number:
            self.first = self.first or words
            self.count += number

    def refuse(self, kind: str, spec: str, examples: int, config: BlockConfig) -> None:
        """Raise DataError where there are some among the `examples` of a text."""
        if not self.count:
            return
        chats = kind == CONVERSATIONS
        limits = f"{config.seq_len} " + ("tokens" if chats else "for the prompt" if config.encoder else "in all")
        raise DataError(
            "conversations are longer than the limit" if chats else "examples are longer than the limits",
            where=spec,
            found=f"{self.count} of {examples}, first {self.first}",
            expected=limits + (f", {config.target_len} for the target" if config.target_len and not chats else ""),
            try_="a larger --seq-len"
            + ("" if chats else " or --target-len")
            + "; cache build also has --overlong drop and truncate",
        )
