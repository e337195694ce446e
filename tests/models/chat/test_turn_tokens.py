"""What added tokens are to a template: around the turns, or in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pytest
from chat_templates import LAYOUTS, OPENS_REASONING, Layout

from kd.common.errors import DataError
from kd.models.chat.turn_tokens import TokenRoles, token_roles

OTHERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|extra|>")


def roles(layout: Layout) -> TokenRoles:
    """The roles of the layout's tokens, and of some others."""

    def render(messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        source = layout.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        variables = {"bos_token": layout.bos or "", "eos_token": layout.eos or ""}
        try:
            template = jinja2.Environment().from_string(source)
            return template.render(messages=messages, add_generation_prompt=prompt, **variables)
        except jinja2.TemplateError as error:
            raise DataError("no") from error

    named = [token for token in (layout.bos, layout.eos) if token]
    return token_roles(layout.source, [*layout.control, *named, *OTHERS], render)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_of_headers_and_ends_are_around_the_turns(name: str) -> None:
    layout = LAYOUTS[name]
    found = roles(layout)
    written = {
        t for t in (*layout.control, layout.bos, layout.eos) if t and not (t == "<|end_of_text|>" or t == "<eos>")
    }
    assert found.around == written, "all but the end tokens that Llama 3's and Gemma's templates do not write"
    assert not found.within


def test_an_answer_may_hold_what_the_prompt_opens_or_the_template_looks_for() -> None:
    found = roles(OPENS_REASONING)
    assert found.within == {"<think>", "</think>"}
    assert found.around == {"<|User|>", "<|Assistant|>", "<|begin|>", "<|end|>"}
    reads = Layout(LAYOUTS["chatml"].source + "{% if messages[0].content.startswith('<tool_call>') %}{% endif %}", ())
    assert roles(reads).within == {"<tool_call>", "</tool_call>"}


def test_a_token_around_turns_is_not_one_of_an_answer_even_where_the_template_looks_for_it() -> None:
    layout = LAYOUTS["chatml"]
    looks = Layout(layout.source + "{% if '<|im_end|>' in messages[0].content %}{% endif %}", layout.control)
    assert roles(looks) == TokenRoles(frozenset(layout.control))


def test_a_template_that_refuses_plain_messages_has_no_roles() -> None:
    assert roles(Layout("{{ raise_exception('no') }}", ("<|im_end|>",))) == TokenRoles()
    assert roles(Layout("{% broken", ("<|im_end|>",))) == TokenRoles()
