"""Token ids of a conversation, and which of them are an assistant's turns.

A turn of the assistant begins where its generation prompt ends, and it ends with the control token that closes it. Text that
the template writes after that token (a line break) is never generated, so it is not scored.

A turn is found by rendering prefixes: the conversation up to the turn with the generation prompt, and the conversation up to
and including the turn. Where the template marks what an assistant writes (`{% generation %}`), the mark says where it
begins. Every turn is checked: the text before it must be what a model would have read when it wrote it. Some templates
rewrite earlier turns (they drop old reasoning). A turn that the whole conversation shows in another form is scored in a
rendering of its own, which ends with it. So is a turn whose reasoning the template never shows, but whose prompt opens it.

Shapes: T tokens of a rendering, n tokens of a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.models.chat.chat_template import ChatTemplate, Messages, RenderedText
from kd.models.tokenizer import encode_with_ends

SCORES = ("assistant", "last", "all")
"""What is scored: all turns of the assistant, the last of them, or every token."""


@dataclass(frozen=True)
class ScoredTurn:
    """One turn of the assistant in the tokens of a rendering."""

    message: int
    """Number of the message in the conversation."""
    first: int
    """First scored token."""
    stop: int
    """One past the last scored token, which is the control token that ends the turn, if there is one."""
    begin: int
    """Byte of the rendering where the scored text begins."""
    text: str
    """The text of the scored tokens, without the control token that ends the turn."""
    byte_end: np.ndarray
    """[n] int64: the end of each scored token in the UTF-8 bytes of `text`."""
    ended: bool
    """Whether the last scored token is a control token."""
    unscored: int = 0
    """Bytes of the turn that share a token with the text before it, and so are not scored."""
    before: int = 0
    """Bytes of white space before the turn that its first scored token holds."""


@dataclass(frozen=True)
class RenderedConversation:
    """What a model reads in one pass, and which tokens of it are scored."""

    text: str
    """The text, as the messages' authors wrote it."""
    ids: np.ndarray
    """[T] int32."""
    turns: tuple[ScoredTurn, ...]
    """The scored turns, in their order. They do not overlap."""


@dataclass(frozen=True)
class _Turn:
    """A turn in the characters of the rendering that ends with it."""

    message: int
    rendered: RenderedText
    start: int
    stop: int
    """End of the turn, control token included."""
    ended: bool


def render_conversation(
    template: ChatTemplate,
    pieces: list[bytes],
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    score: str = "assistant",
    learned: Collection[int] | None = None,
) -> tuple[RenderedConversation, ...]:
    """The renderings in which the assistant's turns are scored; usually one, in which all of them stand.

    pieces    bytes of every id (`token_bytes`)
    score     one of SCORES
    learned   numbers of the messages that may be scored; None means all of the assistant's

    Raises DataError where a turn cannot be found, or a control token in a message cannot be encoded as text.
    """
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not numbers:
        raise DataError("a conversation has no turn of the assistant", found=", ".join(m["role"] for m in messages))
    if score == "all":
        whole = template.render(messages, tools=tools)
        return (_tokenised(template, pieces, whole, [_Turn(len(messages) - 1, whole, 0, len(whole.text), False)]),)
    chosen = [number for number in numbers if learned is None or number in learned]
    wanted = chosen[-1:] if score == "last" else chosen
    turns = [_find_turn(template, messages, number, tools) for number in wanted]
    return tuple(_tokenised(template, pieces, group[-1].rendered, group) for group in _groups(turns))


def _find_turn(template: ChatTemplate, messages: Messages, number: int, tools: Sequence[Mapping[str, Any]]) -> _Turn:
    """Where the assistant's message `number` stands in the rendering that ends with it."""
    rendered = template.render(messages[: number + 1], tools=tools)
    before = _prompt(template, messages[:number], tools, rendered)
    if not rendered.marks:
        rendered = _with_what_the_prompt_opens(template, messages[number], before, rendered)
    start = _start_of_turn(template, number, before, rendered)
    closing = _closing_tokens(template, rendered.text, start)
    if not closing:
        return _Turn(number, rendered, start, start + len(rendered.text[start:].rstrip()), ended=False)
    if len(closing) > 1:
        closing = _of_the_turn(template, messages[: number + 1], tools, rendered.text, closing)
    return _Turn(number, rendered, start, closing[-1][1], ended=True)


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


def _groups(turns: Sequence[_Turn]) -> list[list[_Turn]]:
    """Turns that one rendering shows as a model has seen them; the rendering is that of the last turn of each group."""
    groups: list[list[_Turn]] = []
    left = list(turns)
    while left:
        host = left[-1].rendered.text
        shown = [turn for turn in left if host.startswith(turn.rendered.text[: turn.stop])]
        groups.append(shown)
        left = [turn for turn in left if turn not in shown]
    return groups[::-1]


