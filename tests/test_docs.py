"""The documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "cache_builder", "student_trainer", "evaluation", "commands", "benchmarks", "scripts")


def tree() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text[text.index("## The tree") :]


def test_the_tree_names_every_module() -> None:
    named = set(re.findall(r"[\w-]+\.py\b", tree()))
    there = {p.name for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py"}
    assert named == there | {"cli.py"}


def test_every_command_of_the_readme_exists() -> None:
    from kd.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^    kd (.+)$", text, flags=re.MULTILINE):
        words = line.split()
        command = cli.commands[words[0]]
        if isinstance(command, click.Group):
            command = command.commands[words[1]]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        used = {w for w in line.partition("  #")[0].split() if w.startswith("--")}
        assert used <= known, used - known


def test_files_that_documents_point_to_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:docs|tests|benchmarks|scripts|data|cache_builder|student_trainer|evaluation|commands)/[\w./-]+)`",
            text,
        ):
            assert (ROOT / path).exists(), f"{name} points to {path}"


def test_no_placeholder_is_left() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b(?!`)", text.replace("KD_SHARED", "")), "a placeholder in README.md"


def test_the_task_file_in_the_documents_is_a_task(tmp_path: Path) -> None:
    from kd.data.data_settings import InstructionConfig
    from kd.data.tasks.rendering import show_templates
    from kd.data.tasks.task_files import load_task

    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "tickets.yaml").write_text(first, encoding="utf-8")
    (tmp_path / "pinned.yaml").write_text(second, encoding="utf-8")
    shown = show_templates(load_task(str(tmp_path / "tickets.yaml")), InstructionConfig())
    assert [e.target for e in shown] == ["urgent", "urgent", "Login"]
    assert len(load_task(str(tmp_path / "pinned.yaml")).templates) >= 10
