"""Conversations become token rows: one forward pass scores all turns of the assistant.

    template = chat_template(tokenizer, settings)
    rows = tokenize_conversations(corpus, template, settings, config, left_out)

The text of an example's rows is that of its scored turns, one after another, and `byte_end` counts in it. A conversation
whose template rewrites earlier turns becomes several examples (`id#0`, `id#1`, …), one for each rendering.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS, Conversation, with_system
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.data.tokenizing.too_long import TooLong
from kd.models.batching.gaps import Gaps
from kd.models.chat.chat_template import ChatTemplate
from kd.models.chat.scored_turns import RenderedConversation, ScoredTurn, render_conversation
from kd.models.tokenizer import Tokenizer, token_bytes


def chat_template(tokenizer: Tokenizer, settings: ChatSettings) -> ChatTemplate:
    """The template that renders conversations. Raises DataError where there is none."""
    return ChatTemplate.of(tokenizer, settings.template_source(), settings.template_kwargs)


def chat_identity(tokenizer: Tokenizer, settings: ChatSettings) -> dict[str, Any]:
    """What of the settings changes a token, as a cache's identity holds it."""
    digest = chat_template(tokenizer, settings).digest
    return {"template": digest, "system": settings.system, "score": settings.score}


def tokenize_conversations(
    corpus: Corpus,
    template: ChatTemplate,
    settings: ChatSettings,
    config: BlockConfig,
    left_out: LeftOut,
    notes: TokenNotes | None = None,
) -> Iterator[TokenRows]:
    """The rows of all conversations in order. Raises DataError naming the conversation that cannot be scored.

    left_out   receives the conversations that are too long, those whose last turns were cut off, and, where the corpus is read
               so, those that cannot be scored
    notes      receives what was found in the messages
    """
    too_long, pieces = TooLong(), token_bytes(template.tokenizer)
    given = corpus.examples
    yield from rows_that_fit(
        given, template, pieces, settings, config, left_out, notes, too_long, skip_bad=corpus.skip_bad
    )
    too_long.refuse(CONVERSATIONS, corpus.spec, len(given), config)


def rows_that_fit(
    examples: Iterable[Example],
    template: ChatTemplate,
    pieces: list[bytes],
    settings: ChatSettings,
    config: BlockConfig,
    left_out: LeftOut,
    notes: TokenNotes | None,
    too_long: TooLong,
    *,
    skip_bad: bool,
) -> Iterator[TokenRows]:
    """The rows of conversations that fit, or are cut to fit; those that are an error are counted in `too_long`."""
    notes = TokenNotes() if notes is None else notes
    for example in examples:
        try:
            rows = conversation_rows(example, template, pieces, settings, notes)
        except DataError as error:
            if not skip_bad:
                raise
            left_out.add("bad_rows", f"{example.id}, {error.headline}")
            continue
        for row in rows:
            length = row.read_only + len(row.target_ids)
            if length <= config.seq_len:
                yield row
            elif config.overlong == "error":
                too_long.add(f"{row.example.id} ({length} tokens)")
            else:
                fitted = first_turns(row, config.seq_len) if config.overlong == "truncate" else None
                left_out.add("too_long" if fitted is None else "shortened", row.example.id)
                if fitted is not None:
                    yield fitted


def conversation_rows(
    example: Example,
    template: ChatTemplate,
    pieces: list[bytes],
    settings: ChatSettings,
    notes: TokenNotes | None = None,
) -> list[TokenRows]:
    """The rows of one conversation, of any length."""
    assert example.conversation is not None
    conversation = with_system(example.conversation, settings.system)
    messages, tools, learned = conversation.for_template(), conversation.tools, conversation.scored
    try:
        if settings.score == "all" and learned != conversation.answers:
            raise DataError(
                "turns of the assistant that are not to be learned cannot be scored",
                found=f"--score all, and {len(conversation.answers) - len(learned)} turns with weight 0 or in a prompt",
                try_="--score assistant",
            )
        renderings = render_conversation(template, pieces, messages, tools=tools, score=settings.score, learned=learned)
        _refuse_hidden_calls(conversation, renderings)
    except DataError as error:
        details = {"where": f"conversation {example.id}", **{k: v for k, v in error.details.items() if k != "where"}}
        raise DataError(error.headline, **{k.replace(" ", "_"): v for k, v in details.items()}) from error
    renderings = tuple(as_far_as_written(rendering, conversation, template.control_ids) for rendering in renderings)
    example = replace(example, conversation=conversation)
    if notes is not None:
        notes.add(_found(conversation, template, renderings), example.id)
    if len(renderings) == 1:
        return [rows_of_turns(example, renderings[0], renderings[0].turns)]
    return [
        rows_of_turns(replace(example, id=f"{example.id}#{n}"), rendering, rendering.turns)
        for n, rendering in enumerate(renderings)
    ]


def as_far_as_written(
    rendering: RenderedConversation, conversation: Conversation, control_ids: Sequence[int]
) -> RenderedConversation:
    """The rendering without the end tokens of turns that were cut short: the template writes them, their author did not.

    Where every token is scored, the scored text ends there.
    """
    turns = tuple(
        turn if conversation.messages[turn.message].complete else _without_end(turn, rendering.ids, control_ids)
        for turn in rendering.turns
    )
    return replace(rendering, turns=turns)