def _tokenised(
    template: ChatTemplate, pieces: list[bytes], rendered: RenderedText, turns: Sequence[_Turn]
) -> RenderedConversation:
    """The ids of a rendering, and its turns in tokens."""
    ids, ends = encode_rendering(template, pieces, rendered.text)
    text = template.unmasked(rendered.text)
    data = text.encode("utf-8")
    scored = []
    for turn in turns:
        border = len(template.unmasked(rendered.text[: turn.start]).encode("utf-8"))
        last_byte = len(template.unmasked(rendered.text[: turn.stop]).encode("utf-8"))
        first, begin = _first_scored(ends, border, data)
        stop = int(np.searchsorted(ends, last_byte, side="right"))
        if turn.ended:  # a control token may hold the white space after it
            stop = int(np.searchsorted(ends, last_byte, side="left")) + 1
        if stop <= first:
            raise DataError("a turn of the assistant has no token", where=f"message {turn.message}")
        held = border - (int(ends[first - 1]) if first else 0)
        whole = _in_tokens(turn, data, ends, first, stop, begin)
        scored.append(replace(whole, unscored=begin - border, before=max(held, 0)))
    return RenderedConversation(text, ids, tuple(scored))


def _first_scored(ends: np.ndarray, border: int, data: bytes) -> tuple[int, int]:
    """The first token of a turn that begins at byte `border`, and the byte at which the scored text begins.

    A token across the border is scored where it has only white space of the text before, as in pairs; else it is context
    (`kd.data.tokenizing.text_tokens`).
    """
    first = int(np.searchsorted(ends, border, side="right")) if border else 0
    start = int(ends[first - 1]) if first else 0
    if first == len(ends) or start == border or data[start:border].isspace():
        return first, border
    return first + 1, int(ends[first])


def _in_tokens(turn: _Turn, data: bytes, ends: np.ndarray, first: int, stop: int, begin: int) -> ScoredTurn:
    """The turn whose scored tokens are `first` to `stop`, and whose scored text begins at byte `begin`."""
    last = int(ends[stop - 1])
    if turn.ended:
        last = int(ends[stop - 2]) if stop - 1 > first else begin
    content = data[begin:last]
    byte_end = np.minimum(ends[first:stop] - begin, len(content)).astype(np.int64)
    text = content.decode("utf-8", "replace")
    return ScoredTurn(turn.message, first, stop, begin, text, byte_end, turn.ended)


def encode_rendering(template: ChatTemplate, pieces: list[bytes], masked: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and byte ends of a masked rendering; control tokens of messages become the ids of their characters.

    Such a rendering is encoded piece by piece, between the template's control tokens. That gives the ids of the whole only
    where the tokenizer treats the beginning of a text as any other place, which is tried with an ordinary character in
    place of the masked ones. Raises DataError where it fails.
    """
    text = template.unmasked(masked)
    if text == masked:
        return encode_with_ends(template.tokenizer, pieces, text)
    neutral = template.unmasked(masked, "x")
    whole, _ = encode_with_ends(template.tokenizer, pieces, neutral)
    if not np.array_equal(whole, _by_pieces(template, pieces, masked, "x")[0]):
        raise _cannot_spell(template, masked)
    return _by_pieces(template, pieces, masked)


def _cannot_spell(template: ChatTemplate, masked: str) -> DataError:
    return DataError(
        "a message holds a control token, and this tokenizer cannot encode it as text",
        found=template.first_masked(masked),
        try_="remove the token from the text",
    )


def _by_pieces(
    template: ChatTemplate, pieces: list[bytes], masked: str, neutral: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and byte ends; what stands between the template's control tokens is encoded by itself, and as text.

    neutral   character in place of the masked ones; None puts back what they stand for
    """
    ids: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    done = byte = 0
    for start, stop in [*template.control_spans(masked), (len(masked), len(masked))]:
        between = template.unmasked(masked[done:start], neutral)
        of_text, ends_of_text = encode_with_ends(template.speller, pieces, between, control=False)
        if np.isin(of_text, template.control_ids).any():  # the tokenizer's own vocabulary spells it, as T5's does
            raise _cannot_spell(template, masked)
        ids.append(of_text)
        ends.append(ends_of_text + byte)
        byte += len(between.encode("utf-8"))
        if stop > start:
            byte += len(masked[start:stop].encode("utf-8"))
            ids.append(np.array([template.tokenizer.convert_tokens_to_ids(masked[start:stop])], dtype=np.int32))
            ends.append(np.array([byte], dtype=np.int64))
        done = stop
    return np.concatenate(ids), np.concatenate(ends)
