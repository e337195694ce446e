"""Added tokens and what they are to a chat template: those that open and close turns, and those that an answer may hold.

A tokenizer's special tokens are control tokens. A template may also write tokens around its turns that the tokenizer does not call
special (DeepSeek's `<|User|>`, a ChatML model whose `<|im_end|>` was added by hand): to a model they are control tokens all the
same. They are found by rendering a few plain messages.

An answer may hold tokens of its own: the reasoning between `<think>` and `</think>`. These are tokens that the template looks for
in a message, or that its generation prompt opens for the answer. They are tokens in the assistant's messages, and text in others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError

PROBE = "zq"
"""Text of the plain messages."""
READING = {
    *("split", "rsplit", "startswith", "endswith", "replace", "strip", "lstrip", "rstrip", "partition", "rpartition"),
    *("find", "rfind", "index", "count", "removeprefix", "removesuffix"),
}
"""Methods and filters with which a template looks for a text in a message."""

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, whether the generation prompt follows) -> the rendering. Raises DataError."""


@dataclass(frozen=True)
class TokenRoles:
    """Texts of added tokens, by what they are to a template."""

    around: frozenset[str] = frozenset()
    """Tokens that open or close turns."""
    within: frozenset[str] = frozenset()
    """Tokens that an answer may hold as tokens."""


def token_roles(source: str, added: Sequence[str], render: Render) -> TokenRoles:
    """What the added tokens are to the template `source`."""
    user, answer = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
    asked = _rendered(render, [{"role": "system", "content": PROBE}, user]) + _rendered(render, [user])
    prompt, turn = _rendered(render, [user], prompt=True), _rendered(render, [user, answer])
    after = turn.rpartition(PROBE)[2] + "".join(_rendered(render, [user, answer, user]).split(PROBE)[-2:])
    opened = prompt[_common(prompt, turn) :]
    looked_for = [opened, *_looked_for(source)]
    spoken = _with_pairs({text for text in added if any(text in compared for compared in looked_for)}) & {*added}
    around = {text for text in added if text in asked or text in after or (text in prompt and text not in spoken)}
    return TokenRoles(frozenset(around), frozenset(spoken - around))


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
    """A rendering; empty where the template refuses the messages."""
    try:
        return render(messages, prompt)
    except DataError:
        return ""


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _with_pairs(tokens: set[str]) -> set[str]:
    """The tokens, with `<think>` for `</think>`, and the other way round."""
    return tokens | {
        text[0] + text[2:] if text[1:2] == "/" else text[0] + "/" + text[1:] for text in tokens if len(text) > 2
    }


def _looked_for(source: str) -> Iterator[str]:
    """The texts that a template looks for: in a comparison, or with a method such as `split`."""
    from jinja2 import Environment, TemplateError, nodes

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (TemplateError, RecursionError):
        return
    readers: list[nodes.Node] = list(tree.find_all(nodes.Compare))
    readers += [call for call in tree.find_all(nodes.Call) if getattr(call.node, "attr", None) in READING]
    readers += [filtered for filtered in tree.find_all(nodes.Filter) if filtered.name in READING]
    for reader in readers:
        for constant in reader.find_all(nodes.Const):
            if isinstance(constant.value, str):
                yield constant.value
