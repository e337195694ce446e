"""What a chat model reads before it writes: a conversation up to where the assistant's next turn begins.

    prompt = chat_prompt(template, token_bytes(tokenizer), messages)
    prompt.ids                          # the generation prompt is the end of them
    ending_ids(template)                # ids at which an answer is over

The ids are those that stand before the turn where the turn is scored (`kd.models.chat.scored_turns`). A tokenizer may read the
white space at the end of a prompt together with what follows: `\\n\\n` alone is one token, and two before a word. So the prompt
is tokenised with a word after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.models.chat.chat_template import ChatTemplate, Messages
from kd.models.chat.scored_turns import encode_rendering, render_conversation

WORD = "the"
"""A frequent word, which stands for the answer."""


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a prompt."""

    text: str
    """The rendering, as the messages' authors wrote it."""
    ids: np.ndarray
    """[C] int32."""
    lead: str
    """White space at the end of the text that is not in the ids, because the answer's first token holds it."""


def chat_prompt(
    template: ChatTemplate, pieces: list[bytes], messages: Messages, *, tools: Sequence[Mapping[str, Any]] = ()
) -> ChatPrompt:
    """The conversation with the generation prompt.

    pieces   bytes of every id (`token_bytes`)

    Raises DataError where the template refuses the conversation, or a control token in a message cannot be encoded as text.
    """
    masked = template.render(messages, tools=tools, generation_prompt=True).text
    text = template.unmasked(masked)
    border = len(text.encode("utf-8"))
    ids, ends = encode_rendering(template, pieces, masked + WORD)
    before = int(np.searchsorted(ends, border, side="right"))
    start = int(ends[before - 1]) if before else 0
    lead = text.encode("utf-8")[start:].decode("utf-8", "replace")
    if before and (not lead or lead.isspace()):
        return ChatPrompt(text, ids[:before].astype(np.int32), lead)
    ids, _ = encode_rendering(template, pieces, masked)
    if not len(ids):
        raise DataError("the chat template gives an empty prompt", try_="--chat-template FILE")
    return ChatPrompt(text, ids.astype(np.int32), "")


def ending_ids(template: ChatTemplate, pieces: list[bytes]) -> tuple[int, ...]:
    """Ids at which an assistant's turn is over: the token with which the template closes it, and the end of text.

    Raises DataError where the template does not show where a turn begins.
    """
    turn = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    rendering = render_conversation(template, pieces, turn, score="last")[-1]
    scored = rendering.turns[-1]
    closing: list[int] = []
    for token in reversed(rendering.ids[scored.first : scored.stop].tolist()):
        if not scored.ended or token not in template.control_ids:
            break
        closing = [token]
    end_of_text = template.tokenizer.eos_token_id
    return tuple(dict.fromkeys([*closing, *([] if end_of_text is None else [end_of_text])]))
