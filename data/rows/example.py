"""`Example`: a piece of text to learn from, and the digest of an ordered list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Text only. Order and ids are stable: the same source gives the same list, always."""

    id: str
    """Unique within a source, e.g. `train/12` or `module:json.decoder#3`."""
    target: str
    """The text whose tokens are scored."""
    prompt: str = ""
    """Text before the target: seen by the models, not scored."""
    task: str = "text"
    """Name of the source or task."""
    split: str = "train"
    """`train`, `heldout`, `validation`, `test`, …"""
    choices: tuple[str, ...] = ()
    """Texts to choose the answer from, where the task is a choice; `target` is one of them."""
    answer: int | None = None
    """Index of the right one in `choices`."""
    references: tuple[str, ...] = ()
    """All acceptable targets, where there are several; empty = `target` alone."""
    keywords: tuple[str, ...] = ()
    """Words that an answer has to use, where the task says so."""
    complete: bool = True
    """Does the target come to its end? False for an answer that was cut short: no end token is scored."""


def text_digest(examples: Iterable[Example]) -> str:
    """Hex digest of ids, prompts and targets in their order (blake2b, 32 bytes, fields length-prefixed).

    A target that was cut short is marked by a fourth field.
    """
    digest = hashlib.blake2b(digest_size=32)
    for example in examples:
        for field in (example.id, example.prompt, example.target, *(() if example.complete else ("…",))):
            data = field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
