"""What is left out of a text is said alike by every command and by the manifest; several files are one text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATS, PLAIN
from click.testing import CliRunner

from kd.cli import cli

LEFT_OUT = {
    "other_files": {"count": 1, "first": "notes.md"},
    "hidden_files": {"count": 1, "first": ".ipynb_checkpoints"},
    "without_text": {"count": 2, "first": "a.jsonl:1"},
    "beyond_limit": {"count": 1, "first": "b.txt.gz"},
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "TEXTS"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("A copy of a.")
    (folder / "notes.md").write_text("Not read.")
    rows = [{"text": "One line of words."}, {"text": " "}, {"text": None}, {"text": "Another line of words."}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"A third line of words."))
    return folder


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def said_by(*words: str | Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(*words, "--json"))
    return document


def test_show_plan_build_info_and_the_manifest_say_the_same(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = said_by("data", "show", "TEXTS")
    assert shown["examples"] == 3
    assert shown["left_out"] == {reason: entry for reason, entry in LEFT_OUT.items() if reason != "beyond_limit"}
    options = ("--teacher", "demo", "--data", "TEXTS", "--limit", "2", "--out", "cache")
    assert said_by("cache", "plan", *options)["left_out"] == LEFT_OUT
    assert said_by("cache", "build", *options)["left_out"] == LEFT_OUT
    assert said_by("cache", "info", "cache")["left_out"] == LEFT_OUT
    manifest = json.loads(Path("cache/manifest.json").read_text())
    assert manifest["provenance"]["left_out"] == LEFT_OUT
    for words in (("cache", "info", "cache"), ("cache", "plan", *options), ("cache", "build", *options)):
        line = next(line for line in run(*words).splitlines() if line.startswith("  left out"))
        assert line.split(maxsplit=2)[2] == (
            "other files 1 (first notes.md), hidden files 1 (first .ipynb_checkpoints), "
            "without text 2 (first a.jsonl:1), beyond limit 1 (first b.txt.gz)"
        )
    run("cache", "slice", "cache", "--examples", "0:1", "--out", "slice")
    assert said_by("cache", "info", "slice")["left_out"] == LEFT_OUT


def test_several_files_are_one_text_however_they_are_given(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    both = said_by("data", "show", "a.jsonl", "b.txt.gz")
    assert both["examples"] == 3
    assert both["text_digest"] == said_by("data", "show", "a.jsonl,b.txt.gz")["text_digest"]
    assert both["text_digest"] == said_by("data", "show", ".")["text_digest"]
    plan = ("cache", "plan", "--teacher", "demo", "--out", "cache")
    repeated = said_by(*plan, "--data", "a.jsonl", "--data", "b.txt.gz")
    (texts / "c.yaml").write_text("data: [a.jsonl, b.txt.gz]\n")
    assert repeated["fingerprint"] == said_by(*plan, "--config", "c.yaml")["fingerprint"]
    assert repeated["fingerprint"] == said_by(*plan, "--data", "*.*[lz]")["fingerprint"]
    run("cache", "build", "--teacher", "demo", "--out", "cache", "--data", "a.jsonl", "--data", "b.txt.gz")
    options = json.loads(Path("cache/manifest.json").read_text())["provenance"]["options"]
    assert options["spec"] == "a.jsonl,b.txt.gz", "what repair would read"


def test_ls_names_the_types_of_files_and_globs() -> None:
    listed = run("data", "ls")
    assert ".jsonl .json .csv" in listed
    assert ".gz and .zst" in listed
    assert "a glob, or several files" in listed


def test_conversations_are_shown_as_a_template_renders_them(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.jinja").write_text(PLAIN)
    arguments = ["data", "show", str(tmp_path / "chat.jsonl")]
    plain = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(plain.stdout)["kind"] == "conversations"
    arguments += ["--tokenizer", "demo", "--chat-template", str(tmp_path / "plain.jinja")]
    shown = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert shown["rendered"]["chat.jsonl:0"] == (
        "[system] Be brief.\n[user] Two plus two?\n[assistant]⟦ Four.<|endoftext|>⟧\n[user] And three?\n"
        "[assistant]⟦ Five, I think.<|endoftext|>⟧"
    )
    answers = sum(role == "assistant" for chat in CHATS for role, _ in chat)
    assert sum(text.count("⟦") for text in shown["rendered"].values()) == answers
    assert "⟦ A small fox.<|endoftext|>⟧" in CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
