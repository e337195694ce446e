"""What the package imports is what `pyproject.toml` declares, and the base install is enough for the format half."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_layout import ROOT, module_name, modules

from kd.common.extras import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEVELOPMENT = ("dev", "docs", "fuzz")
"""Extras of the tests and of the site, of which the package imports nothing."""
GOLDEN = ROOT / "tests" / "golden" / "v2"


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    """Distributions that requirements name, other extras of this project left out."""
    return {normalised(Requirement(r).name) for r in requirements} - {normalised(PROJECT["name"])}


BASE = declared(PROJECT["dependencies"])
OPTIONAL = {
    extra: declared(requirements)
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra not in DEVELOPMENT
}


def distribution(package: str) -> str:
    """The distribution that brings an import name: as installed here, else by its own name."""
    return normalised(installed().get(package, [package])[0])


@cache
def installed() -> Mapping[str, list[str]]:
    """Import name -> the distributions that bring it, in this environment."""
    return packages_distributions()


def imported(tree: ast.Module, *, on_import: bool) -> Iterator[str]:
    """Dotted names that a module imports; `on_import`: only those that importing it runs, neither in functions nor for types."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def outside(names: Iterator[str]) -> set[str]:
    """The packages of others among dotted names."""
    return {n.partition(".")[0] for n in names} - {"kd", *sys.stdlib_module_names}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


PATHS = {module_name(path): path for path in modules()}


def loaded_with(module: str) -> set[str]:
    """Our modules that importing `module` runs, itself among them."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in PATHS and name not in seen:
            seen.add(name)
            folders = name.split(".")
            todo += [".".join(folders[:n]) for n in range(1, len(folders))]
            todo += [n.removeprefix("kd.") for n in imported(parsed(name), on_import=True) if n.startswith("kd.")]
    return seen


def format_half() -> list[str]:
    """Modules that read, check and copy caches, and the doors of all commands."""
    rooms = (
        "common",
        "commands",
        "cache_builder.store",
        "cache_builder.share",
        "cache_builder.upkeep",
        "cache_builder.look",
    )
    return [m for m in PATHS if m in ("cli", "cache_builder.opening", "cache_builder.showing") or m.startswith(rooms)]


def test_every_import_is_declared() -> None:
    every = {p for m in PATHS for p in outside(imported(parsed(m), on_import=False))}
    assert {distribution(p) for p in every} <= BASE.union(*OPTIONAL.values())


def test_every_declared_package_is_imported() -> None:
    """A tracker, or a reader of weights that are stored quantised, is imported by transformers, which is given its name."""
    every = {distribution(p) for m in PATHS for p in outside(imported(parsed(m), on_import=False))}
    assert BASE.union(*OPTIONAL.values()) - every == OPTIONAL["trackers"] | {"compressed-tensors"}


def test_the_table_of_extras_is_that_of_the_project() -> None:
    assert {extra: {normalised(p) for p in packages} for extra, packages in EXTRAS.items()} == {
        extra: names for extra, names in OPTIONAL.items() if names
    }


def test_all_holds_every_extra_of_a_user() -> None:
    """vLLM pins releases of torch and transformers that the other extras do not; Liger and Triton run on a GPU alone."""
    (requirement,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(requirement).extras == set(EXTRAS) - {"vllm", "liger", "triton"}


def test_extras_that_need_models_bring_the_packages_of_training() -> None:
    for extra in set(EXTRAS) - {"train", "s3"}:
        assert any("train" in Requirement(r).extras for r in PROJECT["optional-dependencies"][extra]), extra


@pytest.mark.parametrize("module", format_half())
def test_the_format_half_is_imported_with_the_base_install_alone(module: str) -> None:
    for name in loaded_with(module):
        used = {distribution(p) for p in outside(imported(parsed(name), on_import=True))}
        assert used <= BASE, f"{module} loads {name}, which imports {used - BASE}"


def test_reading_checking_and_sharing_need_the_base_and_the_extra_of_s3_alone() -> None:
    for name in format_half():
        if not name.startswith("commands"):
            used = {distribution(p) for p in outside(imported(parsed(name), on_import=False))}
            assert used <= BASE | OPTIONAL["s3"], f"{name} imports {used - BASE}"


def test_a_package_that_pyproject_forgets_would_be_seen() -> None:
    tree = ast.parse("def f():\n    import undeclared.part\nif TYPE_CHECKING:\n    import torch\nimport numpy")
    assert outside(imported(tree, on_import=False)) == {"undeclared", "numpy"}
    assert outside(imported(tree, on_import=True)) == {"numpy"}


def kd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kd` in a process in which no package of an extra can be imported."""
    absent = [package for packages in EXTRAS.values() for package in packages]
    script = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import kd.cli; kd.cli.main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("cache", "--help"),
        ("cache", "info", str(GOLDEN)),
        ("cache", "verify", str(GOLDEN)),
        ("cache", "show", str(GOLDEN), "0", "--html", "OUT"),
        ("cache", "show", str(GOLDEN), "--uncertain", "2", "--json"),
        ("cache", "pull", GOLDEN.as_uri(), "OUT"),
        ("cache", "slice", str(GOLDEN), "--profile", "kl", "--top-k", "2", "--out", "OUT"),
        ("cache", "ls", str(GOLDEN.parent)),
        ("data", "ls"),
        ("data", "templates", "boolq"),
        ("recipe", "ls"),
    ],
    ids=" ".join,
)
def test_these_commands_run_with_the_base_install(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = kd(*(str(tmp_path / "out") if word == "OUT" else word for word in arguments))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "--cache", str(GOLDEN), "--student", "demo", "--out", "OUT"), "train"),
        (("cache", "build", "--teacher", "demo", "--data", "demo", "--out", "OUT"), "train"),
        (("eval", "demo", "--tasks", "perplexity", "--data", "demo"), "train"),
        (("report", str(GOLDEN), "--out", "OUT"), "eval"),
        (("cache", "pull", "s3://bucket/cache", "OUT"), "s3"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_missing_package_is_an_error_that_names_the_extra(
    arguments: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    done = kd("-q", *(str(tmp_path / "out") if word == "OUT" else word for word in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("MissingPackageError: ")
    assert f"pip install 'kd-logit-cache[{extra}]'" in done.stderr
    assert not (tmp_path / "out").exists()
