"""The prompts that a teacher answers: of pairs their prompts, of conversations all up to the answer, with the generation prompt.

A prompt leaves room for the longest answer. One that is too long stops the build, is left out, or, where it is a plain text, loses
its beginning, as `--overlong` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.store.records.manifest import Layout
from kd.common.errors import DataError
from kd.data.chat_answers import MARGIN, question_of
from kd.data.chat_rows import chat_template
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.text_stream import in_memory
from kd.data.tokenizing.pair_rows import first_rules, fit_pair, tokenize_prompt
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.chat.chat_prompt import chat_prompt
from kd.models.chat.chat_template import ChatTemplate
from kd.models.tokenizer import Tokenizer, token_bytes


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt to answer."""

    example: Example
    ids: np.ndarray
    """[C] int32."""
    lead: str
    """White space of the prompt that the answer's first token holds, see `tokenize_prompt`."""
    changed: bool = False
    """Whether the ids are others than by the first rules."""
    text: str = ""
    """Rendering of a conversation with the generation prompt; empty for other prompts."""


def is_chat(request: BuildRequest) -> bool:
    """Whether conversations are answered."""
    return request.corpus.kind == CONVERSATIONS


def template_of(request: BuildRequest, tokenizer: Tokenizer) -> tuple[ChatTemplate, list[bytes]]:
    """The template that renders conversations, and the bytes of every id."""
    return chat_template(tokenizer, request.chat), token_bytes(tokenizer)


def asked_prompts(
    request: BuildRequest, tokenizer: Tokenizer, generation: GenerationConfig, left_out: LeftOut
) -> Iterator[AskedPrompt]:
    """The prompts, which leave room for answers, each as often as it is to be answered.

    Prompts that are too long are treated as `overlong` says, and `left_out` receives them. Raises DataError.
    """
    ask = _conversation_prompts if is_chat(request) else _text_prompts
    for prompt in ask(request, tokenizer, generation.max_new_tokens, left_out):
        if generation.answers == 1:
            yield prompt
            continue
        for number in range(generation.answers):
            name, talk = f"{prompt.example.id}~{number}", prompt.example.conversation
            talk = None if talk is None else replace(talk, id=name)
            yield replace(prompt, example=replace(prompt.example, id=name, conversation=talk))


def _conversation_prompts(
    request: BuildRequest, tokenizer: Tokenizer, most: int, left_out: LeftOut
) -> Iterator[AskedPrompt]:
    """The conversations up to the answer, with the generation prompt. One that is too long cannot be cut."""
    if request.blocks.encoder:
        raise DataError("an encoder-decoder has no chat template", where=request.teacher.name)
    template, pieces = template_of(request, tokenizer)
    room = _room(request, most + MARGIN)
    refused: list[str] = []
    for example in in_memory(request.corpus).examples:
        try:
            question = question_of(example, request.chat.system)
            asked = chat_prompt(template, pieces, question.for_template(), tools=question.tools)
        except DataError as error:
            if request.corpus.skip_bad:
                left_out.add("bad_rows", f"{example.id}, {error.headline}")
                continue
            error.details["where"] = f"conversation {example.id}"
            raise
        if len(asked.ids) <= room:
            yield AskedPrompt(replace(example, conversation=question), asked.ids, asked.lead, text=asked.text)
        elif request.blocks.overlong == "error":
            refused.append(f"{example.id} ({len(asked.ids)} tokens)")
        else:
            left_out.add("too_long", example.id)
    _refuse_long_prompts(request, refused, room)


def _room(request: BuildRequest, most: int) -> int:
    """Most tokens of a prompt before `most` tokens of an answer. Raises DataError where there are none."""
    room = request.blocks.seq_len - (0 if request.blocks.encoder else most)
    if room < 1:
        raise DataError(
            "the answers leave no room for a prompt",
            found=f"--seq-len {request.blocks.seq_len}",
            expected=f"more than --target-len {most}",
        )
    return room


def _refuse_long_prompts(request: BuildRequest, refused: Sequence[str], room: int) -> None:
    if refused:
        raise DataError(
            "prompts are longer than the limit",
            where=request.corpus.spec,
            found=f"{len(refused)} of {len(in_memory(request.corpus).examples)}, first {refused[0]}",
            expected=f"at most {room} tokens",
            try_="--overlong drop" + ("" if is_chat(request) else " or truncate"),
        )


def _text_prompts(request: BuildRequest, tokenizer: Tokenizer, most: int, left_out: LeftOut) -> Iterator[AskedPrompt]:
    """The prompts of pairs."""
    if request.corpus.kind == "documents":
        raise DataError(
            "there is nothing to answer",
            where=request.corpus.spec,
            found="documents",
            expected="prompts",
            try_="--columns prompt=…,target=…, or --targets data",
        )
    words = TextTokens(tokenizer, request.blocks.control_tokens)
    room = _room(request, most)
    limits = replace(
        request.blocks,
        seq_len=room + (0 if request.blocks.encoder else 1),
        stride=None,
        target_len=None,
        overlong="truncate",
    )
    refused: list[str] = []
    for example in in_memory(request.corpus).examples:
        ids, lead = tokenize_prompt(example, words, request.blocks)
        changed = not np.array_equal(ids, first_rules(replace(example, target=""), words, request.blocks)[0])
        row = TokenRows(replace(example, target=""), ids, ids[:0], np.zeros(0, dtype=np.int64))
        fitted = fit_pair(row, limits)
        assert fitted is not None
        if fitted is not row and request.blocks.overlong == "truncate":
            left_out.add("prompt_shortened", example.id)
        if fitted is row or request.blocks.overlong == "truncate":
            yield AskedPrompt(example, fitted.context_ids, lead, changed)
        elif request.blocks.overlong == "drop":
            left_out.add("too_long", example.id)
        else:
            refused.append(f"{example.id} ({len(row.context_ids)} tokens)")
    _refuse_long_prompts(request, refused, room)


def longest_answers(request: BuildRequest, tokenizer: Tokenizer, left_out: LeftOut) -> Iterator[TokenRows]:
    """Every prompt with as many rows as its answer may have, for a plan made before there are answers. The ids are zeros.

    With a target length up to the generation limit, that length, because the build accepts nothing longer. Otherwise
    `max_new_tokens`, EOS included; tokenised again, a text may have a few more (random weights, which write parts of
    characters: 43 for 40). Never more than a shard holds.
    """
    generation = request.generation or GenerationConfig()
    length, limit = request.blocks.target_len, generation.max_new_tokens
    most = min(length if length is not None and length <= limit + 1 else limit, (request.layout or Layout()).shard_rows)
    nothing = np.zeros(most, dtype=np.int32)
    for prompt in asked_prompts(request, tokenizer, generation, left_out):
        yield TokenRows(replace(prompt.example, target=""), prompt.ids, nothing, nothing.astype(np.int64))
