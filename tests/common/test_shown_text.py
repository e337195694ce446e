"""Names of strangers do nothing where they are shown, and nothing secret is shown."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.common.shown_text import (
    for_figure,
    for_markdown,
    for_spreadsheet,
    for_terminal,
    public_place,
    redacted,
    without_secrets,
)

STRANGE = st.text(st.characters() | st.sampled_from("\x1b\x07\x9b\u202e[]()<>|`*_=+-@$\\\n\r\t"))


@given(STRANGE)
def test_no_text_has_a_control_character_left(text: str):
    shown = for_terminal(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
    shown.encode()


@given(STRANGE)
def test_json_is_still_json_after_it(text: str):
    assert json.loads(for_terminal(json.dumps({"a": text}, ensure_ascii=False))) == {"a": text}


@given(st.text("abc xyz,.äß日本\n\t"))
def test_plain_text_is_shown_as_it_is(text: str):
    assert for_terminal(text) == without_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]0;owned\x07",
        "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
        "\x9b31m",
        "x\rHACKED",
        "\x1b[2J",
        "a\u202egnp.exe",
    ],
)
def test_escape_sequences_are_shown_not_obeyed(text: str):
    assert for_terminal(text) == "".join(c if 31 < ord(c) < 127 else f"\\u{ord(c):04x}" for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"),
        ("![x](http://evil/track.png)", r"!\[x\](http://evil/track.png)"),
        ("a | b", r"a \| b"),
        ("`code`", r"\`code\`"),
        ("**bold** ~~gone~~", r"\*\*bold\*\* \~\~gone\~\~"),
        ("_slanted_ but grad_norm", r"\_slanted\_ but grad_norm"),
        ("a\n\n# heading\n---", "a # heading ---"),
        ("&lt;", "&amp;lt;"),
        ("a\\", "a\\\\"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_nothing_is_markup_in_markdown(text: object, shown: str):
    assert for_markdown(text) == shown


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A1", "+1+1", "-2+3", "@SUM(A1)", " =1", "\t=1", "'=1", '"=1', "＝1", "\n=1"]
)
def test_no_cell_is_a_formula(text: str):
    line = io.StringIO()
    csv.writer(line).writerow([for_spreadsheet(text)])
    assert next(csv.reader([line.getvalue()]))[0].startswith("'")


@pytest.mark.parametrize("value", [1.5, -2, None, True, "-0.5", "+3", "1e-3", "student", "a=b", "gpt2-medium"])
def test_numbers_and_names_are_cells_as_they_are(value: object):
    assert for_spreadsheet(value) == value


def test_a_label_is_neither_a_formula_nor_left_out():
    assert for_figure("$\\frac{x}{") == "\\$\\frac{x}{"
    assert for_figure("_name") == " _name"
    assert for_figure("a\x1bb") == "a\\u001bb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa%40ss@host/cache", "https://***@host/cache"),
        ("https://user:p@ss@host/cache", "https://***@host/cache"),
        ("https://host/c?X-Amz-Signature=abc&v=1#frag", "https://host/c?X-Amz-Signature=***&v=***#***"),
        ("https://host/c?token", "https://host/c?***"),
        (
            "Max retries exceeded with url: /c?sig=abc (Caused by …)",
            "Max retries exceeded with url: /c?sig=*** (Caused by …)",
        ),
        ("'https://host/c?sig=abc'", "'https://host/c?sig=***'"),
        ("Bearer hf_abcdefghijklmnop", "Bearer hf_***"),
        ("hf://datasets/us/cache@main", "hf://datasets/us/cache@main"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("what now? a=b", "what now? a=b"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_what_gives_access_is_hidden(text: str, shown: str):
    assert without_secrets(text) == shown
    assert redacted({"a": [text, 1, None], "b": {"c": text}}) == {"a": [shown, 1, None], "b": {"c": shown}}


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/home/ann/models/small", "small"),
        ("/home/ann/models/small/", "small"),
        ("~/models/small", "small"),
        ("../other/small", "small"),
        ("file:///home/ann/a.jsonl", "a.jsonl"),
        ("runs/teacher", "runs/teacher"),
        ("owner/name@main", "owner/name@main"),
        ("flan:boolq,paws", "flan:boolq,paws"),
        ("/a/b.txt,/c/d.txt, /e/f.txt", "b.txt,d.txt, f.txt"),
        ("https://u:p@host/data.csv", "https://***@host/data.csv"),
        ("/", "***"),
    ],
)
def test_of_an_absolute_path_others_see_the_last_name(place: str, shown: str):
    assert public_place(place) == shown


def test_an_error_shows_neither_secrets_nor_escapes_and_no_value_poses_as_a_line():
    error = DataError("cannot \x1b[31mread", where="https://u:p@h/x", found="one\n  try  rm -rf /", try_="again")
    assert error.details["where"] == "https://u:p@h/x"  # for programs, as it is
    assert str(error).splitlines() == [
        "cannot \\u001b[31mread",
        "  where  https://***@h/x",
        "  found  one",
        "           try  rm -rf /",
        "  try    again",
    ]
