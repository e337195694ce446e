"""Rows in the four layouts of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd.common.errors import DataError
from kd.data.conversations.conversation import Conversation, Message, conversation_from_json, with_system
from kd.data.conversations.conversation_rows import BadRow, chat_layout, rows_to_conversations
from kd.data.rows.example import text_digest
from kd.data.rows.row_examples import conversation_example
from kd.data.sources import load_corpus


def turns(pairs: list[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in pairs)


EXPECTED = turns([("user", "Two plus two?"), ("assistant", "Four.")])
ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}],
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}],
    },
    "prompt-completion": {
        "prompt": [{"role": "user", "content": "Two plus two?"}],
        "completion": [{"role": "assistant", "content": "Four."}],
    },
    "instruction": {"instruction": "Two plus two?", "input": "", "output": "Four."},
}


def read(row: dict[str, Any], **options: Any) -> list[Conversation]:
    layout = chat_layout(list(row), row)
    assert layout is not None
    place = "chat.jsonl row {}".format
    return list(rows_to_conversations([row], layout, place=place, prefix="chat.jsonl", split="train", **options))


def spelled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its lists as JSON, as a CSV file holds them."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_the_same_conversation(layout: str) -> None:
    row = ROWS[layout]
    assert chat_layout(list(row), row) == layout
    (conversation,) = read(row)
    assert conversation.messages == EXPECTED
    assert (conversation.id, conversation.task, conversation.answers) == ("chat.jsonl:0", "chat", (1,))
    assert read(spelled(row)) == [conversation]


def test_other_tables_are_no_conversations() -> None:
    assert chat_layout(["text"]) is None
    assert chat_layout(["prompt", "completion"], {"prompt": "a text", "completion": "a text"}) is None
    assert chat_layout(["prompt", "target"]) is None


def test_instruction_and_input_are_one_turn_of_the_user() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}
    assert read(row)[0].messages == turns([("system", "Be brief."), ("user", "Add.\n\n2 and 2"), ("assistant", "4")])


def test_further_fields_of_a_message_are_kept_and_given_to_the_template() -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "plus?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Add them."},
            {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"},
            {"role": "assistant", "content": "Four."},
        ],
        "tools": [{"name": "add"}],
    }
    (conversation,) = read(row)
    assert conversation.messages[0].content == "Two plus?"
    assert conversation.for_template()[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call],
        "reasoning_content": "Add them.",
    }
    assert conversation.for_template(1) == [{"role": "user", "content": "Two plus?"}]
    assert conversation.tools == ({"name": "add"},)
    assert read({"messages": json.loads(conversation.to_json())["messages"], "tools": row["tools"]}) == [conversation]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"row 0 field messages\[0\].role(.|\n)*'wizard'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": 7}]}, r"messages\[0\].content(.|\n)*int"),
        ({"messages": [{"role": "assistant"}]}, "a message has no text"),
        ({"messages": []}, "a conversation is empty"),
        ({"messages": "Two plus two?"}, "a value is not a list"),
        ({"messages": [["user", "x"]]}, "a value is not a list of objects"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"content\[0\](.|\n)*image",
        ),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "cannot be written as JSON"),
        ({"instruction": "Add.", "output": None}, "field output"),
        ({"instruction": "Add.", "output": ""}, "an empty text"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ],
)
def test_what_is_not_a_conversation_is_named_or_left_out(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRow, match=expected):
        read(row)
    refused: list[BadRow] = []
    assert read(row, refused=refused) == []
    assert len(refused) == 1


def test_the_digest_follows_every_message_and_their_order() -> None:
    talks = [Conversation("a", EXPECTED), Conversation("b", (*EXPECTED, Message("user", "And three?")))]
    first, second = (conversation_example(talk) for talk in talks)
    other = conversation_example(Conversation("b", EXPECTED))
    digests = {text_digest(examples) for examples in ([first, second], [second, first], [first], [first, other])}
    assert len(digests) == 4
    for text in ("", "[]", "{}", '{"messages": [7]}', '{"messages": [{"role": "user", "size": 1}]}', "[" * 100_000):
        with pytest.raises(DataError, match="cannot be read"):
            conversation_from_json("a", text)
    assert [conversation_from_json(talk.id, talk.to_json()) for talk in talks] == [
        Conversation(talk.id, talk.messages) for talk in talks
    ]


def test_the_order_of_keys_is_kept_and_part_of_the_digest() -> None:
    """Templates write tool calls as JSON."""
    calls = [{"name": "add", "arguments": {"b": 3, "a": 2}}, {"arguments": {"a": 2, "b": 3}, "name": "add"}]
    talks = [Conversation("a", (Message("assistant", tool_calls=(call,)),)) for call in calls]
    assert text_digest([conversation_example(talks[0])]) != text_digest([conversation_example(talks[1])])
    for talk, call in zip(talks, calls, strict=True):
        (message,) = conversation_from_json("a", talk.to_json()).for_template()
        assert json.dumps(message["tool_calls"][0]) == json.dumps(call)


def test_text_and_pairs_come_before_conversations(tmp_path: Path) -> None:
    rows = [
        {"text": "A text.", "messages": [{"role": "user", "content": "x"}]},
        {"text": "A text.", "instruction": "Add.", "output": "4"},
        {"prompt": "Two?", "target": "2", "instruction": "Add.", "output": "4"},
    ]
    for row, kind in zip(rows, ("documents", "documents", "pairs"), strict=True):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert load_corpus(str(tmp_path / "rows.jsonl")).kind == kind


def test_nulls_of_parquet_are_no_values() -> None:
    call = {"name": "add", "arguments": {"a": 1, "b": None}, "id": None}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert read(row)[0].messages[0].tool_calls == ({"name": "add", "arguments": {"a": 1}},)


def test_a_system_text_is_added_where_there_is_none() -> None:
    conversation = Conversation("a", EXPECTED)
    assert with_system(conversation, None) is conversation
    briefed = with_system(conversation, "Be brief.")
    assert briefed.messages == (Message("system", "Be brief."), *EXPECTED)
    assert with_system(briefed, "Be long.") is briefed
