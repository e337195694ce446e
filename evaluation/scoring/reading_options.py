"""How a model reads text when it is evaluated: window, separator and batches.

This module imports nothing heavy, because the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd.common.setting_values import unescaped
from kd.common.settings import check, setting
from kd.data.conversations.chat_settings import variables_from


@dataclass(frozen=True)
class ReadingOptions:
    """Windows and batches, the same for every task of an evaluation."""

    seq_len: int | None = None
    """Tokens that the model sees at once; an encoder, of the prompt. By default the model's positions, at most 1024."""
    stride: int | None = None
    """New tokens scored per window of a document. By default seq-len - 1, which reads the text about once."""
    bos: bool | None = setting(None, shown="as a run was trained, else yes")
    """Whether documents and prompts open with the BOS token."""
    separator: str | None = setting(None, typed=unescaped, shown="as a run was trained, else a line end")
    """Text between prompt and target of a pair; an encoder-decoder needs none."""
    control_tokens: Literal["auto", "control", "text"] | None = setting(None, shown="as a run was trained, else auto")
    """How a special token that is spelled in a text is read, as in kd cache build."""
    chat: bool = False
    """Ask prompts as the turn of a user, through the chat template; targets, choices and endings are answers of the
    assistant. Conversations are always read so."""
    chat_template: str | None = setting(None, metavar="FILE")
    """File with a chat template in Jinja, or plain, for conversations. By default they are rendered with the tokenizer's
    own."""
    template_kwargs: Mapping[str, Any] | None = setting(
        None, metavar="KEY=VALUE,…", parse=variables_from, shown="as a run was trained, else none"
    )
    """Further variables of the chat template, e.g. enable_thinking=false."""
    system: str | None = setting(None, shown="as a run was trained, else none")
    """System text of conversations that have none of their own, and of prompts that --chat asks."""
    limit_tokens: int | None = None
    """Score exactly the first N tokens of the text, in perplexity and in agreement with a live teacher. By default all."""
    tokens_per_batch: int | None = setting(None, minimum=1)
    """Tokens of a forward pass, padding included. By default what suits the device."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def opens_with_bos(self) -> bool:
        """`bos`, with the default filled in."""
        return self.bos is not False

    @property
    def between(self) -> str:
        """`separator`, with the default filled in."""
        return "\n" if self.separator is None else self.separator

    @property
    def control_reading(self) -> str:
        """`control_tokens`, with the default filled in."""
        return self.control_tokens or "auto"


READING = ReadingOptions()
"""The defaults."""
