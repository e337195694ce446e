"""No two modules use one name for different things.

Functions and classes at the top of a module are compared; those that begin with an underscore are private to their module,
and methods belong to their class. A function in `commands/` may have the name of the function that it runs (`kd train` is
called `train`, like the training it starts), if its module imports that function.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> list[Path]:
    """Every module of the package."""
    folders = {p.parent for p in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}
    return [ROOT / "cli.py", *(path for folder in sorted(folders) for path in sorted(folder.rglob("*.py")))]


def public_names(tree: ast.Module) -> set[str]:
    """Functions and classes at the top of a module."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")}


def imported_names(tree: ast.Module) -> set[tuple[str, str]]:
    """(module, name) of every `from kd… import name`, at the top or in a function."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {(str(node.module), alias.name) for node in imports for alias in node.names}


def clashes(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Name -> the modules that define it, where there are several and none is a command that runs the others."""
    modules_of: dict[str, list[str]] = defaultdict(list)
    for module, tree in trees.items():
        for name in public_names(tree):
            modules_of[name].append(module)
    found = {}
    for name, where in modules_of.items():
        runs_another = {
            module
            for module in where
            if module.startswith("kd.commands.")
            and any((other, name) in imported_names(trees[module]) for other in where if other != module)
        }
        if len(set(where) - runs_another) > 1:
            found[name] = sorted(where)
    return found


def parsed(texts: dict[str, str]) -> dict[str, ast.Module]:
    return {module: ast.parse(text) for module, text in texts.items()}


def test_a_clash_is_seen_and_a_command_may_be_called_as_what_it_runs() -> None:
    one, two = "def load(): ...\ndef _own(): ...", "class load: ...\ndef _own(): ...\ndef other(): ..."
    assert clashes(parsed({"kd.a": one, "kd.b": two})) == {"load": ["kd.a", "kd.b"]}
    command = "def load():\n    from kd.a import load as run"
    assert clashes(parsed({"kd.a": one, "kd.commands.a": command})) == {}
    assert clashes(parsed({"kd.a": one, "kd.commands.a": "def load(): ..."})) == {"load": ["kd.a", "kd.commands.a"]}


def test_no_two_modules_define_one_name() -> None:
    trees = {}
    for path in modules():
        name = ".".join(("kd", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    assert clashes(trees) == {}


UNCLEAR = {"found", "place", "own", "told"}
"""Names that say nothing of what a variable holds."""


def variables(tree: ast.Module) -> set[tuple[str, int]]:
    """Name and line of every variable and parameter."""
    stored = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}


def test_variables_say_what_they_hold() -> None:
    assert variables(ast.parse("found = 1\ndef f(place): ...")) == {("found", 1), ("place", 2)}
    unclear = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in modules()
        for name, line in sorted(variables(ast.parse(path.read_text(encoding="utf-8"))))
        if name in UNCLEAR and not (name == "found" and path.name in {"errors.py", "viewed.py"})
    ]
    assert unclear == []
