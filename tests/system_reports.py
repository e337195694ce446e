"""Evaluations of the reference systems' tasks with made-up answers, and the cells that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kd.evaluation.results import EvalReport

RANKED = ("boolq", "anli_r1", "paws", "cosmos_qa")
WRITTEN = {
    "squad": ("squad_f1",),
    "samsum": ("rougeL", "bertscore"),
    "xsum": ("rougeL", "rougeLsum", "bertscore"),
    "common_gen": ("rouge1", "rougeL", "coverage"),
}
"""Task -> the metrics that its answers are scored with."""
Scores = Mapping[str, np.ndarray]
"""`METRIC/TASK` -> the score of each example."""


def made_up_scores(seed: int, quality: float, *, examples: int = 40) -> dict[str, np.ndarray]:
    """Scores of a model that is right with probability `quality`; the rows of a seed are hard for every model."""
    hard = np.random.default_rng(0).uniform(size=examples)
    own = np.random.default_rng(seed)
    scores = {f"accuracy/{t}": (own.uniform(size=examples) * 0.5 + hard * 0.5 < quality).astype(float) for t in RANKED}
    for task, metrics in WRITTEN.items():
        for metric in metrics:
            scores[f"{metric}/{task}"] = np.clip(quality - 0.3 * hard + 0.2 * own.uniform(size=examples), 0, 1)
    return scores | {f"choice_match/{t}": scores[f"accuracy/{t}"] for t in ("boolq", "anli_r1")}


def system_report(model: str, split: str, scores: Scores, parameters: int = 123_456_789, **changes: Any) -> EvalReport:
    """The report of a model with these scores: rank classification and generation of one text."""
    tasks: dict[str, dict[str, Any]] = {"choices": {}, "generation": {}}
    documents: dict[str, dict[str, Any]] = {}
    for task, wanted in (("choices", ("accuracy",)), ("generation", ())):
        chosen = {k: v for k, v in scores.items() if (k.partition("/")[0] in wanted) == bool(wanted)}
        kept: dict[str, list[float]] = {}
        total = sum(map(len, chosen.values()))
        start = 0
        for name, values in chosen.items():
            mean, n = float(values.mean()), len(values)
            influence = np.zeros(total)
            influence[start : start + n] = (values - mean) / n * math.sqrt(n / (n - 1) * (total - 1) / total)
            start += n
            kept[name] = influence.tolist()
            metric, _, part = name.partition("/")
            tasks[task][name] = {
                "value": mean,
                "stderr": float(values.std(ddof=1) / math.sqrt(n)),
                "n": n,
                "over": "example",
                "unit": "share of examples",
                "better": "higher",
                "title": f"{metric}: {part}",
            }
        documents[task] = {"digest": f"{split}-{task}", "count": total, "influence": kept}
    settings = {"text_digest": split}
    fields: dict[str, Any] = {
        "model": model,
        "parameters": parameters,
        "identity": {"weights": model, "quantization": "none"},
        "tokenizer": "t",
        "tasks": tasks,
        "settings": {task: dict(settings) for task in tasks},
        "data": {"spec": "flan:eight", "split": split},
        "cache": None,
        "versions": {},
        "documents": documents,
    }
    return EvalReport(**fields | changes)


def save_student(folder: Path, student: str, loss: str, scores: Mapping[str, Scores], parameters: int) -> Path:
    """The folder of a student with its scores by split: `eval-test`, `eval-train`."""
    folder.mkdir(parents=True)
    settings = {"student": student, "loss": loss, "seed": 0, "out": str(folder), "cache": "c"}
    run = {"name": folder.name, "student": student, "loss": loss, "cache_fingerprint": "f", "settings": settings}
    (folder / "run.json").write_text(json.dumps(run | {"complete": True}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "ce": 2.0, "tokens": 9}) + "\n")
    for split, values in scores.items():
        system_report(str(folder), split, values, parameters).save(folder / f"eval-{split}")
    return folder


FAMILY = {"small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184, "xxl": 11_135_332_352}
STUDENTS = {
    "openai-community/gpt2-medium": 354_823_168,
    "EleutherAI/pythia-410m": 405_334_016,
    "HuggingFaceTB/SmolLM-360M": 361_821_120,
}


def save_system(root: Path) -> tuple[list[Path], dict[tuple[str, str], Scores]]:
    """Folders of the teacher's family and of three pairs, on both splits; and the scores by (name of the folder, split)."""
    known: dict[tuple[str, str], Scores] = {}
    folders: list[Path] = []
    for split in ("test", "train"):
        for number, (name, parameters) in enumerate(FAMILY.items()):
            scores = made_up_scores(number + 10, 0.5 + 0.05 * number + 0.05 * (split == "train"))
            known[(f"flan-t5-{name}", split)] = scores
            identity = {"weights": name, "quantization": "bitsandbytes-nf4-double" if "x" in name else "none"}
            report = system_report(f"google/flan-t5-{name}", split, scores, parameters, identity=identity)
            report.save(root / f"family-{split}" / f"{number}-flan-t5-{name}")
        folders.append(root / f"family-{split}")
    for number, (student, parameters) in enumerate(STUDENTS.items()):
        for loss, gain in (("ce", 0.0), ("uld", 0.2 - 0.15 * number)):
            name = f"{student.rpartition('/')[2]}-{loss}"
            by_split = {
                split: made_up_scores(100 + number * 10 + (loss == "uld"), 0.45 + gain + 0.1 * (split == "train"))
                for split in ("test", "train")
            }
            known |= {(name, split): scores for split, scores in by_split.items()}
            folders.append(save_student(root / name, student, loss, by_split, parameters))
    return folders, known
