"""`AnswerFolder`: the answers of a teacher in the folder of a build, block by block, and what they were made from.

generated/request.json      what the answers are made from
generated/00003.parquet     the answers to one block of prompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.cache_builder.store.records.cache_identity import identity_difference
from kd.cache_builder.store.writers.answers_table import write_answers
from kd.common.errors import CacheMismatchError
from kd.common.files import canonical_json, process_tag, publish_first, read_json, write_first

ANSWERS_REQUEST = "request.json"


def answers_file(number: int) -> str:
    """Name of the file of a block's answers."""
    return f"{number:05d}.parquet"


class AnswerFolder:
    """Any number of builders share one: of two that answer the same block, the first is the one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begun(self) -> bool:
        """Whether it says what its answers are made from."""
        return (self.path / ANSWERS_REQUEST).exists()

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Record what the answers are made from. Raises CacheMismatchError where there are answers to something else."""
        path = self.path / ANSWERS_REQUEST
        if not self.begun() and write_first(path, canonical_json(dict(identity))):
            return
        differences = identity_difference(dict(identity), read_json(path))
        if differences:
            details = {f"differs {key}": f"asked for {a}, the directory has {b}" for key, a, b in differences[:8]}
            raise CacheMismatchError(
                "the directory holds answers to something else",
                cache=self.place(),
                **details,
                try_="another --out, or the options of that build",
            )

    def place(self) -> object:
        """Where the build is, for errors."""
        return self.path.parent

    def holds(self, number: int) -> bool:
        """Whether a block is answered, and its file in the folder."""
        return (self.path / answers_file(number)).exists()

    def publish(self, number: int, ids: Sequence[str], answers: Sequence[tuple[str, bool]]) -> None:
        """Write the answers to a block. Where another builder was faster, its answers are there afterwards."""
        temporary = self.path / f".staging-{process_tag()}.{number}"
        write_answers(temporary, ids, answers)
        publish_first(temporary, self.path / answers_file(number))
