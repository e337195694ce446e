"""The models' answers to the user's own prompts, for reading side by side.

    prompts.txt     one prompt a line, continued as it stands
    prompts.jsonl   {"prompt": …} and, if it is known, {"expected": …}; asked as tasks are, with the separator after it
    prompts.jsonl   {"messages": […]} that end with the turn of a user; asked through the model's chat template

With `--chat`, every prompt is asked as the turn of a user, through the chat template. A file with `messages` is asked so in
any case.

Decoding is that of `generation`: every model takes the most probable token at every step, so that no text is the luckiest
of several draws. Three figures accompany the texts, because readers overlook them: the share of answers that ended, their
length, and how much of them repeats earlier words. They do not rank the models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.data.conversations.conversation import ASSISTANT, Conversation, Message
from kd.data.conversations.conversation_rows import read_prompt
from kd.data.corpus import Corpus
from kd.data.rows.compressed import UNREADABLE, file_type, open_text
from kd.data.rows.example import Example
from kd.data.rows.tables import TABLE_READERS
from kd.evaluation.answers.answer_decoding import answer_room, prompt_ids, written_answers
from kd.evaluation.scoring.chat_asking import ChatAsking, asked_by_user
from kd.evaluation.scoring.reading_options import READING, ReadingOptions
from kd.evaluation.scoring.scored_text import model_ids
from kd.evaluation.scoring.windows import prompt_blocks
from kd.evaluation.statistics.estimates import Documents, Estimate
from kd.models.answering import answer_text
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer

NEW_TOKENS = 64
"""Default number of tokens of an answer."""
GRAM = 4
"""Number of words in a run; a run counts as repeated when the answer held it before."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of one file."""

    name: str
    """Name of the file, without its folder."""
    texts: tuple[str, ...]
    expected: tuple[str | None, ...]
    continued: bool
    """True: what follows a prompt continues it. False: it is an answer, and the separator stands before it."""
    conversations: tuple[Conversation | None, ...] = ()
    """The messages of each prompt that has some; empty where none has."""

    @property
    def chat(self) -> bool:
        """Whether some prompts are conversations."""
        return any(talk is not None for talk in self.conversations)


@dataclass(frozen=True)
class SamplesResult:
    """What a model wrote."""

    answers: tuple[str, ...]
    """Texts in the order of the prompts."""
    estimates: Mapping[str, Estimate]
    """`ended`, `length`, `repeated`."""
    documents: Documents
    max_new_tokens: int
    prompts_cut: int
    """Number of prompts that lost their beginning."""


def load_prompts(path: Path, limit: int | None = None) -> Prompts:
    """The first `limit` prompts of a .txt or .jsonl file, which may be compressed. Raises DataError naming file and line."""
    kind = file_type(path)
    if kind != ".jsonl" and kind in TABLE_READERS:
        raise DataError("prompts are not read from such a file", where=path, found=kind, expected=".txt or .jsonl")
    try:
        with open_text(path) as opened:
            text = [line.rstrip("\n") for line in opened]
    except UNREADABLE as error:
        raise DataError("cannot read the prompts", where=path, found=str(error)) from error
    lines = [(number, line) for number, line in enumerate(text, 1) if line.strip()][:limit]
    if not lines:
        raise DataError("there are no prompts", where=path, found="an empty file")
    if kind != ".jsonl":
        return Prompts(path.name, tuple(line for _, line in lines), (None,) * len(lines), True)
    rows = [_row(line, f"{path} line {number}") for number, line in lines]
    texts, expected, talks = zip(*rows, strict=True)
    return Prompts(path.name, texts, expected, False, talks)


def _row(line: str, where: str) -> tuple[str, str | None, Conversation | None]:
    """Prompt, expected answer, and the messages where the line holds some."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError("a prompt is not JSON", where=where, found=str(error)) from error
    row = row if isinstance(row, dict) else {}
    prompt, expected, talk = row.get("prompt"), row.get("expected"), None
    if "messages" in row:
        talk = read_prompt(row, where)
        prompt = talk.asked
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(expected, str | None):
        raise DataError(
            "a line holds no prompt", where=where, found=line[:80], expected='{"prompt": "…", "expected": "…"}'
        )
    return prompt, expected, talk


def write_samples(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    reading: ReadingOptions = READING,
    max_new_tokens: int | None = None,
) -> Iterator[Progress[SamplesResult]]:
    """Let the model continue or answer every prompt; the last record carries the texts. Options as in `generation`."""
    blocks = prompt_blocks(model, tokenizer, replace(reading, separator="") if prompts.continued else reading)
    size = model_ids(model, tokenizer)
    chat = ChatAsking.of(tokenizer, reading) if reading.chat or prompts.chat else None
    if chat is not None and blocks.encoder:
        raise DataError("an encoder-decoder has no chat template", where=prompts.name, try_="prompts without messages")
    examples = tuple(
        Example(id=str(n), task="samples", split="", prompt=p, target="") for n, p in enumerate(prompts.texts)
    )
    if chat is not None:
        talks = prompts.conversations or (None,) * len(examples)
        examples = tuple(map(_asked, examples, talks))
    corpus = Corpus(prompts.name, "", "pairs", examples, {})
    wanted = max_new_tokens or (NEW_TOKENS if blocks.encoder else min(NEW_TOKENS, blocks.seq_len // 2))
    room = answer_room(model, tokenizer, corpus, blocks, wanted)
    counts: Counter[str] = Counter()
    contexts, leads = zip(*prompt_ids(corpus, tokenizer, blocks, room, counts, chat), strict=True)
    texts = [""] * len(contexts)
    ended_E, length_E = np.zeros(len(contexts)), np.zeros(len(contexts))
    yield Progress(0, len(contexts))
    done = 0
    for numbers, answers in written_answers(
        model,
        contexts,
        max_new_tokens=room,
        eos_id=tokenizer.eos_token_id if chat is None else chat.ends,
        vocabulary_size=size,
        tokens_per_batch=reading.tokens_per_batch,
        forced=blocks.forced,
    ):
        for number, answer in zip(numbers, answers, strict=True):
            before = None if blocks.encoder else contexts[number]
            texts[number] = answer_text(
                tokenizer, answer.ids, before, leads[number], clean_up_tokenization_spaces=False
            )
            ended_E[number], length_E[number] = answer.ended, len(answer.ids)
        done += len(numbers)
        yield Progress(done, len(contexts))
    documents = Documents.of_examples([e.id for e in examples], "pairs")
    ones = np.ones(len(texts))
    repeated_E = np.array([repeated_share(text) for text in texts])
    estimates = {
        "ended": documents.ratio(ended_E, ones),
        "length": documents.ratio(length_E, ones),
        "repeated": documents.ratio(repeated_E, ones),
    }
    yield Progress(done, done, SamplesResult(tuple(texts), estimates, documents, room, counts["cut"]))


def _asked(example: Example, talk: Conversation | None) -> Example:
    """The example as the question of a conversation: its own messages, or its prompt as the turn of a user."""
    if talk is None:
        return asked_by_user(example)
    return replace(example, conversation=replace(talk, messages=(*talk.messages, Message(ASSISTANT))))


def repeated_share(text: str) -> float:
    """Share of the runs of GRAM words that stood in the text before; 0 for a shorter text."""
    words = re.findall(r"\w+|[^\w ]", text.lower())
    runs: Sequence[tuple[str, ...]] = list(zip(*(words[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
