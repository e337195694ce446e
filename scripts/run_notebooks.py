"""Run the notebooks of docs/ and store what they print: `python scripts/run_notebooks.py`. A test runs them again and compares."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def run_notebook(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`; raises nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of this run
        if cell.cell_type == "code":  # progress bars and warnings
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run all notebooks, each in a folder of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(nbformat.writes(run_notebook(path, Path(folder))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
