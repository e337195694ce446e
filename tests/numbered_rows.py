"""Made-up rows of instruction tasks: each is the row that a task's file shows, with a number in its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd.data.instruction_tasks.task_files import load_task


def numbered_row(value: Any, number: int) -> Any:
    """A row of a task's file as row `number`: its texts differ from those of other rows, its labels do not."""
    if isinstance(value, str):
        return f"{value} {number}"
    if isinstance(value, list):
        return [numbered_row(one, number) for one in value]
    return {k: numbered_row(v, number) for k, v in value.items()} if isinstance(value, dict) else value


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_task(root: Path, name: str, rows: int = 3) -> None:
    """A few rows of every split of a task, no two alike."""
    task = load_task(name)
    for place, split in enumerate(sorted({part.name for part in task.splits.values()})):
        numbers = range(100 * place, 100 * place + rows)
        extra = [{"concept_set_idx": n} if name == "common_gen" else {} for n in numbers]
        shown = [numbered_row(dict(task.example), n) | more for n, more in zip(numbers, extra, strict=True)]
        save_rows(root / name / f"{split}.jsonl", shown)


def save_hellaswag(root: Path) -> None:
    row = {"activity_label": "Baking", "ctx_a": "A baker opens the oven.", "ctx_b": "he", "label": 2}
    row |= {"ctx": "A baker opens the oven. he", "endings": ["swims.", "sings to it.", "takes the bread.", "sleeps."]}
    save_rows(root / "hellaswag" / "validation.jsonl", [row | {"ind": n, "label": n % 4} for n in range(6)])
