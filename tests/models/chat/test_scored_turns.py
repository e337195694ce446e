"""Conversations in tokens: which tokens are scored, for the kinds of chat templates in use."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import LAYOUTS, OPENS_REASONING, Layout

from kd.common.errors import DataError
from kd.models.chat.chat_template import MASK_START, ChatTemplate
from kd.models.chat.scored_turns import RenderedConversation, render_conversation
from kd.models.tokenizer import load_tokenizer, token_bytes

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Two plus two?"}
FOUR = {"role": "assistant", "content": "Four."}
AGAIN = {"role": "user", "content": "And three?"}
FIVE = {"role": "assistant", "content": "Five, I think."}
CONVERSATION = [SYSTEM, ASKED, FOUR, AGAIN, FIVE]
CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}

Segments = list[tuple[str, bool]]
"""Text and whether it is scored, written by hand."""


def chatml(*turns: tuple[str, str, bool], end: str = "\n") -> Segments:
    """ChatML by hand: the text of an assistant and its end token are scored."""
    segments: Segments = []
    for role, text, scored in turns:
        segments += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", scored), (end, False)]
    return segments


BY_HAND: dict[str, list[Segments]] = {
    "chatml": [
        chatml(
            ("system", "Be brief.", False),
            ("user", "Two plus two?", False),
            ("assistant", "Four.", True),
            ("user", "And three?", False),
            ("assistant", "Five, I think.", True),
        )
    ],
    "llama3": [
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\nTwo plus two?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("Four.<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nAnd three?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("Five, I think.<|eot_id|>", True),
        ]
    ],
    "gemma": [
        [
            ("<bos><start_of_turn>user\nBe brief.\n\nTwo plus two?<end_of_turn>\n<start_of_turn>model\n", False),
            ("Four.<end_of_turn>", True),
            ("\n<start_of_turn>user\nAnd three?<end_of_turn>\n<start_of_turn>model\n", False),
            ("Five, I think.<end_of_turn>", True),
            ("\n", False),
        ]
    ],
    "mistral": [
        [("<s>[INST] Be brief.\n\nTwo plus two? [/INST]", False), (" Four.</s>", True)],
        [
            ("<s>[INST] Two plus two? [/INST] Four.</s>[INST] Be brief.\n\nAnd three? [/INST]", False),
            (" Five, I think.</s>", True),
        ],
    ],
    "phi": [
        [
            ("<|system|>\nBe brief.<|end|>\n<|user|>\nTwo plus two?<|end|>\n<|assistant|>\n", False),
            ("Four.<|end|>", True),
            ("\n<|user|>\nAnd three?<|end|>\n<|assistant|>\n", False),
            ("Five, I think.<|end|>", True),
            ("\n<|endoftext|>", False),
        ]
    ],
    "reasoning": [
        chatml(
            ("system", "Be brief.", False),
            ("user", "Two plus two?", False),
            ("assistant", "<think>\n\n</think>\n\nFour.", True),
        ),
        chatml(
            ("system", "Be brief.", False),
            ("user", "Two plus two?", False),
            ("assistant", "Four.", False),
            ("user", "And three?", False),
            ("assistant", "<think>\n\n</think>\n\nFive, I think.", True),
        ),
    ],
}
BY_HAND["marked"] = BY_HAND["tools"] = BY_HAND["chatml"]
"""Layout -> renderings of CONVERSATION."""


@pytest.fixture(scope="session")
def byte_level(shared: Path) -> Path:
    return shared / "tokenizers" / "smollm2"


@lru_cache
def loaded(folder: Path) -> Any:
    return load_tokenizer(str(folder))


@lru_cache
def template_of(layout: Layout, folder: Path, **kwargs: Any) -> ChatTemplate:
    """The layout's template on a real tokenizer, which gets its control tokens."""
    tokenizer = copy.deepcopy(loaded(folder))
    named = {"bos_token": layout.bos, "eos_token": layout.eos}
    tokenizer.add_special_tokens({"additional_special_tokens": list(layout.control)})
    tokenizer.add_special_tokens({name: token for name, token in named.items() if token is not None})
    tokenizer.chat_template = layout.source
    return ChatTemplate.of(tokenizer, kwargs=kwargs)


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> list[RenderedConversation]:
    return list(render_conversation(template, pieces_of(template.tokenizer), messages, **options))


