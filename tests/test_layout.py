"""The house: which packages and root files exist, and which way imports point."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from kd.common.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
ROOT_MODULES = ("cli", "__init__")
"""What users meet: the command, and `import kd`."""
ORDER = (
    *("common", "models", "data", "cache_builder", "student_trainer", "evaluation", "recipes", "commands"),
    *ROOT_MODULES,
)
"""Each may import itself and those before it."""
CACHE_ROOMS = {
    "store": set(),
    "upkeep": {"store"},
    "look": {"store"},
    "share": {"store", "upkeep"},
    "teacher": {"store"},
    "served": {"store"},
    "tokens": {"store"},
    "build": {"store", "upkeep", "teacher", "served", "tokens", "opening"},
    "exchange": {"store", "upkeep", "served", "build", "opening"},
}
"""Room of cache_builder -> the rooms it may import."""
DOORS = {
    "zarr": {"cache_builder/store/writers/staged_files.py"},
    "numcodecs": {"cache_builder/store/chunks.py"},
    "datasets": {"data/rows/hub.py"},
    "bitsandbytes": {"models/weights/quantised.py"},
    "click": {"cli.py", "commands/"},
    "rich": {"commands/terminal/console.py"},
    "ray": {"cache_builder/build/together/ray_cluster.py", "cache_builder/build/together/ray_engine.py"},
    "vllm": {"cache_builder/served/in_process.py"},
    "peft": {"models/weights/adapters.py", "student_trainer/lora.py", "student_trainer/merging/merge_methods.py"},
}
"""Heavy library -> the modules, or folders of modules, that may import it."""


@cache
def modules() -> list[Path]:
    in_root = [ROOT / f"{name}.py" for name in ROOT_MODULES]
    return [*in_root, *(p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")))]


@cache
def imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere: at the top, in functions, for type checking."""
    known = {module_name(path): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        used = {n.removeprefix("kd.") for n in imports(path) if n.startswith("kd.")}
        graph[name] = {n for n in used if n in known and n != name}
    return graph


def room_graph(folder: str) -> dict[str, set[str]]:
    """The modules and folders directly in `folder`, and which of them import which."""
    prefix = "" if folder == "" else folder.replace("/", ".") + "."
    graph: dict[str, set[str]] = {}
    for name, used in module_graph().items():
        if name.startswith(prefix):
            room = name.removeprefix(prefix).partition(".")[0]
            others = {n.removeprefix(prefix).partition(".")[0] for n in used if n.startswith(prefix)}
            graph.setdefault(room, set()).update(others - {room})
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle of imports for every node that can reach itself, shortest first."""
    found = []
    for start in graph:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop(0)
            for following in graph.get(path[-1], ()):
                if following == start:
                    found.append([*path, start])
                    paths = []
                    break
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
    return sorted(found, key=len)


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        f"kd.{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for package in PACKAGES
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert {"kd", *folders} == set(settings["tool"]["setuptools"]["packages"])


def test_all_code_is_type_checked() -> None:
    """The tests in a run of their own, with fewer demands on annotations."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    folders = {
        p.parent.relative_to(ROOT).parts[0]
        for p in ROOT.glob("*/**/*.py")
        if not p.relative_to(ROOT).parts[0].startswith(".")
    } - {"build", "dist"}  # what `pip install .` leaves in a checkout
    assert {f".typing/kd/{x}" for x in ("__init__.py", "cli.py", *PACKAGES)} | (folders - {*PACKAGES, "tests"}) == set(
        settings["files"]
    )
    assert re.search(
        r"^\t\$\(BIN\)/mypy \S* ?\S* ?\$\(LOOSER\) tests$",
        (ROOT / "Makefile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )


def test_every_data_file_of_the_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("kd").removeprefix(".").replace(".", "/")).glob(pattern)
    }
    files = {
        p
        for package in PACKAGES
        for suffix in (".yaml", ".json", ".safetensors", ".j2", ".jinja", ".html", ".js", ".sh", ".sbatch")
        for p in (ROOT / package).rglob(f"*{suffix}")
    }
    assert files | {ROOT / "py.typed"} == shipped


