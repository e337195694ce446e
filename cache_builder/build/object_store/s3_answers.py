"""`S3AnswerFolder`: the answers of a teacher in an object store, by way of a folder on this disk.

A block's file is put only where there is none. Whoever comes second takes the first one's answers, so all builders score the same
texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.store.records.manifest import ANSWERS
from kd.cache_builder.store.writers.answer_folder import ANSWERS_REQUEST, AnswerFolder, answers_file


class S3AnswerFolder(AnswerFolder):
    """An `AnswerFolder` whose files are those of an object store."""

    def __init__(self, path: Path, objects: S3Objects) -> None:
        super().__init__(path)
        self.objects = objects

    def place(self) -> object:
        """As `AnswerFolder.place`."""
        return self.objects.url

    def begun(self) -> bool:
        """As `AnswerFolder.begun`."""
        return super().begun() or self._fetch(ANSWERS_REQUEST)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """As `AnswerFolder.claim`; the first builder's record is put."""
        super().claim(identity)
        if not self._put_first(ANSWERS_REQUEST):
            self._fetch(ANSWERS_REQUEST)
            super().claim(identity)

    def holds(self, number: int) -> bool:
        """As `AnswerFolder.holds`."""
        return super().holds(number) or self._fetch(answers_file(number))

    def publish(self, number: int, ids: Sequence[str], answers: Sequence[tuple[str, bool]]) -> None:
        """As `AnswerFolder.publish`."""
        super().publish(number, ids, answers)
        if not self._put_first(answers_file(number)):
            self._fetch(answers_file(number))

    def _put_first(self, name: str) -> bool:
        return self.objects.put_first(f"{ANSWERS}/{name}", (self.path / name).read_bytes())

    def _fetch(self, name: str) -> bool:
        """Have an object as a file of the folder. Returns whether there is one."""
        data = self.objects.get(f"{ANSWERS}/{name}")
        if data is None:
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)
        return True
