"""The notebooks of docs/: their cells run, and in a kernel of Jupyter they show what is stored in them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from page_runner import DOCS, require_printed
from test_docs import script

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    """The cells of code."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict) -> str:
    """The text that is stored below a cell."""
    return "\n".join("".join(one.get("text") or one["data"]["text/plain"]) for one in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: starting a kernel takes many seconds."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_output_of_every_cell_and_of_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells(path)) >= 3
    assert not {one["output_type"] for cell in cells(path) for one in cell["outputs"]} & {"error"}
    assert "/home/" not in text
    assert "/tmp/" not in text


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None and "CI" not in os.environ,
    reason="no nbclient here: pip install '.[docs]'",
)
@pytest.mark.filterwarnings("default")  # those of Jupyter
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kernel_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    again = script("run_notebooks").run_notebook(path, tmp_path)
    for cell, other in zip(cells(path), [c for c in again.cells if c.cell_type == "code"], strict=True):
        expected, found = shown(cell), shown(json.loads(json.dumps(other)))
        require_printed(expected, found, path.name)
        assert [set(one.get("data", ())) for one in cell["outputs"]] == [
            set(one.get("data", ())) for one in other.outputs
        ]