def test_no_module_lies_outside_a_package_folder() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize(
    "folder", sorted({p.parent for p in modules()} - {ROOT}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_folder_shows_more_than_a_dozen_modules(folder: Path) -> None:
    """A folder is read at a glance. `__init__.py` is not counted, and one module more is let pass."""
    assert len([*folder.glob("[!_]*.py")]) <= 13


def test_the_root_holds_no_module_but_the_command_and_the_front_door() -> None:
    assert {p.stem for p in ROOT.glob("*.py")} == {*ROOT_MODULES}


def test_every_package_has_its_place_in_the_order_of_imports() -> None:
    assert {*PACKAGES, *ROOT_MODULES} == set(ORDER)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    assert circles(module_graph()) == []


@pytest.mark.parametrize("folder", ["", *sorted({p.parent.relative_to(ROOT).as_posix() for p in modules()} - {"."})])
def test_no_two_rooms_of_a_folder_import_each_other_in_a_circle(folder: str) -> None:
    assert circles(room_graph(folder)) == []


def test_imports_point_only_downwards() -> None:
    for path in modules():
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            assert name != "kd", f"{path.name} imports the front door: import the module that defines the name"
            if parts[0] == "kd":
                assert ORDER.index(parts[1]) <= ORDER.index(layer), f"{path.name} imports {name}"
            assert parts[0] not in PACKAGES, f"{path.name} imports {name}: spell it kd.{name}"


@pytest.mark.parametrize(("room", "may_import"), [*CACHE_ROOMS.items()])
def test_rooms_of_the_cache_builder_import_only_the_rooms_below_them(room: str, may_import: set[str]) -> None:
    for path in (ROOT / "cache_builder" / room).rglob("*.py"):
        used = {name.split(".")[2] for name in imports(path) if name.startswith("kd.cache_builder.")}
        assert used <= may_import | {room}, f"{path.name} imports {used - may_import - {room}}"


def test_a_training_machine_imports_nothing_that_builds() -> None:
    """Neither at the top of a module nor in a function, and neither itself nor through what it imports."""
    graph = module_graph()
    todo = [name for name in graph if name.startswith(("student_trainer.", "evaluation."))]
    reached = set(todo)
    while todo:
        new = graph[todo.pop()] - reached
        reached |= new
        todo += new
    assert "cache_builder.opening" in reached
    assert not [name for name in reached if name.startswith(("cache_builder.build", "cache_builder.teacher"))]


def test_reading_and_sharing_a_cache_imports_neither_torch_nor_transformers() -> None:
    for path in modules():
        rooms = {"common", "store", "share", "upkeep", "look"}
        if rooms & set(path.relative_to(ROOT).parts) or path.name in ("opening.py", "showing.py"):
            assert not {n.partition(".")[0] for n in imports(path)} & {"torch", "transformers"}, path


def test_no_two_modules_share_a_name() -> None:
    names = [p.stem for p in modules() if p.stem != "__init__"]
    assert [n for n in set(names) if names.count(n) > 1] == []


def test_no_two_folders_share_a_name() -> None:
    names = [p.name for package in PACKAGES for p in (ROOT / package).rglob("*") if (p / "__init__.py").exists()]
    assert len(names) == len(set(names))


def test_each_heavy_library_has_one_door() -> None:
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        for name in {n.partition(".")[0] for n in imports(path)}:
            open_to = DOORS.get(name, {place})
            assert place in open_to or f"{place.partition('/')[0]}/" in open_to, f"{place} imports {name}"


def test_no_pickle_anywhere() -> None:
    for path in modules():
        assert not re.search(r"\bpickle\b|torch\.load\(|trust_remote_code=True", path.read_text(encoding="utf-8")), path


def test_help_imports_nothing_heavy() -> None:
    heavy = sorted({package for packages in EXTRAS.values() for package in packages} | {"numpy", "pyarrow", "zarr"})
    script = (
        "import sys, kd.cli; from click.testing import CliRunner; r = CliRunner().invoke(kd.cli.cli, ['--help']); "
        f"print(r.exit_code, sorted({{*{heavy!r}}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
