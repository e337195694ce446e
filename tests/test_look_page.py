"""docs/how-to/look-into-a-cache.md: its commands are run as they are written, and its keys are those of the document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from page_runner import DOCS, run_page, typed_commands

from kd.cache_builder.showing import show_cache

PAGE = DOCS / "how-to" / "look-into-a-cache.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[str, str]:
    """Command -> what it printed, all run in one folder, in the page's order."""
    return run_page(PAGE, folder)


def test_every_command_of_the_page_runs(outputs: dict[str, str], folder: Path) -> None:
    assert len(typed_commands(PAGE)) >= 10
    assert sorted(p.name for p in folder.glob("*.html")) == [
        "compared.html",
        "page.html",
        "student.html",
        "uncertain.html",
    ]
    assert "most probable" in outputs["kd cache show runs/cache 17 --token 5 --top 20"]


def test_the_keys_on_the_page_are_those_of_the_document(
    outputs: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    document = json.loads(outputs["kd cache show runs/cache 17 --json"])
    assert document == json.loads(json.dumps(show_cache("runs/cache", 17).document))
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## For programs") : text.index("## What each kind")]
    named = set(re.findall(r"`(\w+)`", section))
    token = document["example"]["parts"][-1]["tokens"][0]
    keys = {
        *document,
        *document["example"],
        *document["example"]["parts"][0],
        *token,
        *token["top"][0],
        *token["draws"][0],
    }
    assert keys <= named
