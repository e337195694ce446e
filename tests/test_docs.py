"""The documents say what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import click
import pytest
from test_layout import PACKAGES, modules

ROOT = Path(__file__).parents[1]
MONTHS = set((ROOT / "docs" / "log").glob("*.md"))
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "CHANGELOG.md"} - MONTHS)
"""Every page but the changelog and the log's months, which name files as they were."""


def script(name: str) -> ModuleType:
    """A script of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `kd` command in an indented block of a page, but of those that show how wrong usage ends."""
    lines = page.read_text(encoding="utf-8").replace(" \\\n", " ").splitlines()
    return [
        line.partition(" #")[0].split()[1:]
        for line in lines
        if line.startswith("    kd ") and "# exit code 2" not in line
    ]


def test_the_tree_is_that_of_the_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert script("write_architecture").render(page) == page, "run `make docs`"


def test_the_tree_holds_every_module_of_the_package_with_its_own_line() -> None:
    writer = script("write_architecture")
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    for path in modules():
        if path.name != "__init__.py":
            depth = len(path.relative_to(ROOT).parts) - 1
            assert f"{'  ' * depth + path.name:<34} {writer.first_line(path)}" in lines, path


def test_central_types_are_defined_where_the_page_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("| type | where |") : page.index("## The tree")]
    rows = re.findall(r"^\| (`.+?`) \| (`.+?`) \|", table, flags=re.MULTILINE)
    assert rows
    for names, places in rows:
        roots = [ROOT / place for place in re.findall(r"`([^`]+)`", places)]
        files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))]
        code = "\n".join(path.read_text(encoding="utf-8") for path in files)
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"^(class |def )?{name}\b", code, flags=re.MULTILINE), f"{name} is not in {places}"


def test_a_module_without_a_docstring_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = script("write_architecture")
    monkeypatch.setattr(writer, "ROOT", tmp_path)
    (tmp_path / "bare.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bare\.py has no docstring"):
        writer.first_line(tmp_path / "bare.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists(page: Path) -> None:
    from kd.cli import cli

    for words in commands_of(page):
        command: click.Command = cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, f"{page.name}: kd {' '.join(words)}"
            command = command.commands[words.pop(0)]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        used = {w for w in words if w.startswith("--")}
        assert used <= known, f"{page.name}: {used - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_points_to_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "|".join([*PACKAGES, *script("write_architecture").FOLDERS])
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} points to {path}"
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    """By links, over any number of pages."""
    todo, seen = [ROOT / "README.md"], set()
    while todo:
        page = todo.pop()
        if page not in seen and page.exists():
            seen.add(page)
            links = re.findall(r"\]\((?!https?://|#)([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
            todo += [(page.parent / link).resolve() for link in links]
    assert {p for p in PAGES if p.is_relative_to(ROOT / "docs")} <= seen


def test_no_placeholder_is_left() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b(?!`)", text.replace("KD_SHARED", "")), "a placeholder in README.md"


def test_the_task_file_in_the_documents_is_a_task(tmp_path: Path) -> None:
    from kd.data.data_settings import InstructionConfig
    from kd.data.instruction_tasks.rendering import show_templates
    from kd.data.instruction_tasks.task_files import load_task

    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "tickets.yaml").write_text(first, encoding="utf-8")
    (tmp_path / "pinned.yaml").write_text(second, encoding="utf-8")
    shown = show_templates(load_task(str(tmp_path / "tickets.yaml")), InstructionConfig())
    assert [e.target for e in shown] == ["urgent", "urgent", "Login"]
    assert len(load_task(str(tmp_path / "pinned.yaml")).templates) >= 10
