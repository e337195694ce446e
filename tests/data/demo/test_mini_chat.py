"""The embedded conversations: the same everywhere, answered by what was told, and held-out pairs apart from training's."""

from __future__ import annotations

import hashlib

import pytest

from kd.common.errors import DataError
from kd.data.conversations.conversation import Conversation
from kd.data.conversations.conversation_rows import read_prompt
from kd.data.demo.mini_chat import CHAT_COUNTS, IN_A_SENTENCE, IN_A_WORD, mini_conversations
from kd.data.demo.mini_world import COLOURS, DAYS, PEOPLE, PLACES, THINGS, split_of_pair
from kd.data.sources import load_corpus

VALUES = (*PLACES, *COLOURS, *DAYS)
ROLES = ["system", "user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant"]


def pairs_in(text: str) -> set[tuple[str, str]]:
    """People and things of the sentences of a text."""
    found = set()
    for sentence in text.replace("\n", " ").replace("?", ".").split("."):
        people = [p for p in PEOPLE if p in sentence]
        things = [t for t in THINGS if f" {t}" in sentence]
        found |= {(p, t) for p in people[:1] for t in things[:1]}
    return found


@pytest.mark.parametrize("split", CHAT_COUNTS)
def test_every_conversation_has_a_system_text_several_turns_and_one_call(split: str) -> None:
    for talk in mini_conversations(split, 60):
        assert [message.role for message in talk.messages] == ROLES
        assert [len(message.tool_calls) for message in talk.messages] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
        assert talk.messages[0].content in (IN_A_WORD, IN_A_SENTENCE)
        assert talk.tools[0]["function"]["name"] == "look_up"
        assert all(message.content for message in talk.messages if not message.tool_calls)


def test_answers_follow_from_what_was_told() -> None:
    verdicts = []
    for talk in mini_conversations("train", 200):
        told, looked_up = talk.messages[1].content, talk.messages[5].content
        for answer, text in ((talk.messages[2].content, told), (talk.messages[6].content, looked_up)):
            values = [v for v in VALUES if v.lower() in answer.lower()]
            assert any(v in text for v in values)
        arguments = talk.messages[4].tool_calls[0]["function"]["arguments"]
        assert arguments["person"] in talk.messages[3].content
        assert arguments["thing"] in looked_up
        asked = next(v for v in VALUES if v in talk.messages[7].content)
        thing = next(t for t in THINGS if f" {t}" in talk.messages[7].content)
        sentence = next(s for s in told.split(".") if f" {thing}" in s)
        assert (asked in sentence) == (talk.messages[8].content == "Yes.")
        verdicts.append(talk.messages[8].content)
    assert verdicts.count("Yes.") == verdicts.count("No.") == 100


@pytest.mark.parametrize("split", CHAT_COUNTS)
def test_a_split_links_only_its_own_people_and_things(split: str) -> None:
    for talk in mini_conversations(split, 100):
        for message in talk.messages:
            assert all(split_of_pair(*pair) == split for pair in pairs_in(message.content))


def test_a_longer_list_begins_with_the_shorter_one_and_is_the_same_everywhere() -> None:
    short, long = list(mini_conversations("heldout", 5)), list(mini_conversations("heldout", 9))
    assert long[:5] == short
    text = "\n".join(talk.to_json() for talk in mini_conversations("train", 50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a65a39582436ac71"


def test_the_source_has_two_splits() -> None:
    corpus = load_corpus("mini-chat:heldout")
    assert (corpus.kind, len(corpus.examples)) == ("conversations", 200)
    with pytest.raises(DataError, match="split"):
        load_corpus("mini-chat:other")


def test_messages_that_end_with_an_answer_are_no_prompt() -> None:
    talk = Conversation("a", ())
    assert talk.answers == ()
    rows = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="nothing to answer"):
        read_prompt(rows, "row 1")
