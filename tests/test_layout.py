"""The house: which packages and root files exist, and which way imports point."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "recipes", "cache_builder", "student_trainer", "evaluation", "commands")
FORMAT_HALF = {"targets", "arrays", "logprob_codecs", "codecs", "chunks", "files", "manifest", "claims", "commits", "rows",
               "store", "reader", "summary",
               "verify", "tables", "repair", "home", "registry", "derive", "mixture", "part", "remotes", "hub",
               "fetching", "transfer", "push", "pull", "mirror", "card"}  # fmt: skip
BUILD_HALF = {
    "selection",
    "normalisers",
    "sparsify",
    "host_copies",
    "lanes",
    "teacher",
    "generate",
    "plan",
    "build",
    "estimate",
    "reuse",
    "engines",
}
LAYERS = {"data": 0, "recipes": 0, "cache_builder": 1, "student_trainer": 2, "evaluation": 3,
          "commands": 4, "cli": 5}  # fmt: skip
DOORS = {
    "zarr": {"cache_builder/store.py"},
    "numcodecs": {"cache_builder/chunks.py"},
    "datasets": {"data/hub.py"},
    "bitsandbytes": {"data/models.py"},
    "click": {"cli.py", "commands/"},
    "rich": {"commands/console.py"},
    "ray": {"cache_builder/engines.py"},
    "peft": {"student_trainer/lora.py", "student_trainer/merging/methods.py"},
}
"""Heavy library -> the modules, or folders of modules, that may import it."""


def modules() -> list[Path]:
    return [ROOT / "cli.py", *(p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {f"kd.{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
               for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")}  # fmt: skip
    assert {"kd", *folders} == set(settings["tool"]["setuptools"]["packages"])


def test_all_code_but_the_tests_is_type_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    folders = {
        p.parent.relative_to(ROOT).parts[0]
        for p in ROOT.glob("*/**/*.py")
        if not p.relative_to(ROOT).parts[0].startswith(".")
    }
    assert {f".typing/kd/{x}" for x in ("cli.py", *PACKAGES)} | (folders - {*PACKAGES, "tests"}) == set(
        settings["files"]
    )


def test_every_data_file_of_the_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = {path for package, patterns in settings["package-data"].items() for pattern in patterns
               for path in (ROOT / package.removeprefix("kd.").replace(".", "/")).glob(pattern)}  # fmt: skip
    files = {p for package in PACKAGES for suffix in (".yaml", ".json", ".safetensors")
             for p in (ROOT / package).rglob(f"*{suffix}")}  # fmt: skip
    assert files == shipped


def test_no_module_lies_outside_a_package_folder() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_cli_is_the_only_module_in_the_root() -> None:
    assert [p.name for p in ROOT.glob("*.py")] == ["cli.py"]


def test_root_holds_only_known_entries() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    known = {"pyproject.toml", "README.md", "cli.py", "data", "cache_builder", "student_trainer", "evaluation", "commands", "tests",
             "recipes", "docs", "benchmarks", "scripts", "Makefile", "constraints.txt", ".ci", ".typing", ".gitignore",
             "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md"}  # fmt: skip
    assert top <= known, top - known


def test_imports_point_only_towards_data() -> None:
    for path in modules():
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "kd" and len(parts) > 1:
                assert LAYERS[parts[1]] <= LAYERS[layer], f"{path.name} imports {name}"
            assert parts[0] not in PACKAGES, f"{path.name} imports {name}: spell it kd.{name}"


def test_only_the_commands_and_the_build_half_import_the_build_half() -> None:
    for path in modules():
        parts = path.relative_to(ROOT).parts
        allowed = parts[0] == "commands" or (parts[0] == "cache_builder" and path.stem in BUILD_HALF)
        used = {name.split(".")[2] for name in imports(path) if name.startswith("kd.cache_builder.")}
        assert allowed or not used & BUILD_HALF, f"{path.name} imports {used & BUILD_HALF}"


def test_cache_builder_modules_are_in_one_of_its_halves() -> None:
    assert {p.stem for p in (ROOT / "cache_builder").glob("*.py")} - {"__init__"} == FORMAT_HALF | BUILD_HALF


def test_the_format_half_needs_neither_torch_nor_transformers_to_import() -> None:
    for path in modules():
        if path.parts[-2] == "cache_builder" and path.stem in FORMAT_HALF:
            assert not {n.partition(".")[0] for n in imports(path)} & {"torch", "transformers"}, path


def test_each_heavy_library_has_one_door() -> None:
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        for name in {n.partition(".")[0] for n in imports(path)}:
            open_to = DOORS.get(name, {place})
            assert place in open_to or f"{place.partition('/')[0]}/" in open_to, f"{place} imports {name}"


def test_no_pickle_anywhere() -> None:
    for path in modules():
        assert not re.search(r"\bpickle\b|torch\.load\(|trust_remote_code=True", path.read_text(encoding="utf-8")), path


def test_help_needs_no_torch_and_imports_in_under_half_a_second() -> None:
    script = "import sys, kd.cli; from click.testing import CliRunner; r = CliRunner().invoke(kd.cli.cli, ['--help']); " \
             "print(r.exit_code, sorted({'torch', 'transformers', 'zarr', 'datasets', 'numpy'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
    timed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import kd.cli"], capture_output=True, text=True, check=True
    )
    microseconds = int(timed.stderr.splitlines()[-1].split("|")[1])
    assert microseconds < 500_000  # the bound; about 40,000 here
