"""Ask a chat model: questions become turns of a user, and what may be answered becomes turns of the assistant.

    chat = ChatAsking.of(tokenizer, reading)
    corpus = as_questions(corpus, chat)      # `--chat`: prompts as a user's turn; every turn of a conversation is a question
    chat.prompt(example)                     # ids up to where the assistant writes

The example's conversation ends with the assistant's turn that is asked for. As text (`rendered`) a question is what
lm-evaluation-harness makes of it with `--apply_chat_template`: one turn of the user, after `--system`, and no separator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.data.chat_rows import chat_template
from kd.data.conversations.conversation import ASSISTANT, CONVERSATIONS, Conversation, Message, with_system
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.evaluation.scoring.few_shot import Shots
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.evaluation.scoring.windows import chat_settings
from kd.models.chat.chat_prompt import ChatPrompt, chat_prompt, ending_ids
from kd.models.chat.chat_template import ChatTemplate
from kd.models.chat.scored_turns import ScoredTurn, render_conversation
from kd.models.tokenizer import Tokenizer, token_bytes


@dataclass(frozen=True)
class ChatAsking:
    """How a model's chat template asks."""

    template: ChatTemplate
    pieces: list[bytes]
    """Bytes of every id."""
    system: str | None
    """System text of conversations that have none of their own."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, reading: ReadingOptions) -> ChatAsking:
        """Raises DataError where there is no template."""
        return cls(chat_template(tokenizer, chat_settings(reading)), token_bytes(tokenizer), reading.system)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which an answer is over."""
        return ending_ids(self.template, self.pieces)

    def question(self, example: Example) -> Conversation:
        """The messages before the turn that is asked for."""
        assert example.conversation is not None
        whole = with_system(example.conversation, self.system)
        return replace(whole, messages=whole.messages[:-1])

    def prompt(self, example: Example) -> ChatPrompt:
        """The question as a prompt, with control tokens of the messages as text. Raises DataError naming the example."""
        question = self.question(example)
        try:
            return chat_prompt(self.template, self.pieces, question.for_template(), tools=question.tools)
        except DataError as error:
            raise _named(error, example) from error

    def rendered(self, example: Example) -> str:
        """The question as text with the generation prompt."""
        question = self.question(example)
        try:
            masked = self.template.render(question.for_template(), tools=question.tools, generation_prompt=True)
        except DataError as error:
            raise _named(error, example) from error
        return self.template.unmasked(masked.text)

    def answered(self, example: Example, answer: Message) -> tuple[np.ndarray, ScoredTurn]:
        """The ids of the question with an answer, `[T]`, and where the answer stands in them."""
        question = self.question(example)
        messages = (*question.for_template(), answer.for_template())
        try:
            rendering = render_conversation(self.template, self.pieces, messages, tools=question.tools, score="last")[
                -1
            ]
        except DataError as error:
            raise _named(error, example) from error
        return rendering.ids, rendering.turns[-1]

    def options(self, example: Example) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The context that all choices share, `[C]` int32, and the ids of each choice, without the token that ends it.

        What the template writes before an answer (an empty `<think>` block) is context.
        """
        sides = [self._one_option(example, option) for option in example.choices]
        shared = min(first for _, first in sides)
        while shared and any(not np.array_equal(ids[:shared], sides[0][0][:shared]) for ids, _ in sides):
            shared -= 1
        return sides[0][0][:shared].astype(np.int32), tuple(ids[shared:].astype(np.int32) for ids, _ in sides)

    def _one_option(self, example: Example, option: str) -> tuple[np.ndarray, int]:
        """Ids up to the end of a choice, and the number of them that stand before it."""
        if not option.strip():
            raise DataError("a choice has no text", where=f"example {example.id}", found=repr(option))
        ids, turn = self.answered(example, Message(ASSISTANT, option))
        at = turn.text.rfind(option.strip())
        begin = len(turn.text[: max(at, 0)].encode("utf-8"))
        first = turn.first + int(np.searchsorted(turn.byte_end, begin, side="right"))
        stop = turn.stop
        while turn.ended and stop > first and int(ids[stop - 1]) in self.template.control_ids:
            stop -= 1
        return ids[:stop], first


def asks_chat(corpus: Corpus) -> bool:
    """Whether the examples are asked through a chat template."""
    return corpus.kind == CONVERSATIONS or corpus.examples[0].conversation is not None


def with_chat(corpus: Corpus, shots: Shots | None = None) -> Corpus:
    """Prompts as turns of a user, and targets as the assistant's; conversations stay. Raises DataError for documents.

    shots   examples before each prompt, which become turns too
    """
    if corpus.kind == CONVERSATIONS:
        return corpus
    if corpus.kind != "pairs":
        raise DataError(
            "there are no prompts to ask through a chat template",
            where=corpus.spec,
            found=f"--chat with {corpus.kind}",
            expected="prompt and target, or messages",
            try_="--columns prompt=…,target=…",
        )
    return replace(corpus, examples=tuple(asked_by_user(e, (shots or {}).get(e.id, ())) for e in corpus.examples))


def asked_by_user(example: Example, shots: Sequence[Example] = ()) -> Example:
    """A pair as a conversation of two turns, after two for each of `shots`; its other fields stay."""
    before = [m for shot in shots for m in (Message("user", shot.prompt), Message(ASSISTANT, shot.target))]
    asked = Message("user", example.prompt), Message(ASSISTANT, example.target, complete=example.complete)
    return replace(example, conversation=Conversation(example.id, (*before, *asked), (), example.task, example.split))


def as_questions(corpus: Corpus, chat: ChatAsking, counts: Counter[str]) -> Corpus:
    """Every turn of the assistant as a question of its own, after the turns of the data before it.

    The target of a turn without text, which only calls a tool, is what the template writes of it. `counts` receives how many
    turns were `skipped`, because nothing stands before them.
    """
    if corpus.kind != CONVERSATIONS:
        return corpus
    examples = []
    for example in corpus.examples:
        assert example.conversation is not None
        for number in example.conversation.answers:
            if not any(message.role != "system" for message in example.conversation.messages[:number]):
                counts["skipped"] += 1
                continue
            examples.append(_turn_asked(example, example.conversation, number, chat))
    if not examples:
        raise DataError("no turn of the assistant has a question before it", where=corpus.spec)
    return replace(corpus, examples=tuple(examples))


def _turn_asked(example: Example, whole: Conversation, number: int, chat: ChatAsking) -> Example:
    """The question that the assistant's message `number` answers."""
    talk = replace(whole, messages=whole.messages[: number + 1])
    asked = "\n".join(f"{message.role}: {message.content}" for message in talk.messages[:-1])
    turn = replace(example, id=f"{example.id}#{number}", prompt=asked, conversation=talk)
    if len(talk.messages) < len(whole.messages):  # the choices are those of the last turn
        turn = replace(turn, choices=(), answer=None)
    target = talk.messages[-1].content.strip()
    return replace(turn, target=target or chat.answered(turn, talk.messages[-1])[1].text.strip())


def chat_conditions(reading: ReadingOptions, tokenizer: Tokenizer) -> Mapping[str, Any]:
    """What of a chat template two results must share to be compared. Each model's own template belongs to the model."""
    has_own_template = reading.chat_template is None
    template = "the model's own" if has_own_template else chat_template(tokenizer, chat_settings(reading)).digest
    return {"template": template, "kwargs": dict(reading.template_kwargs or {}), "system": reading.system}


def cut_prompt(ids: np.ndarray, most: int) -> np.ndarray:
    """The end of a prompt, `[at most most]`."""
    return ids[len(ids) - most :] if len(ids) > most else ids


def _named(error: DataError, example: Example) -> DataError:
    details: dict[str, Any] = {"where": f"example {example.id}"}
    details |= {key.replace(" ", "_"): value for key, value in error.details.items() if key != "where"}
    return DataError(error.headline, **details)
