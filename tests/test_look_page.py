"""docs/how-to/look-into-a-cache.md: its commands are run as they are written, and its keys are those of the document."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from terminal import kd

from kd.cache_builder.look.cache_view import CacheView
from kd.cache_builder.showing import show_cache

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "look-into-a-cache.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line.strip()) for line in PAGE.splitlines() if line.startswith("    kd ")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Command -> what it printed, all run in one folder, in the page's order."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = {" ".join(words): kd(*words[1:]) for words in COMMANDS}
        code = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
        names: dict[str, object] = {}
        exec(code[0], names)
        assert isinstance(names["view"], CacheView)
        printed["view"] = json.dumps(show_cache("runs/cache", 17).document)
        printed["pages"] = " ".join(sorted(p.name for p in folder.glob("*.html")))
    return printed


def test_every_command_of_the_page_runs(outputs: dict[str, str]) -> None:
    assert len(COMMANDS) >= 10
    assert outputs["pages"] == "compared.html page.html student.html uncertain.html"
    assert "most probable" in outputs["kd cache show runs/cache 17 --token 5 --top 20"]


def test_the_keys_on_the_page_are_those_of_the_document(outputs: dict[str, str]) -> None:
    document = json.loads(outputs["kd cache show runs/cache 17 --json"])
    assert document == json.loads(outputs["view"])
    section = PAGE[PAGE.index("## For programs") : PAGE.index("## What each kind")]
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