@lru_cache
def pieces_of(tokenizer: Any) -> list[bytes]:
    return token_bytes(tokenizer)


def scored(template: ChatTemplate, conversation: RenderedConversation) -> list[str]:
    """The text of every scored run of tokens, end token included."""
    return [template.tokenizer.decode(conversation.ids[t.first : t.stop]) for t in conversation.turns]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_and_scored_tokens_are_those_written_by_hand(name: str, byte_level: Path) -> None:
    template = template_of(LAYOUTS[name], byte_level)
    ours = rendered(template, CONVERSATION)
    assert len(ours) == len(BY_HAND[name])
    for conversation, segments in zip(ours, BY_HAND[name], strict=True):
        text = "".join(text for text, _ in segments)
        assert conversation.text == text
        assert conversation.ids.tolist() == template.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert scored(template, conversation) == [text for text, is_scored in segments if is_scored]
        for turn in conversation.turns:
            before = template.tokenizer.decode(conversation.ids[: turn.first])
            assert text.startswith(before + template.tokenizer.decode(conversation.ids[turn.first : turn.stop]))
            assert (turn.ended, turn.unscored) == (True, 0)
            assert turn.byte_end[-1] == turn.byte_end[-2] == len(turn.text.encode())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_context_of_a_turn_is_what_a_model_reads_before_it_answers(name: str, byte_level: Path) -> None:
    """The ids before each turn are those of the conversation so far with the template's generation prompt."""
    template = template_of(LAYOUTS[name], byte_level)
    for conversation in rendered(template, CONVERSATION):
        for turn in conversation.turns:
            asked = template.tokenizer.apply_chat_template(
                CONVERSATION[: turn.message], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            before = conversation.ids[: turn.first].tolist()
            assert template.tokenizer.decode(before) == template.tokenizer.decode(asked["input_ids"])
            if name != "llama3":  # this tokenizer, unlike Llama-3's, joins two line breaks only at the end of a text
                assert before == asked["input_ids"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_control_token_in_a_message_is_text(name: str, byte_level: Path) -> None:
    """It gives no id of a control token, and the turns stay where they are."""
    layout = LAYOUTS[name]
    template = template_of(layout, byte_level)
    literal = layout.control[-1]
    asked, answer = f"What is {literal}?", f"The token {literal} ends it."
    messages = [SYSTEM, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    plain = [SYSTEM, {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "The token ends it."}]
    (ours,), (without,) = rendered(template, messages), rendered(template, plain)
    control = template.tokenizer.convert_tokens_to_ids([*layout.control])
    for token_id in control:
        assert np.sum(ours.ids == token_id) == np.sum(without.ids == token_id)
    assert ours.turns[0].text.endswith(answer)
    assert b"".join(pieces_of(template.tokenizer)[i] for i in ours.ids).decode() == ours.text


def test_a_tokenizer_that_cannot_spell_a_control_token_refuses_it(shared: Path, byte_level: Path) -> None:
    """Llama's sentencepiece puts a word mark before a text but not after a control token."""
    messages = [{"role": "user", "content": "What is <|im_end|>?"}, FOUR]
    with pytest.raises(DataError, match=r"this tokenizer cannot encode it as text\n  found  <\|im_end\|>"):
        rendered(template_of(LAYOUTS["chatml"], shared / "weights" / "stories260K"), messages)
    template = template_of(LAYOUTS["chatml"], byte_level.parent / "t5")  # its word mark follows control tokens too
    (ours,) = rendered(template, messages)
    assert np.sum(ours.ids == template.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    with pytest.raises(DataError, match=r"found  </s>"):  # a piece of T5's own vocabulary
        rendered(template, [{"role": "user", "content": "What is </s>?"}, FOUR])


def test_last_and_all(byte_level: Path) -> None:
    template = template_of(LAYOUTS["chatml"], byte_level)
    (last,) = rendered(template, CONVERSATION, score="last")
    assert scored(template, last) == ["Five, I think.<|im_end|>"]
    (whole,) = rendered(template, CONVERSATION, score="all")
    assert (whole.turns[0].first, whole.turns[0].stop) == (0, len(whole.ids))


def test_tool_calls_and_reasoning_are_scored(byte_level: Path) -> None:
    template = template_of(LAYOUTS["tools"], byte_level)
    messages: list[dict[str, Any]] = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "name": "add"},
        FIVE,
    ]
    (ours,) = rendered(template, messages, tools=[{"type": "function", "function": {"name": "add"}}])
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    assert scored(template, ours) == [call, "Five, I think.<|im_end|>"]
    assert ours.text.startswith('<|im_start|>system\nTools:{"type": "function"')

    thinking = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}
    template = template_of(LAYOUTS["reasoning"], byte_level)
    assert scored(template, rendered(template, [ASKED, thinking])[0]) == ["<think>\n2 + 2\n</think>\n\nFour.<|im_end|>"]


def test_variables_of_the_template_change_the_prompt_and_the_digest(byte_level: Path) -> None:
    template = template_of(LAYOUTS["reasoning"], byte_level)
    quick = template_of(LAYOUTS["reasoning"], byte_level, enable_thinking=False)
    assert scored(quick, rendered(quick, [ASKED, FOUR])[0]) == ["Four.<|im_end|>"], (
        "the prompt holds the empty reasoning"
    )
    assert template.digest != quick.digest
    assert template.digest == template_of(LAYOUTS["reasoning"], byte_level).digest


def test_a_turn_that_is_not_what_the_prompt_promises_is_refused(byte_level: Path) -> None:
    template = template_of(LAYOUTS["reasoning"], byte_level, enable_thinking=False)
    thinking = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}
    with pytest.raises(DataError, match="another way than its own generation prompt"):
        rendered(template, [ASKED, thinking])


