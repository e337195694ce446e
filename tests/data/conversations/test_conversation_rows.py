"""Rows in the four layouts of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd.common.errors import DataError
from kd.data.conversations.conversation import Conversation, Message, conversation_from_json, with_system
from kd.data.conversations.conversation_rows import conversation_of
from kd.data.conversations.message_values import BadRow
from kd.data.rows.example import text_digest
from kd.data.rows.row_examples import conversation_example
from kd.data.rows.row_reading import MissingColumnsError, RowReading
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


def read(row: dict[str, Any], unread: set[str] | None = None) -> Conversation:
    layout = RowReading().format_of(list(row), [row], "chat.jsonl")
    where = "chat.jsonl row 0"
    keys = set() if unread is None else unread
    return conversation_of(row, layout, where=where, name="chat.jsonl:0", task="chat", split="train", unread=keys)


def spelled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its lists as JSON, as a CSV file holds them."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_the_same_conversation(layout: str) -> None:
    row = ROWS[layout]
    assert RowReading().format_of(list(row), [row], "t") == layout
    conversation = read(row)
    assert conversation.messages == EXPECTED
    assert (conversation.id, conversation.task, conversation.answers) == ("chat.jsonl:0", "chat", (1,))
    assert read(spelled(row)) == conversation


def test_other_tables_are_no_conversations() -> None:
    assert RowReading().format_of(["text"], [], "t") == "text"
    assert RowReading().format_of(["prompt", "target"], [], "t") == "pairs"
    with pytest.raises(DataError, match=r"texts, not messages(.|\n)*--columns prompt=prompt,target=completion"):
        RowReading().format_of(["prompt", "completion"], [{"prompt": "a text", "completion": "a text"}], "t")
    with pytest.raises(MissingColumnsError, match="columns are missing"):
        RowReading().format_of(["dialogue"], [], "t")


def test_instruction_and_input_are_one_turn_of_the_user() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}
    assert read(row).messages == turns([("system", "Be brief."), ("user", "Add.\n\n2 and 2"), ("assistant", "4")])


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
    conversation = read(row)
    assert conversation.messages[0].content == "Two plus?"
    assert conversation.for_template()[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call],
        "reasoning_content": "Add them.",
    }
    assert conversation.for_template(1) == [{"role": "user", "content": "Two plus?"}]
    assert conversation.tools == ({"name": "add"},)
    assert read({"messages": json.loads(conversation.to_json())["messages"], "tools": row["tools"]}) == conversation


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
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, r"weight(.|\n)*0\.5(.|\n)*0 or 1"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": "0"}]}, "neither 0 nor 1"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
            "no turn of the assistant is to be learned",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0, "loss": True}]}, "to be learned and is not"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "x"}]},
            r"two system texts(.|\n)*'a'(.|\n)*'b'",
        ),
        ({"system": 7, "messages": [{"role": "assistant", "content": "x"}]}, r"field system(.|\n)*int"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": "no"}, r"field tools(.|\n)*list as JSON"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "a list as JSON"),
        ({"instruction": "Add.", "output": "4", "history": [["a"]]}, r"field history"),
    ],
)
def test_what_is_not_a_conversation_is_named(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRow, match=expected):
        read(row)


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
    assert read(row).messages[0].tool_calls == ({"name": "add", "arguments": {"a": 1}},)


def test_a_system_text_is_added_where_there_is_none() -> None:
    conversation = Conversation("a", EXPECTED)
    assert with_system(conversation, None) is conversation
    briefed = with_system(conversation, "Be brief.")
    assert briefed.messages == (Message("system", "Be brief."), *EXPECTED)
    assert with_system(briefed, "Be long.") is briefed


def test_system_and_tools_beside_the_messages_are_read() -> None:
    row = {**ROWS["messages"], "system": "Be brief.", "tools": json.dumps([{"name": "add"}])}
    conversation = read(row)
    assert conversation.messages == turns([("system", "Be brief."), *[(m.role, m.content) for m in EXPECTED]])
    assert conversation.tools == ({"name": "add"},)
    assert read({**row, "tools": ['{"name": "add"}']}) == conversation
    messages = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    assert read({**row, "messages": messages}) == conversation, "the same text twice is one text"
    assert read({**row, "system": None, "tools": ""}).messages == EXPECTED


def test_history_and_calls_of_other_layouts_become_turns() -> None:
    row = {"instruction": "And 3?", "output": "5", "history": [["Two plus two?", "4"]], "system": "Be brief."}
    expected = [("system", "Be brief."), ("user", "Two plus two?"), ("assistant", "4"), ("user", "And 3?")]
    assert read(row).messages == turns([*expected, ("assistant", "5")])
    call = {"name": "add", "arguments": {"a": 2}}
    talk = [("human", "Add."), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", "Four.")]
    messages = read({"conversations": [{"from": role, "value": text} for role, text in talk]}).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].tool_calls == ({"type": "function", "function": call},)


def test_either_spelling_of_a_turn_is_read_in_either_column() -> None:
    for column, row in (("messages", ROWS["conversations"]), ("conversations", ROWS["messages"])):
        assert read({column: next(iter(row.values()))}).messages == EXPECTED


@pytest.mark.parametrize("mark", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, 0.0, False])
def test_a_turn_that_is_not_to_be_learned_is_marked(mark: str, no: float) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    whole = read({"messages": messages})
    assert (whole.answers, whole.scored) == ((1, 3), (1, 3))
    messages[1][mark] = no
    messages[3][mark] = not no
    conversation = read({"messages": messages})
    assert (conversation.answers, conversation.scored) == ((1, 3), (3,))
    assert not any(mark in message or "scored" in message for message in conversation.for_template())
    assert conversation_from_json("chat.jsonl:0", conversation.to_json()).scored == (3,)
    digests = {text_digest([conversation_example(talk)]) for talk in (whole, conversation)}
    assert len(digests) == 2, "what is learned is part of the text's digest"


def test_turns_of_the_assistant_in_a_prompt_are_not_learned() -> None:
    """As in TRL, where the loss is over the completion."""
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    conversation = read({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert conversation.scored == (3,)


def test_keys_that_are_not_read_are_named() -> None:
    unread: set[str] = set()
    messages = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b", "mood": "calm"}]
    read({"messages": messages}, unread)
    assert unread == {"messages.mood", "messages.weight of user"}
