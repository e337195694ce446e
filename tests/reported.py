"""Evaluations and training runs with made-up numbers, for the tests of reports."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from kd.evaluation.results import EvalReport
from kd.evaluation.statistics.estimates import standard_error


def evaluation(model: str, influences: list[float], perplexity: float, **changes) -> EvalReport:
    """A report of one task whose perplexity moves with each document as told."""
    figure = {
        "value": perplexity,
        "stderr": standard_error(np.array(influences)),
        "n": 900,
        "over": "token",
        "unit": "per token",
        "better": "lower",
        "title": "perplexity",
    }
    settings = {"text_digest": "d1", "seq_len": 24, "stride": 23, "bos": True, "limit_tokens": None}
    kept = {"digest": "same", "count": len(influences), "influence": {"perplexity": influences}}
    values: dict[str, Any] = {
        "model": model,
        "parameters": 12345,
        "identity": {},
        "tokenizer": "t1",
        "tasks": {"perplexity": {"perplexity": figure}},
        "settings": {"perplexity": settings},
        "data": {"spec": "prose.txt", "split": "heldout"},
        "cache": None,
        "versions": {},
        "documents": {"perplexity": kept},
    }
    return EvalReport(**values | changes)


HARD = [0.25, -0.2, 0.11, -0.17] * 4
"""Documents that are hard for every model: standard error 0.78."""


def save_run(folder: Path, *, kd: bool, steps: int = 60, **facts) -> Path:
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        ce = 2 + 4 * np.exp(-step / 20) + 0.1 * rng.normal()
        record = {
            "step": step,
            "loss": ce,
            "ce": ce,
            "kd": ce / 2 if kd else None,
            "lr": 1e-3,
            "tokens": 1000 * step,
            "grad_norm": 1.0,
        }
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = {
        "name": folder.name,
        "student": "/models/tiny",
        "loss": "kl" if kd else "ce",
        "teacher": "demo",
        "cache_fingerprint": "f" * 64,
        "settings": {"alpha": 0.5},
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


class Page(HTMLParser):
    """Tags that are open, links out, pictures, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data
