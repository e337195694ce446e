"""The model card: a README.md beside the weights that says what the student learned from, and how.

Hugging Face's model-card layout: YAML front matter, then text. Scores come from evaluations that were run, never
from settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kd.common.errors import DataError
from kd.common.files import write_atomic
from kd.common.paths import as_path
from kd.common.shown_text import for_markdown, public_place
from kd.student_trainer.run_folder import read_run

HUB_MODEL = re.compile(r"[\w.-]+/[\w.-]+")
"""Id of a model on the hub, which the card links to."""
CARD = "README.md"


def write_card(run: Path, scores: Sequence[tuple[str, str]] = ()) -> Path:
    """Write `README.md` into a finished run; `scores` are (what, value) lines. Raises DataError for anything else."""
    document = read_run(run)
    if not document["complete"]:
        raise DataError(
            "this training run is not finished", where=run, try_="its kd train command again, with --resume"
        )
    path = run / CARD
    write_atomic(path, render_card(document, scores))
    return path


def render_card(run: dict[str, Any], scores: Sequence[tuple[str, str]]) -> str:
    """The card's text, from a run's `run.json`."""
    result, settings = run["result"], run["settings"]
    objective = settings["objective"]
    two_sides = run["encoder_decoder"]
    student, teacher, corpus = (
        public_place(str(one)) for one in (run["student"], run["teacher"], run["corpus"]["corpus"])
    )
    auto_class = "AutoModelForSeq2SeqLM" if two_sides else "AutoModelForCausalLM"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text2text-generation" if two_sides else "text-generation",
        "tags": ["knowledge-distillation" if run["loss"] != "ce" else "fine-tuned", "kd"],
        **(
            {"base_model": student}
            if HUB_MODEL.fullmatch(run["student"]) and not os.path.exists(as_path(str(run["student"])))
            else {}
        ),
    }
    how = (
        f"Distilled from {teacher} with loss {run['loss']} (tail {objective['tail']}, "
        f"temperature {objective['temperature']:g}, alpha {objective['alpha']:g})"
        if run["loss"] != "ce"
        else f"Fine-tuned with cross-entropy on the rows of a cache of {teacher} (the teacher's predictions unused)"
    )
    rows = [
        ("student", student),
        ("parameters", f"{result['parameters']:,}"),
        ("teacher", teacher),
        ("text", f"{corpus} ({run['corpus']['split']})"),
        ("cache fingerprint", run["cache_fingerprint"]),
        ("optimizer steps", f"{result['steps']:,}"),
        ("target tokens", f"{result['tokens']:,}"),
        ("learning rate", f"{settings['lr']:g} ({settings['schedule']}, {settings['optimizer']})"),
        ("precision", settings["precision"]),
        ("LoRA rank", str(settings["lora"] or "none")),
        ("seed", str(settings["seed"])),
        ("torch / transformers", f"{run['versions']['torch']} / {run['versions']['transformers']}"),
    ]
    final = [
        ("last training loss (nats)", f"{result['loss']:.4f}"),
        ("last cross-entropy (nats)", f"{result['ce']:.4f}"),
    ]
    if result["kd"] is not None:
        final.append(("last distillation loss (nats)", f"{result['kd']:.4f}"))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {for_markdown(run['name'])}",
        "",
        f"{for_markdown(how)}, with `kd train`.",
        "",
    ]
    for title, table in (("Settings", rows), ("Scores", [*scores, *final])):
        lines += [
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {for_markdown(k)} | {for_markdown(v)} |" for k, v in table),
            "",
        ]
    lines += [
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer",
        f'model = {auto_class}.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
    ]
    return "\n".join(lines)
