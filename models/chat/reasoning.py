"""The reasoning that a model writes before its answer, between `<think>` and `</think>`, as Qwen3, DeepSeek-R1 and others do."""

from __future__ import annotations

from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoned:
    """What a model wrote, in two parts."""

    reasoning: str | None
    """What it thought, without the line ends around it; None where it did not think."""
    answer: str | None
    """What it answered, without the line ends before it; None where it was cut short while it thought."""


def split_reasoning(text: str, prompt: str = "") -> Reasoned:
    """What a model wrote, as reasoning and answer.

    prompt   the text that it wrote after; some chat templates open the reasoning there
    """
    before, closing, answer = text.partition(CLOSING)
    opened = before.lstrip().startswith(OPENING)
    if closing:
        reasoning = before.lstrip().removeprefix(OPENING) if opened else before
        return Reasoned(reasoning.strip("\n") or None, answer.lstrip("\n"))
    if opened or prompt.rstrip().endswith(OPENING):
        return Reasoned(text.lstrip().removeprefix(OPENING).strip("\n") or None, None)
    return Reasoned(None, text)
