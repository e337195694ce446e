"""Token ids of a conversation, and which of them are an assistant's turns.

A turn of the assistant begins where its generation prompt ends, and it ends with the control token that closes it. Text that
the template writes after that token (a line break) is never generated, so it is not scored.

Where turns stand in the text finds `kd.models.chat.turn_borders`. Some templates rewrite earlier turns (they drop old
reasoning). A turn that the whole conversation shows in another form is scored in a rendering of its own, which ends with it.
So is a turn whose reasoning the template never shows, but whose prompt opens it.

Shapes: T tokens of a rendering, n tokens of a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.models.chat.chat_template import ChatTemplate, Messages, RenderedText
from kd.models.chat.turn_borders import FoundTurn, find_turn
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
        return (_tokenised(template, pieces, whole, [FoundTurn(len(messages) - 1, whole, 0, len(whole.text), False)]),)
    chosen = [number for number in numbers if learned is None or number in learned]
    wanted = chosen[-1:] if score == "last" else chosen
    turns = [find_turn(template, messages, number, tools) for number in wanted]
    return tuple(_tokenised(template, pieces, group[-1].rendered, group) for group in _groups(turns))


def _groups(turns: Sequence[FoundTurn]) -> list[list[FoundTurn]]:
    """Turns that one rendering shows as a model has seen them; the rendering is that of the last turn of each group."""
    groups: list[list[FoundTurn]] = []
    left = list(turns)
    while left:
        host = left[-1].rendered.text
        shown = [turn for turn in left if host.startswith(turn.rendered.text[: turn.stop])]
        groups.append(shown)
        left = [turn for turn in left if turn not in shown]
    return groups[::-1]


def _tokenised(
    template: ChatTemplate, pieces: list[bytes], rendered: RenderedText, turns: Sequence[FoundTurn]
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


def _in_tokens(turn: FoundTurn, data: bytes, ends: np.ndarray, first: int, stop: int, begin: int) -> ScoredTurn:
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
