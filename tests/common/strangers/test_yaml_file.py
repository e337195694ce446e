"""The one reader of YAML: what JSON can say is read as PyYAML reads it, and what a stranger may try is refused with its line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hostile import NOT_PLAIN
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.common.strangers.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_mapping, read_mapping

ROOT = Path(__file__).parents[3]
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.integers(-9999, 9999).map(lambda n: n / 8)
    | st.text("abc: -{}#'0", max_size=9)
)
TREES = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text("ab", max_size=2), one, max_size=4)
)


def refused(text: str) -> str:
    """What the error says was found."""
    with pytest.raises(DataError) as caught:
        parse_mapping(text, "recipe", "r.yaml")
    assert caught.value.details["where"] == "r.yaml"
    return str(caught.value.details["found"])


@given(st.dictionaries(st.text("xyz", min_size=1), TREES))
def test_what_was_written_is_read(document: dict[str, object]) -> None:
    assert parse_mapping(yaml.safe_dump(document), "recipe", "r.yaml") == document
    assert parse_mapping(json.dumps(document), "recipe", "r.yaml") == document


def test_every_file_of_the_package_is_read_as_pyyaml_reads_it() -> None:
    packages = [p.parent for p in ROOT.glob("*/__init__.py")]  # not what is installed in a folder beside them
    files = [file for package in packages for file in package.rglob("*.yaml")]
    assert len(files) > 20
    for file in files:
        assert read_mapping(file, "file") == yaml.safe_load(file.read_text(encoding="utf-8")), file


def test_dates_and_numbers_in_base_60_are_texts() -> None:
    text = "{day: 2026-11-30, sweep: 0:1:0.1, time: 12:30, sum: =, one: 1_000, two: 0x10, three: 1.5}"
    expected = {
        "day": "2026-11-30",
        "sweep": "0:1:0.1",
        "time": "12:30",
        "sum": "=",
        "one": 1000,
        "two": 16,
        "three": 1.5,
    }
    assert parse_mapping(text, "recipe", "r.yaml") == expected


def test_anchors_and_merged_mappings_are_read() -> None:
    text = "base: &b {lr: 1, seed: 2}\nmore: {<<: *b, seed: 3}\n"
    assert parse_mapping(text, "recipe", "r.yaml") == {"base": {"lr": 1, "seed": 2}, "more": {"lr": 1, "seed": 3}}


def repeated(old: str) -> str:
    return ", ".join([f"*{old}"] * 9)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{repeated(old)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{repeated(old)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 5: more than 50,000 values"),
        (MERGES, "more than 50,000 values"),
        ("a: &a [*a]", "line 1: an alias stands inside"),
        ("a: &a\n  b:\n    c: *a\n", "line 3: an alias stands inside"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: " + "[" * 40 + "]" * 40, f"more than {MAX_DEPTH} levels"),
        ("a: " + "[" * 100_000, f"more than {MAX_DEPTH} levels"),
        ("a: " + "{b: " * 100_000, f"more than {MAX_DEPTH} levels"),
        ("- " * 50_000 + "x", f"more than {MAX_DEPTH} levels"),
        ("? " * 50_000 + "x", f"more than {MAX_DEPTH} levels"),
        ("a: [" + "x," * (MAX_NODES + 1) + "]", "more than 50,000 values"),
        ("steps: 2\nout: x\nsteps: 3", "line 3: 'steps' is given twice"),
        ("a:\n  - b: 1\n    b: 2", "line 3: 'b' is given twice"),
        ("1: a\n'1': b", "line 2: '1' is given twice"),
        ("? [a]\n: b", "line 1: a name is not a text"),
        ("a: !!python/object/apply:os.system [x]", "line 1: values of the kind"),
        ("a: !!binary AAAA", "of the kind"),
        ("a: !!set {x, y}", "of the kind"),
        ("a: !!timestamp 2020-01-01", "of the kind"),
        ("a: !mine x", "of the kind"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: 0x_", "'0x_' is no int"),
        ("a: " + "9" * 5000, "is no int"),
        ("a: 18446744073709551616", "more than 64 bits"),
        ('a: "\\ud800"', "half a character"),
        ('a: "x\\0y"', "the character 0"),
        ("a: x\nb: \x1b[31m", "line 2: special characters are not allowed"),
        ("a: [1", "line 1: "),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("- a", "list"),
        ("", "an empty file"),
        ("%YAML 9.9\n--- {a: 1}", "line 1: found incompatible YAML document"),
    ],
)
def test_what_a_stranger_may_try_is_refused_with_its_line(text: str, words: str) -> None:
    started = time.process_time()
    assert words in refused(text)
    assert time.process_time() - started < 20  # the largest takes three seconds


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
def test_what_is_no_plain_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1")
    make(tmp_path / "r.yaml")
    if "elsewhere" in make.__name__:  # a link of the user's own
        assert read_mapping(tmp_path / "r.yaml", "recipe") == {"a": 1}
        return
    with pytest.raises(DataError, match="cannot read the recipe"):
        read_mapping(tmp_path / "r.yaml", "recipe")


def test_a_large_file_and_one_of_other_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("a: " + "x" * MAX_BYTES)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    for name in ("large.yaml", "bytes.yaml"):
        with pytest.raises(DataError, match="cannot read the pool"):
            read_mapping(tmp_path / name, "pool")
    assert read_mapping(tmp_path / "marked.yaml", "pool") == {"a": 1}
