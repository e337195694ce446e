"""Write the tree in docs/architecture.md from the modules' first docstring lines: `python scripts/write_architecture.py`."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- tree: made by scripts/write_architecture.py -->\n", "<!-- end of tree -->\n"
FOLDERS = {
    "benchmarks": "Measurements of speed, memory and size; `make bench` runs the chief one.",
    "docs": "This documentation; `docs/log/` holds what was measured, month by month.",
    "examples": "Scripts that use the Python API; the tests run them.",
    "scripts": "Scripts that make files of this repository: the demo models, and pages of the documentation.",
    "tests": "The tests; folders and names mirror the package, and golden/ holds a store of every format version.",
}
"""Top-level folders that are no part of the package, and so have no docstring."""
COLUMN = 34
"""Column in which the descriptions begin."""


def first_line(module: Path) -> str:
    """The first paragraph of a module's docstring, on one line. Raises ValueError where there is none."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{module.relative_to(ROOT)} has no docstring")
    return " ".join(text.split("\n\n")[0].split())


def tracked() -> list[Path]:
    """Files of the repository, also those that are not yet committed; ignored ones are left out."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({ROOT / name for name in names.splitlines() if (ROOT / name).is_file()})


def described(folder: Path) -> str:
    """What lives in a folder: its package docstring, else its line in FOLDERS. Raises KeyError where there is neither."""
    package = folder / "__init__.py"
    return first_line(package) if package.exists() else FOLDERS[folder.relative_to(ROOT).as_posix()]


def entries(folder: Path, files: list[Path], depth: int) -> Iterator[str]:
    """Lines of a folder: its modules, then its sub-packages."""
    indent = "  " * depth
    for module in (p for p in files if p.parent == folder and p.suffix == ".py" and p.name != "__init__.py"):
        yield f"{indent}{module.name}".ljust(COLUMN) + f" {first_line(module)}"
    inner = sorted({p.parent for p in files if p.name == "__init__.py" and p.parent.parent == folder})
    for package in inner:
        yield f"{indent}{package.name}/".ljust(COLUMN) + f" {described(package)}"
        yield from entries(package, files, depth + 1)


def tree() -> str:
    """The whole tree as a block of Markdown."""
    files = tracked()
    lines = [f"{p.name:<{COLUMN}} {first_line(p)}" for p in files if p.parent == ROOT and p.suffix == ".py"]
    tops = {p.relative_to(ROOT).parts[0] for p in files if p.parent != ROOT}
    for name in sorted(top for top in tops if not top.startswith(".")):
        lines.append(f"{name + '/':<{COLUMN}} {described(ROOT / name)}")
        if name != "tests":
            lines += entries(ROOT / name, files, 1)
    return "```\n" + "\n".join(lines) + "\n```\n"


def render(page: str) -> str:
    """The page with the tree of today."""
    before, rest = page.split(START)
    return before + START + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
