"""Answers of a teacher as turns: reasoning kept or stripped, and rendered as the teacher wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import CHATML, MISTRAL, REASONING, Layout

from kd.common.errors import DataError
from kd.common.settings import make
from kd.data.chat_answers import AnswerReader, question_of, reasoning_place, written_lead
from kd.data.chat_rows import conversation_rows
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import Conversation, Message
from kd.data.rows.example import Example
from kd.models.chat.chat_template import ChatTemplate
from kd.models.tokenizer import load_tokenizer, token_bytes

QUESTION = Conversation("chat:0", (Message("user", "Two plus two?"),))
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
HIDING = CHATML.source.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


@pytest.fixture(scope="module")
def template(shared: Path):
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
    return lambda source: ChatTemplate(tokenizer, source.source if isinstance(source, Layout) else source, {})


def last_turn(template: ChatTemplate, talk: Conversation | None) -> str:
    """What the template writes of the answer, after the prompt that was answered."""
    assert talk is not None
    prompt = template.render(QUESTION.for_template(), generation_prompt=True).text
    whole = template.render(talk.for_template()).text
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


def test_kept_reasoning_is_rendered_as_the_teacher_wrote_it(template) -> None:
    for source, location in ((REASONING, "field"), (CHATML, "content")):
        chosen = template(source)
        assert reasoning_place(chosen) == location
        talk = AnswerReader(chosen, "keep").answered(QUESTION, THOUGHT, True, "")
        assert last_turn(chosen, talk) == f"{THOUGHT}<|im_end|>\n"
    field = AnswerReader(template(REASONING), "keep").answered(QUESTION, THOUGHT, True, "")
    assert field is not None
    assert (field.messages[-1].reasoning_content, field.messages[-1].content) == ("Two and two.", "Four.")


def test_stripped_reasoning_leaves_the_answer(template) -> None:
    for source in (REASONING, CHATML, HIDING):
        talk = AnswerReader(template(source), "strip").answered(QUESTION, THOUGHT, True, "")
        assert talk is not None
        assert talk.messages[-1] == Message("assistant", "Four.")


def test_a_template_that_hides_reasoning_is_refused_where_there_is_some_to_keep(template) -> None:
    reader = AnswerReader(template(HIDING), "keep")
    assert reader.answered(QUESTION, "Four.", True, "") is not None
    with pytest.raises(DataError, match="does not show the reasoning"):
        reader.answered(QUESTION, THOUGHT, True, "")


@pytest.mark.parametrize("reasoning", ["keep", "strip"])
def test_answers_that_were_cut_in_their_reasoning_or_are_empty_are_none(template, reasoning: str) -> None:
    reader = AnswerReader(template(REASONING), reasoning)
    assert reader.answered(QUESTION, "<think>\nTwo and", False, "") is None
    assert reader.answered(QUESTION, "Two and", False, "<think>\n") is None
    assert reader.answered(QUESTION, " \n", False, "") is None
    ended_at_once = reader.answered(QUESTION, "", True, "")
    assert ended_at_once is not None
    assert ended_at_once.messages[-1].complete


def test_a_space_that_the_template_writes_is_not_written_twice(template) -> None:
    chosen = template(MISTRAL)
    assert (written_lead(chosen), written_lead(template(CHATML))) == (" ", "")
    untrimmed = template(MISTRAL.source.replace(" | trim", ""))
    talk = AnswerReader(untrimmed, "keep").answered(QUESTION, " Four.", True, "")
    assert talk is not None
    assert talk.messages[-1].content == "Four."


def test_the_last_turn_of_the_assistant_is_asked_for_anew() -> None:
    talk = Conversation("a", (Message("user", "x"), Message("assistant", "y"), Message("user", "z")))
    answered = Conversation("a", (*talk.messages, Message("assistant", "w")))
    for given in (talk, answered):
        asked = question_of(Example("a", "", conversation=given), "Be brief.")
        assert [m.role for m in asked.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("score", ["last", "assistant", "all"])
def test_nothing_after_an_answer_that_was_cut_short_is_scored(template, score: str) -> None:
    chosen = template(CHATML)
    talk = Conversation("a", (*QUESTION.messages, Message("assistant", "Four, because", complete=False)))
    (row,) = conversation_rows(
        Example("a", "", conversation=talk), chosen, token_bytes(chosen.tokenizer), make(ChatSettings, {"score": score})
    )
    scored = chosen.tokenizer.decode(row.target_ids)
    assert scored.endswith("Four, because")
    assert row.ended == (False,)
    assert len(row.target_ids) == len(row.byte_end)
    assert row.example.target.endswith("Four, because")
