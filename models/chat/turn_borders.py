"""Where an assistant's turn stands in a rendering, in characters: from its generation prompt to the token that closes it.

A turn is found by rendering prefixes: the conversation up to the turn with the generation prompt, and the conversation up to
and including the turn. Where the template marks what an assistant writes (`{% generation %}`), the mark says where it begins.
Every turn is checked: the text before it must be what a model would have read when it wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError
from kd.models.chat.chat_template import ChatTemplate, Messages, RenderedText


@dataclass(frozen=True)
class FoundTurn:
    """A turn in the characters of the rendering that ends with it."""

    message: int
    rendered: RenderedText
    start: int
    stop: int
    """End of the turn, control token included."""
    ended: bool


def find_turn(template: ChatTemplate, messages: Messages, number: int, tools: Sequence[Mapping[str, Any]]) -> FoundTurn:
    """Where the assistant's message `number` stands in the rendering that ends with it."""
    rendered = template.render(messages[: number + 1], tools=tools)
    before = _prompt(template, messages[:number], tools, rendered)
    if not rendered.marks:
        rendered = _with_what_the_prompt_opens(template, messages[number], before, rendered)
    start = _start_of_turn(template, number, before, rendered)
    closing = _closing_tokens(template, rendered.text, start)
    if not closing:
        return FoundTurn(number, rendered, start, start + len(rendered.text[start:].rstrip()), ended=False)
    if len(closing) > 1:
        closing = _of_the_turn(template, messages[: number + 1], tools, rendered.text, closing)
    return FoundTurn(number, rendered, start, closing[-1][1], ended=True)


def _closing_tokens(template: ChatTemplate, text: str, start: int) -> list[tuple[int, int]]:
    """The control tokens at the end of a rendering, with nothing but white space among and after them."""
    closing: list[tuple[int, int]] = []
    following = len(text)
    for span in reversed([span for span in template.control_spans(text) if span[0] >= start]):
        if text[span[1] : following].strip() or text[slice(*span)] in template.roles.within:
            break
        closing.insert(0, span)
        following = span[0]
    return closing


def _of_the_turn(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]],
    text: str,
    closing: list[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Those of several closing tokens that end the turn, where others end the conversation (Phi's `<|endoftext|>`).

    Tokens of the turn are still there when the conversation goes on. Where the template then rewrites the turn, they are
    those that follow each other without white space.
    """
    try:
        longer = template.render([*messages, {"role": "user", "content": "."}], tools=tools).text
    except DataError:  # the template does not want a user after this turn
        longer = ""
    common = _common_prefix(text, longer)
    kept = [span for span in closing if span[1] <= common]
    if kept:
        return kept
    run = closing[:1]
    for span in closing[1:]:
        if span[0] != run[-1][1]:
            break
        run.append(span)
    return run


def _with_what_the_prompt_opens(
    template: ChatTemplate, message: Mapping[str, Any], before: str, rendered: RenderedText
) -> RenderedText:
    """The rendering that a model writes after a prompt which opens the answer (DeepSeek-R1's `<think>`).

    Such a template shows no reasoning of turns that were written. Where the message begins as its prompt ends, and the
    rendering shows the end of the message, the turn is the whole message. Otherwise the rendering stays as it is.
    """
    common = _common_prefix(before, rendered.text)
    opened, content = before[common:], template.masked_message(message)["content"]
    if not opened.strip() or not content.startswith(opened):
        return rendered
    closing = _closing_tokens(template, rendered.text, common)
    stop = closing[0][0] if closing else len(rendered.text.rstrip())
    shown = rendered.text[common:stop]
    whole = content if content.endswith(shown) else content.rstrip()
    if not whole.endswith(shown):
        return rendered
    return RenderedText(before + whole[len(opened) :] + rendered.text[stop:])


def _start_of_turn(template: ChatTemplate, number: int, before: str, rendered: RenderedText) -> int:
    """The character at which a model would begin to write the last message of a rendering, whose prompt is `before`."""
    if rendered.marks:
        return _first_mark(rendered, before, number)
    if not rendered.text.startswith(before):
        common = _common_prefix(before, rendered.text)
        raise DataError(
            "the chat template renders a turn in another way than its own generation prompt",
            where=f"message {number}",
            found=repr(rendered.text[common : common + 60]),
            expected=repr(before[common : common + 60]),
            try_="messages that begin as the prompt ends, --template-kwargs, or a --chat-template FILE with {% generation %} marks",
        )
    _refuse_header(template, rendered.text, len(before), number)
    return len(before)


def _first_mark(rendered: RenderedText, before: str, number: int) -> int:
    """Where the first generation mark of the last turn begins, or the prompt ends, if that is later."""
    prompted = rendered.text.startswith(before)
    limit = len(before) if prompted else _common_prefix(before, rendered.text)
    marks = [mark for mark in rendered.marks if mark[1] > limit]
    if not marks:
        raise DataError("the chat template marks no text of a turn", where=f"message {number}")
    return max(marks[0][0], limit) if prompted else marks[0][0]


def _refuse_header(template: ChatTemplate, text: str, start: int, number: int) -> None:
    """Raise DataError where a turn begins with a control token that opens the user's turns too: it is a header."""
    if any(span[0] == start for span in _closing_tokens(template, text, start)):
        return  # a turn without text, which only calls a tool that the template does not write
    opening = next((text[a:b] for a, b in template.control_spans(text) if a == start), None)
    if opening is not None and opening in template.render([{"role": "user", "content": "."}]).text:
        raise DataError(
            "the chat template has no generation prompt, so the beginning of a turn cannot be found",
            where=f"message {number}",
            found=repr(text[start : start + 40]),
            try_="a --chat-template FILE that reads add_generation_prompt, or has {% generation %} marks",
        )


def _prompt(
    template: ChatTemplate, messages: Messages, tools: Sequence[Mapping[str, Any]], rendered: RenderedText
) -> str:
    """What a model reads before it writes the next message, which `rendered` ends with.

    Where nothing comes before, it is what the template writes up to the header of the assistant's turns.
    """
    if messages:
        return template.render(messages, tools=tools, generation_prompt=True).text
    user = [{"role": "user", "content": "."}]
    prompt = template.render(user, generation_prompt=True).text
    header = prompt[_common_prefix(prompt, template.render(user).text) :]
    at = rendered.text.find(header) if header else -1
    if at < 0:
        raise DataError(
            "a conversation begins with the assistant, and the chat template does not show where its turn begins",
            found=repr(rendered.text[:40]),
            try_="conversations that begin with the user",
        )
    return rendered.text[: at + len(header)]


def _common_prefix(one: str, other: str) -> int:
    """Number of characters in which two texts begin alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
