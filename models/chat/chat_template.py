"""Render conversations with a tokenizer's chat template, and keep control tokens in the messages apart from the template's.

    template = ChatTemplate.of(tokenizer)
    template.render(messages)                              # a RenderedText: the text, and where generation marks are

A message may hold the text of a control token (`<|im_end|>`). It must not end the turn. Its first character is replaced by a
character of Unicode's private use before the template sees it, and is put back afterwards. So the control tokens that are
left in the rendering are the template's own. An assistant's message keeps the tokens that an answer may hold (`<think>`), see
`kd.models.chat.turn_tokens`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kd.common.errors import DataError
from kd.models.chat.turn_tokens import TokenRoles, token_roles
from kd.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
"""Messages as templates read them: mappings with `role` and `content`."""
NO_DATE = ""
"""It takes the place of transformers' function for the date of the day; a template that calls it fails."""
MASK_START = 0xF0000
"""First character that stands for the beginning of a control token in a message (supplementary private use area A)."""


@dataclass(frozen=True)
class RenderedText:
    """A conversation as text."""

    text: str
    """The text, with the first character of every control token of the messages replaced."""
    marks: tuple[tuple[int, int], ...] = ()
    """Ranges of characters inside `{% generation %}`, in their order."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with everything that changes what it renders."""

    tokenizer: Tokenizer = field(repr=False, compare=False)
    source: str
    """The template, in Jinja."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further variables of the template, e.g. `enable_thinking`."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, source: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """The tokenizer's own template, or `source`. Raises DataError where there is none."""
        if source is None:
            try:
                source = tokenizer.get_chat_template()
            except ValueError as error:
                raise DataError(
                    "the tokenizer has no chat template",
                    where=tokenizer.name_or_path,
                    try_="--chat-template FILE, or a teacher that was trained on conversations",
                ) from error
        return cls(tokenizer, source, {} if kwargs is None else dict(kwargs))

    @property
    def digest(self) -> str:
        """Hex digest of the template and its variables (blake2b, 16 bytes)."""
        content = json.dumps([self.source, dict(self.kwargs)], sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @cached_property
    def control_tokens(self) -> list[str]:
        """Texts of the control tokens, the longest first: the tokenizer's special ones, and those around the template's turns."""
        added = self.tokenizer.added_tokens_decoder.values()
        around = self.roles.around
        control = {token.content for token in added if token.special or token.content in around}
        return sorted(control, key=lambda text: (-len(text), text))

    @cached_property
    def control_ids(self) -> list[int]:
        """Ids of the tokenizer's control tokens, without the one for unknown characters."""
        texts = {*self.control_tokens}
        control = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.content in texts}
        return sorted(control - {self.tokenizer.unk_token_id})

    @cached_property
    def roles(self) -> TokenRoles:
        """What the tokenizer's added tokens are to this template."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content]
        return token_roles(self.source, added, lambda messages, prompt: self._rendering(messages, None, prompt).text)

    @cached_property
    def speller(self) -> Tokenizer:
        """The tokenizer, to which all control tokens are special, so that it can encode them as text."""
        from transformers import AddedToken

        added = self.tokenizer.added_tokens_decoder.values()
        plain = [token.content for token in added if not token.special and token.content in self.roles.around]
        if not plain:
            return self.tokenizer
        speller = copy.deepcopy(self.tokenizer)
        speller.backend_tokenizer.add_special_tokens(
            [AddedToken(text, normalized=False, special=True) for text in plain]
        )
        return speller

    def render(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] = (), generation_prompt: bool = False
    ) -> RenderedText:
        """The conversation as text.

        tools               JSON schemas of tools
        generation_prompt   whether the text ends where the assistant's next turn begins

        Raises DataError where the template refuses the conversation.
        """
        masked = [self.masked_message(message) for message in messages]
        return self._rendering(masked, self.masked([dict(tool) for tool in tools]) or None, generation_prompt)

    def _rendering(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, generation_prompt: bool
    ) -> RenderedText:
        """The rendering of masked messages."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None
        variables = {**self.tokenizer.special_tokens_map, "strftime_now": NO_DATE, **self.kwargs}
        try:
            texts, marks = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marked,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, TypeError) and "strftime_now" in self.source:
                raise DataError(
                    "the chat template writes the date of the day, with which a cache could not be built again",
                    try_='--template-kwargs date_string="26 Jul 2024" where it reads that, or --chat-template FILE',
                ) from error
            raise DataError(
                "the chat template refuses the conversation",
                found=f"{type(error).__name__}: {error}",
                try_="--chat-template FILE",
            ) from error
        spans = marks[0] if marked and marks else []
        return RenderedText(texts[0], tuple((int(start), int(stop)) for start, stop in spans))

    def masked_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`masked`, except for the tokens that an assistant's answer may hold."""
        kept = self.roles.within if message.get("role") == "assistant" else frozenset()
        return {key: self.masked(value, kept if key == "content" else frozenset()) for key, value in message.items()}

    def masked(self, value: Any, kept: frozenset[str] = frozenset()) -> Any:
        """`value` with the first character of every control token in its texts replaced by a private-use character.

        kept   control tokens that stay as they are

        Raises DataError where a text holds such a private-use character already.
        """
        if isinstance(value, str):
            return self._mask_text(value, kept)
        if isinstance(value, Mapping):
            return {key: self.masked(entry, kept) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.masked(entry, kept) for entry in value]
        return value

    def spelled(self, value: Any) -> int:
        """How many control tokens are spelled in the texts of a value."""
        if isinstance(value, str):
            return 0 if self._pattern is None else len(self._pattern.findall(value))
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return sum(map(self.spelled, entries))

    def unmasked(self, text: str, neutral: str | None = None) -> str:
        """The text with the replaced characters put back, or with `neutral` in place of each of them."""
        firsts = self._first_characters
        return text.translate({MASK_START + number: neutral or first for number, first in enumerate(firsts)})

    def first_masked(self, masked: str) -> str | None:
        """The first control token of the messages in a masked text."""
        text = self.unmasked(masked)
        at = next((i for i, (before, after) in enumerate(zip(masked, text, strict=True)) if before != after), len(text))
        return next((token for token in self.control_tokens if text.startswith(token, at)), None)

    @cached_property
    def _first_characters(self) -> list[str]:
        """First characters of the control tokens; each has a private-use character that stands for it."""
        return sorted({token[0] for token in self.control_tokens if token})

    def _mask_text(self, text: str, kept: frozenset[str]) -> str:
        firsts = self._first_characters
        if any(MASK_START <= ord(character) < MASK_START + len(firsts) for character in text):
            raise DataError(
                "a message holds a private-use character that stands for control tokens here",
                found=f"U+{MASK_START:X}…",
                try_="remove the character from the text",
            )
        masks = {first: chr(MASK_START + number) for number, first in enumerate(firsts)}

        def replaced(match: re.Match[str]) -> str:
            return match[0] if match[0] in kept else masks[match[0][0]] + match[0][1:]

        return text if self._pattern is None else self._pattern.sub(replaced, text)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """Matches a control token."""
        tokens = [re.escape(token) for token in self.control_tokens if token]
        return re.compile("|".join(tokens)) if tokens else None

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Ranges of characters of the template's own control tokens in a masked text, in their order."""
        pattern = self._pattern
        return [] if pattern is None else [match.span() for match in pattern.finditer(text)]
