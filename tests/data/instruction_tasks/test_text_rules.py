"""Regular expressions of a stranger's task are checked before they are compiled, and stop when they take too long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.text_rules import MAX_PATTERN, SECONDS, check_pattern, without


@given(st.text("<>ab \n"))
def test_the_rule_of_a_task_of_the_package_does_what_re_does(text: str) -> None:
    import re

    assert without(r"<[^<>\s]*>", text, "here") == re.sub(r"<[^<>\s]*>", "", text)


@pytest.mark.parametrize(
    "pattern", ["(?:(?:x{1000}){1000}){1000}", "x{99999}", "x{5,99999999999999999999}", "a" * (MAX_PATTERN + 1)]
)
def test_an_expression_that_would_fill_the_memory_is_not_compiled(pattern: str) -> None:
    with pytest.raises(DataError, match="too large"):
        check_pattern(pattern, "here")


@pytest.mark.parametrize("pattern", ["[", "(?R)", "(" * 400, "a**", "(?P<a", "\\"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="not a regular expression"):
        check_pattern(pattern, "here")


@pytest.mark.parametrize(
    ("pattern", "text"), [("(a+)+$", "a" * 3000 + "!"), (r"\s+$", " " * 200_000 + "x"), ("(a|aa)+$", "a" * 3000 + "!")]
)
def test_a_catastrophic_expression_ends(pattern: str, text: str) -> None:
    check_pattern(pattern, "here")
    started = time.process_time()
    with pytest.raises(DataError, match="takes too long"):
        without(pattern, text, "here")
    assert time.process_time() - started < 20 * SECONDS