def _without_end(turn: ScoredTurn, ids: np.ndarray, control_ids: Sequence[int]) -> ScoredTurn:
    """A turn without the control tokens at its end, and the white space among and after them."""
    stop, data = turn.stop, turn.text.encode("utf-8")
    starts = np.concatenate([[0], turn.byte_end])
    while stop > turn.first + 1:
        at = stop - 1 - turn.first
        token = data[int(starts[at]) : int(starts[at + 1])]
        if int(ids[stop - 1]) not in control_ids and (turn.ended or token.strip()):
            break
        stop -= 1
    ends = turn.byte_end[: stop - turn.first]
    text = data[: int(ends[-1])].decode("utf-8", "ignore")
    return replace(turn, stop=stop, byte_end=ends, text=text, ended=False)


def _found(
    conversation: Conversation, template: ChatTemplate, renderings: Sequence[RenderedConversation]
) -> Mapping[str, int]:
    """What a reader should know of a conversation, by note."""
    messages = conversation.for_template()
    read = [template.masked_message(message) for message in messages]
    spelled, kept = template.spelled([messages, conversation.tools]), template.spelled(read)
    turns = [(rendering, turn) for rendering in renderings for turn in rendering.turns]
    thoughts = [(rendering, conversation.messages[turn.message].reasoning_content) for rendering, turn in turns]
    return {
        "control_tokens_kept": kept,
        "control_tokens_as_text": spelled - kept,
        "border_scored": sum(turn.before > 0 for _, turn in turns),
        "border_in_context": sum(turn.unscored > 0 for _, turn in turns),
        "reasoning_not_shown": sum((thought or "").strip() not in rendering.text for rendering, thought in thoughts),
        "tools_not_shown": sum(not _is_named(tool, renderings[-1].text) for tool in conversation.tools),
    }


def _refuse_hidden_calls(conversation: Conversation, renderings: Sequence[RenderedConversation]) -> None:
    """Raise DataError for a scored turn whose calls of tools the template leaves out: a student would learn to say nothing."""
    for rendering in renderings:
        for turn in rendering.turns:
            calls = conversation.messages[turn.message].tool_calls
            if calls and not any(_is_named(call, turn.text) for call in calls):
                raise DataError(
                    "the chat template does not show the calls of tools",
                    found=f"message {turn.message} calls {', '.join(map(_name_of, calls))}, and is rendered as {turn.text[:60]!r}",
                    expected="a template for tools",
                    try_="--chat-template FILE; --bad-rows skip leaves such conversations out and counts them",
                )


def _is_named(entry: Mapping[str, Any], text: str) -> bool:
    """Whether a text has the name of a tool, or of a call of one, as a word."""
    return re.search(rf"(?<!\w){re.escape(_name_of(entry))}(?!\w)", text) is not None


def _name_of(tool: Mapping[str, Any]) -> str:
    """The name in the JSON schema of a tool; empty where it has none."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def rows_of_turns(example: Example, rendering: RenderedConversation, scored: Sequence[ScoredTurn]) -> TokenRows:
    """A rendering as rows, of which `scored` are some of the turns, in their order."""
    turns = [turn if turn.first else _without_first(turn) for turn in scored]  # nothing predicts the very first token
    ids = rendering.ids
    between = [ids[before.stop : after.first] for before, after in pairwise(turns)]
    rows = np.cumsum([len(turn.byte_end) for turn in turns])[:-1]
    gaps = Gaps(
        rows.astype(np.int32),
        np.array([len(gap) for gap in between], dtype=np.int32),
        np.concatenate([np.zeros(0, dtype=np.int32), *between]).astype(np.int32),
    )
    prompt = rendering.text.encode("utf-8")[: turns[0].begin].decode("utf-8", "ignore")
    starts = np.cumsum([0, *(len(turn.text.encode("utf-8")) for turn in turns)])
    return TokenRows(
        replace(example, prompt=prompt, target="".join(turn.text for turn in turns)),
        ids[: turns[0].first].astype(np.int32),
        np.concatenate([ids[turn.first : turn.stop] for turn in turns]).astype(np.int32),
        np.concatenate([t.byte_end + start for t, start in zip(turns, starts, strict=False)]).astype(np.int64),
        gaps,
        tuple(turn.ended for turn in turns),
        tuple(turn.message for turn in turns),
    )


def _without_first(turn: ScoredTurn) -> ScoredTurn:
    """A turn without its first token."""
    data, cut = turn.text.encode("utf-8"), int(turn.byte_end[0])
    while cut < len(data) and data[cut] & 0xC0 == 0x80:  # the token ends inside a character
        cut += 1
    ends = np.maximum(turn.byte_end[1:] - cut, 0)
    return replace(turn, first=turn.first + 1, begin=turn.begin + cut, text=data[cut:].decode("utf-8"), byte_end=ends)


def first_turns(row: TokenRows, seq_len: int) -> TokenRows | None:
    """The row with as many of its first turns as fit into `seq_len` tokens; None where the first one does not."""
    turns = row.gaps.turns(len(row.target_ids))
    ends = row.gaps.positions(len(row.context_ids), len(row.target_ids))[turns[:, 1] - 1] + 2
    kept = int((ends <= seq_len).sum())
    if not kept:
        return None
    stop = int(turns[kept - 1, 1])
    text = row.example.target.encode("utf-8")[: int(row.byte_end[stop - 1])].decode("utf-8")
    return TokenRows(
        replace(row.example, target=text),
        row.context_ids,
        row.target_ids[:stop],
        row.byte_end[:stop],
        row.gaps.head(stop),
        row.ended[:kept],
        row.messages[:kept],
    )
