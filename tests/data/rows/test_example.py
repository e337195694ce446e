"""The digest of a list of examples."""

from __future__ import annotations

import pytest

from kd.data.rows.example import Example, text_digest

A, B = Example("a", "target", prompt="prompt"), Example("b", "other")


@pytest.mark.parametrize(
    "other",
    [
        [B, A],
        [A],
        [Example("c", "target", prompt="prompt"), B],
        [Example("a", "Target", prompt="prompt"), B],
        [Example("a", "target", prompt="Prompt"), B],
        [Example("a", "ttarget", prompt="promp"), B],  # the same bytes, divided elsewhere
    ],
)
def test_the_digest_depends_on_order_ids_prompts_and_targets(other: list[Example]):
    assert text_digest(other) != text_digest([A, B])


def test_the_digest_does_not_depend_on_task_or_split():
    assert text_digest([Example("a", "target", prompt="prompt", task="x", split="y"), B]) == text_digest([A, B])