def test_what_cannot_be_rendered_is_an_error(byte_level: Path) -> None:
    template = template_of(LAYOUTS["mistral"], byte_level)
    with pytest.raises(DataError, match="only system, user and assistant"):
        rendered(template, [ASKED, FOUR, {"role": "tool", "content": "5"}, FIVE])
    with pytest.raises(DataError, match="no turn of the assistant"):
        rendered(template, [ASKED])
    with pytest.raises(DataError, match="private-use character"):
        rendered(template, [{"role": "user", "content": chr(MASK_START)}, FOUR])
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate.of(load_tokenizer(str(byte_level)))


def test_a_turn_without_an_end_token_is_scored_to_its_end(byte_level: Path) -> None:
    layout = Layout("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ())
    template = template_of(layout, byte_level)
    (ours,) = rendered(template, [ASKED, FOUR])
    assert (scored(template, ours), ours.turns[0].ended) == (["assistant: Four."], False)


def test_a_control_token_may_hold_the_white_space_after_it(byte_level: Path) -> None:
    """As Phi-3 registers its tokens."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(loaded(byte_level))
    phi = LAYOUTS["phi"]
    tokens = [AddedToken(text, rstrip=True, special=True) for text in phi.control]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "eos_token": phi.eos})
    template = ChatTemplate.of(tokenizer, phi.source)
    (ours,) = rendered(template, CONVERSATION)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [int(ours.ids[turn.stop - 1]) for turn in ours.turns] == [end, end]
    assert [(turn.text, turn.ended) for turn in ours.turns] == [("Four.", True), ("Five, I think.", True)]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi", "marked"])
def test_a_conversation_may_begin_with_the_assistant(name: str, byte_level: Path) -> None:
    template = template_of(LAYOUTS[name], byte_level)
    (ours,) = rendered(template, [{"role": "assistant", "content": "Hello."}, ASKED, FOUR])
    assert [turn.text for turn in ours.turns] == ["Hello.", "Four."]


def test_headers_are_never_scored(byte_level: Path) -> None:
    mistral = template_of(LAYOUTS["mistral"], byte_level)
    with pytest.raises(DataError, match="begins with the assistant"):
        rendered(mistral, [{"role": "assistant", "content": "Hello."}, ASKED, FOUR])
    layout = LAYOUTS["chatml"]
    deaf = Layout(layout.source.partition("{% if add_generation_prompt")[0], layout.control, eos=layout.eos)
    with pytest.raises(DataError, match="no generation prompt"):
        rendered(template_of(deaf, byte_level), [ASKED, FOUR])


def test_several_marks_of_a_turn_are_one_run(byte_level: Path) -> None:
    layout = LAYOUTS["marked"]
    marks = "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>"
    source = layout.source.replace("{{ m.content }}<|im_end|>", marks, 1)
    template = template_of(Layout(source, layout.control, eos=layout.eos), byte_level)
    (ours,) = rendered(template, CONVERSATION)
    assert scored(template, ours) == ["Four.<|im_end|>", "Five, I think.<|im_end|>"]


def with_tokens(layout: Layout, folder: Path, tokens: tuple[str, ...], *, special: bool) -> ChatTemplate:
    """The layout's template on a tokenizer in which `tokens` are special or not, and the layout's own are not."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(loaded(folder))
    named = {"bos_token": layout.bos, "eos_token": layout.eos}
    tokenizer.add_special_tokens({n: t for n, t in named.items() if t is not None and t not in tokens})
    added = [AddedToken(text, special=special, normalized=False) for text in tokens]
    tokenizer.add_tokens(added, special_tokens=special)
    rest = [AddedToken(text, special=False, normalized=False) for text in layout.control if text not in tokens]
    tokenizer.add_tokens(rest)
    return ChatTemplate.of(tokenizer, layout.source)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi", "marked"])
def test_tokens_around_turns_are_control_tokens_whether_the_tokenizer_calls_them_special_or_not(
    name: str, shared: Path
) -> None:
    """A user's text that spells them is text, and the turn ends with the end token, to the last id."""
    layout, folder = LAYOUTS[name], shared / "tokenizers" / "gpt2"
    asked = {"role": "user", "content": f"What is {layout.control[-1]} and {layout.control[0]}?"}
    messages = [SYSTEM, asked, {"role": "assistant", "content": f"It is {layout.control[-1]}."}, AGAIN, FIVE]
    both = [with_tokens(layout, folder, layout.control, special=special) for special in (True, False)]
    assert [set(layout.control) <= template.roles.around for template in both] == [True, True]
    (special,), (plain,) = (rendered(template, messages) for template in both)
    assert special.ids.tolist() == plain.ids.tolist()
    assert [(t.first, t.stop, t.ended, t.text) for t in special.turns] == [
        (t.first, t.stop, t.ended, t.text) for t in plain.turns
    ]
    assert all(turn.ended for turn in plain.turns)
    end = both[1].tokenizer.convert_tokens_to_ids(layout.control[-1])
    assert np.sum(plain.ids == end) == (5 if name != "gemma" else 4), "one for each turn: Gemma's has no system turn"


@pytest.mark.parametrize("special", [False, True])
def test_a_turn_whose_prompt_opens_the_reasoning_is_the_whole_answer(special: bool, byte_level: Path) -> None:
    """By hand: each turn after the prompt that a model reads, which shows earlier turns without their reasoning."""
    template = with_tokens(OPENS_REASONING, byte_level, ("<think>", "</think>"), special=special)
    assert template.roles.within == {"<think>", "</think>"}
    messages = [
        ASKED,
        {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\nFour."},
        {"role": "user", "content": "And <|Assistant|>?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFive."},
    ]
    first, second = rendered(template, messages)
    opening = "<|begin|><|User|>Two plus two?<|Assistant|>"
    assert first.text == opening + "<think>\n2 + 2\n</think>\n\nFour.<|end|>"
    shown = opening + "\n\nFour.<|end|><|User|>And <|Assistant|>?<|Assistant|>"
    assert second.text == shown + "<think>\nhm\n</think>\n\nFive.<|end|>"
    assert scored(template, first) == ["2 + 2\n</think>\n\nFour.<|end|>"]
    assert scored(template, second) == ["hm\n</think>\n\nFive.<|end|>"]
    count = template.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|Assistant|>"])
    assert [int(np.sum(first.ids == token_id)) for token_id in count] == [1, 1, 1]
    assert [int(np.sum(second.ids == token_id)) for token_id in count] == [1, 1, 2]
    with pytest.raises(DataError, match=r"own generation prompt(.|\n)*begin as the prompt ends"):
        rendered(template, [ASKED, FOUR])


def test_a_template_sees_the_reasoning_in_a_message_where_its_tokens_are_special(byte_level: Path) -> None:
    """Qwen3's way: `</think>` in the content is looked for, and old reasoning is dropped."""
    layout = LAYOUTS["reasoning"]
    source = layout.source.replace(
        "{{ m.content }}", "{{ m.content.split('</think>')[-1] if loop.last else m.content }}"
    )
    both = [
        with_tokens(
            Layout(source, layout.control, eos=layout.eos), byte_level, ("<think>", "</think>"), special=special
        )
        for special in (False, True)
    ]
    messages = [ASKED, {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\nFour."}]
    (plain,), (special,) = (rendered(template, messages) for template in both)
    assert (
        plain.text
        == special.text
        == "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n"
        + ("<think>\n\n</think>\n\n\n\nFour.<|im_end|>\n")
    )
    assert plain.ids.tolist() == special.ids.tolist()


def test_a_users_special_reasoning_token_is_text(byte_level: Path) -> None:
    template = with_tokens(OPENS_REASONING, byte_level, ("<think>", "</think>"), special=True)
    asked = {"role": "user", "content": "What does <think> mean?"}
    (ours,) = rendered(template, [asked, {"role": "assistant", "content": "<think>\n</think>It opens."}])
    assert np.sum(ours.ids == template.tokenizer.convert_tokens_to_ids("<think>")) == 1, "that of the prompt"


def test_turns_that_are_not_to_be_learned_are_read_and_not_scored(byte_level: Path) -> None:
    template = template_of(LAYOUTS["chatml"], byte_level)
    (whole,), (one,) = rendered(template, CONVERSATION), rendered(template, CONVERSATION, learned=(4,))
    assert one.ids.tolist() == whole.ids.tolist()
    assert scored(template, one) == ["Five, I think.<|im_end|>"]
    (last,) = rendered(template, CONVERSATION, learned=(2,), score="last")
    assert scored(template, last) == ["Four.<|im_end|>"]


def test_a_line_break_that_joins_the_prompts_is_scored_and_known(byte_level: Path) -> None:
    """`assistant\n` and an answer that begins with a line break: this tokenizer has one token for both breaks."""
    template = template_of(LAYOUTS["chatml"], byte_level)
    (joined,) = rendered(template, [ASKED, {"role": "assistant", "content": "\n\nFour."}])
    (plain,) = rendered(template, [ASKED, FOUR])
    assert (joined.turns[0].before, plain.turns[0].before) == (1, 0)
    assert scored(template, joined) == ["\n\n\nFour.<|im_end|>"]
    assert joined.turns[0].text == "\n\nFour.", "the prompt's break is no part of the turn's text"


def test_a_turn_without_text_is_its_end_token(byte_level: Path) -> None:
    """A call of a tool that the template does not write."""
    template = template_of(LAYOUTS["chatml"], byte_level)
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    (ours,) = rendered(template, [ASKED, calls, {"role": "tool", "content": "5"}, FIVE])
    assert scored(template, ours) == ["<|im_end|>", "Five, I think.<|im_end|>"]
