"""The model card parses as Hugging Face reads it, and says where the student comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from kd.common.errors import DataError
from kd.student_trainer.model_card import render_card, write_card


def parse(text: str) -> tuple[dict[str, object], dict[str, str], str]:
    """Front matter, the cells of all tables, and the whole text."""
    _, front, body = text.split("---\n", 2)
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", body, re.MULTILINE)
    return yaml.safe_load(front), dict(rows), body


def test_a_card_names_cache_teacher_and_scores(run, kl_reader, student_dir) -> None:
    finished = run(alpha=0.5, temperature=2.0)
    path = write_card(finished.out, [("perplexity, held out", "12.34")])
    assert path == finished.out / "README.md"
    front, cells, body = parse(path.read_text())
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "kd"],
    }
    assert cells["cache fingerprint"] == kl_reader.manifest.fingerprint
    assert cells["teacher"] == kl_reader.manifest.provenance["teacher"]
    assert cells["student"] == student_dir.name
    assert cells["perplexity, held out"] == "12.34"
    assert cells["last distillation loss (nats)"] == f"{finished.result.kd:.4f}"
    assert cells["optimizer steps"] == "3"
    assert "loss kl (tail ghost, temperature 2, alpha 0.5)" in body


def test_a_fine_tuned_student_is_not_called_distilled(run) -> None:
    front, cells, body = parse(write_card(run(loss="ce").out).read_text())
    assert front["tags"] == ["fine-tuned", "kd"]
    assert "last distillation loss (nats)" not in cells
    assert "Distilled" not in body


@pytest.mark.parametrize(("student", "named"), [("org/model", True), ("demo", False), ("random:gpt2", False)])
def test_only_a_hub_model_is_named_as_base_model(run, student: str, named: bool) -> None:
    document = json.loads((run(max_steps=1).out / "run.json").read_text()) | {"student": student}
    front, _, _ = parse(render_card(document, []))
    assert front.get("base_model") == (student if named else None)


def test_a_card_replaces_the_card_before_it(run) -> None:
    finished = run(max_steps=1)
    write_card(finished.out, [("accuracy", "0.1")])
    _, cells, _ = parse(write_card(finished.out, [("accuracy", "0.2")]).read_text())
    assert cells["accuracy"] == "0.2"


def test_what_is_no_finished_run_gets_no_card(run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a training run"):
        write_card(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=1)
    with pytest.raises(DataError, match="not finished"):
        write_card(tmp_path / "run")
    assert not (tmp_path / "run" / "README.md").exists()


def test_names_of_strangers_are_no_markup_and_paths_end_in_a_name(run) -> None:
    document = json.loads((run(max_steps=1).out / "run.json").read_text()) | {
        "name": "<script>alert(1)</script>",
        "teacher": "[x](javascript:alert(1))|`a`\n\n# b\x1b]0;c\x07",
        "student": "/home/ann/models/<img src=x>",
        "loss": "<b>kl</b>",
        "corpus": {"corpus": "https://u:p@host/d.csv?sig=abc", "split": "<i>"},
        "cache_fingerprint": "`<u>",
    }
    _, cells, body = parse(render_card(document, [("<s>", "<s>")]))
    assert not re.search(r"<[a-z/]", body)
    assert not set(body) & set("\x1b\x07")
    assert "](javascript" not in body.replace("\\](", "")
    assert cells["student"] == "&lt;img src=x&gt;"
    assert cells["text"] == r"https://\*\*\*@host/d.csv?sig=\*\*\* (&lt;i&gt;)"
