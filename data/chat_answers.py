"""Conversations that the teacher answers: what it is asked, and its answer as the last turn.

    question = question_of(example, settings.system)             # ends with the turn of a user or of a tool
    talk = AnswerReader(template, "keep").answered(question, text, True, prompt.text)

The result is None where there is no answer.

A turn of the assistant at the end of a conversation is left out, because the teacher writes another one. Earlier turns of
the data stay, and are not scored: the teacher did not write them.
"""

from __future__ import annotations

from dataclasses import replace

from kd.common.errors import DataError
from kd.data.conversations.conversation import ASSISTANT, Conversation, Message, with_system
from kd.data.rows.example import Example
from kd.models.chat.chat_template import ChatTemplate
from kd.models.chat.reasoning import CLOSING, OPENING, split_reasoning

MARGIN = 16
"""Tokens that a chat template may write around an answer: an empty `<think>` block, and what closes the turn."""


def question_of(example: Example, system: str | None) -> Conversation:
    """The messages that the teacher answers. Raises DataError naming the conversation where there are none."""
    assert example.conversation is not None
    messages = example.conversation.messages
    asked = messages[:-1] if messages[-1].role == ASSISTANT else messages
    if not asked or asked[-1].role in ("system", "developer"):
        raise DataError(
            "there is nothing to answer",
            where=f"conversation {example.id}",
            found=", ".join(message.role for message in messages),
            expected="a turn of the user or of a tool before the answer",
        )
    return with_system(replace(example.conversation, messages=asked), system)


class AnswerReader:
    """Turns what a teacher wrote into the last message of a conversation."""

    def __init__(self, template: ChatTemplate, reasoning: str) -> None:
        """`reasoning`: keep or strip."""
        self._template, self._keep = template, reasoning == "keep"
        self._place: str | None = None
        self._lead = written_lead(template)

    def answered(self, question: Conversation, text: str, complete: bool, prompt: str) -> Conversation | None:
        """The conversation with the answer; None where it is empty and cut short, or was cut short in its reasoning.

        prompt   the text that was answered; some templates open the reasoning there

        Raises DataError where reasoning is to be kept and the template shows none.
        """
        parts = split_reasoning(text, prompt)
        if parts.answer is None or not (parts.answer.strip() or complete):
            return None
        answer = parts.answer if parts.answer != text else text.removeprefix(self._lead)
        message = Message(ASSISTANT, answer, complete=complete)
        if parts.reasoning is not None and self._keep:
            message = self._with_reasoning(message, parts.reasoning, question.id)
        return replace(question, messages=(*question.messages, message))

    def _with_reasoning(self, message: Message, reasoning: str, name: str) -> Message:
        if self._place is None:
            self._place = reasoning_place(self._template)
        if self._place == "field":
            return replace(message, reasoning_content=reasoning)
        if self._place == "content":
            return replace(message, content=f"{OPENING}\n{reasoning}\n{CLOSING}\n\n{message.content}")
        raise DataError(
            "the chat template does not show the reasoning of an answer",
            where=f"conversation {name}",
            try_="--reasoning strip, or a --chat-template FILE that writes reasoning_content",
        )


def written_lead(template: ChatTemplate) -> str:
    """White space that the template writes between its generation prompt and an answer, and that an answer need not repeat."""
    asked, answer = {"role": "user", "content": "."}, "answerqx"
    prompt = template.render([asked], generation_prompt=True).text
    turn = template.render([asked, {"role": ASSISTANT, "content": answer}]).text
    lead = turn.removeprefix(prompt).partition(answer)[0] if turn.startswith(prompt) else ""
    return lead if lead.isspace() else ""


def reasoning_place(template: ChatTemplate) -> str:
    """Where the template shows the reasoning of the last turn: in the `field` reasoning_content, in `content`, or `nowhere`."""
    asked, thought, answer = {"role": "user", "content": "."}, "thoughtqx", "answerqx"
    inside = f"{OPENING}\n{thought}\n{CLOSING}\n\n{answer}"
    for where_shown, fields in (
        ("field", {"content": answer, "reasoning_content": thought}),
        ("content", {"content": inside}),
    ):
        try:
            if thought in template.render([asked, {"role": ASSISTANT, **fields}]).text:
                return where_shown
        except DataError:
            continue
    return "nowhere"
