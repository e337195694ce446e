"""`evaluations.jsonl` of a run: one JSON object per scoring of the student while it learned (`kd.student_trainer.midway`).

{"step": 0, "epoch": 0.0, "seconds": 4.1, "tasks": {task: {metric: {"value", "stderr", "n", …}}}, "settings": {…}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd.common.files import write_atomic

RECORDS = "evaluations.jsonl"


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines of `evaluations.jsonl`, but for one that was cut short; none where there is no such file."""
    path = folder / RECORDS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_evaluations(folder: Path, checkpoint_step: int | None) -> None:
    """Drop the lines that a run resumed at a checkpoint (None: from its start) is going to write again."""
    if (folder / RECORDS).is_file():
        kept = [r for r in read_evaluations(folder) if checkpoint_step is not None and r["step"] <= checkpoint_step]
        write_atomic(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in kept))
