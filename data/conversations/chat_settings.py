"""Settings of conversations: which template renders them, and which tokens are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.settings import check, setting

PLAIN = "plain"
"""Name of the embedded chat template."""
PLAIN_TEMPLATE = Path(__file__).parents[2] / "models" / "embedded" / "plain_chat.jinja"


def variables_from(text: str) -> dict[str, Any]:
    """`enable_thinking=false,date_string=today` as a mapping; values are JSON where they can be. Raises ValueError."""
    if text.lstrip().startswith("{"):
        values = json.loads(text)
        return dict(values)
    pairs = [item.partition("=") for item in text.split(",")] if text else []
    if any(not name.strip() or not sign for name, sign, _ in pairs):
        raise ValueError("KEY=VALUE,…, e.g. enable_thinking=false, or a JSON object")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class ChatSettings:
    """How conversations become text."""

    chat_template: str | None = setting(None, metavar="FILE")
    """File with a chat template in Jinja, or plain: one that needs no control token but the end of text. By default
    conversations are rendered with the tokenizer's own template."""
    template_kwargs: Mapping[str, Any] | None = setting(None, metavar="KEY=VALUE,…", parse=variables_from)
    """Further variables of the chat template, e.g. enable_thinking=false."""
    system: str | None = None
    """System text of conversations that have none of their own."""
    score: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a conversation are scored: those of all turns of the assistant, of the last one, or all tokens."""

    def __post_init__(self) -> None:
        check(self)

    def template_source(self) -> str | None:
        """The text of the template's file; None where there is none. Raises DataError."""
        if self.chat_template is None:
            return None
        path = PLAIN_TEMPLATE if self.chat_template == PLAIN else as_path(self.chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read the chat template", where=self.chat_template, found=str(error)) from error
