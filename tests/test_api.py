"""The front door: what `import kd` gives is lazy, typed, documented, and its examples run."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_docs import script as load_script

import kd
from kd.cache_builder.upkeep.cache_registry import remember

ROOT = Path(__file__).parents[1]
NAMES = sorted(name for name in kd.__all__ if name != "__version__")
CLASSES = [name for name in NAMES if inspect.isclass(getattr(kd, name))]


def test_importing_kd_imports_nothing_heavy() -> None:
    script = (
        "import sys, kd; dir(kd); print(sorted({m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    )
    before = "import sys; print(sorted({m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    added = [ast.literal_eval(_output(code)) for code in (before, script)]
    assert set(added[1]) - set(added[0]) == {"kd"}


def _output(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_version_is_that_of_the_distribution() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert kd.__version__ == settings["project"]["version"]


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(kd) == sorted(kd.__all__)
    assert len(set(kd.__all__)) == len(kd.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kd' has no attribute 'open_cash'"):
        kd.open_cash  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_that_needs_an_extra_says_which() -> None:
    code = """
import sys
sys.modules["torch"] = None
import kd
kd.KdError, kd.open_cache  # need none
try:
    kd.train
except kd.MissingPackageError as error:
    print(error)
"""
    assert _output(code).splitlines()[0] == "kd.train needs torch"
    assert "kd-logit-cache[train]" in _output(code)


def test_what_a_type_checker_imports_is_what_is_imported_at_run_time() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    at_run_time = {(module, name) for module, names in kd._HOMES.items() for name in names}
    assert imported == at_run_time
    assert {name for _, name in imported} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_comes_from_the_module_that_defines_it(name: str) -> None:
    value = getattr(kd, name)
    assert value.__module__ in kd._HOMES
    assert name in kd._HOMES[value.__module__]
    assert value.__name__ == name


def test_every_error_of_kd_is_public() -> None:
    def below(error: type[Exception]) -> Iterator[type[Exception]]:
        yield error
        for one in error.__subclasses__():
            yield from below(one)

    homes = ("kd.common.errors", "kd.common.extras")
    assert {e.__name__ for e in below(kd.KdError) if e.__module__ in homes} <= set(kd.__all__)


def functions(name: str) -> list[Any]:
    """The public functions that a public name brings: itself, or a class's methods and properties of its own."""
    value = getattr(kd, name)
    if not inspect.isclass(value):
        return [value]
    own = [member for key, member in vars(value).items() if not key.startswith("_")]
    return [
        member.fget if isinstance(member, property) else inspect.unwrap(member)
        for member in own
        if isinstance(member, property) or inspect.isfunction(member)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_function_is_annotated_and_documented(name: str) -> None:
    assert (getattr(kd, name).__doc__ or "").strip()
    for function in functions(name):
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(function, localns=vars(sys.modules[function.__module__]))
        assert {p for p in parameters if p != "self"} <= hints.keys(), function
        assert "return" in hints, function
        assert (function.__doc__ or "").strip(), function


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_cache: Path) -> Path:
    """The working directory of an example: `cache` is a cache of the embedded teacher."""
    shutil.copytree(demo_cache, tmp_path / "cache")
    remember(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_every_public_name_runs(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = getattr(kd, name)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(value, name, module=False, globs={})
    assert test.examples, f"kd.{name} has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with capsys.disabled():
        results = runner.run(test, out=report.append)
    assert not results.failed, "".join(report)


def test_the_page_of_the_api_is_made_from_the_docstrings() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == load_script("write_api_docs").render(), "run scripts/write_api_docs.py"


def test_the_first_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_a_type_checker_sees_every_public_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mypy = pytest.importorskip("mypy.api")
    lines = [f"reveal_type(kd.{name})" for name in kd.__all__]
    (tmp_path / "uses.py").write_text("import kd\n" + "\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(ROOT)  # the options and the cache of `make typecheck`: half a second after it, else twenty
    out, _, _ = mypy.run([str(tmp_path / "uses.py")])
    revealed = [line for line in out.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(kd.__all__), out
    assert not [line for line in revealed if '"Any"' in line], out
