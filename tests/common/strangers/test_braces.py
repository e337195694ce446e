"""Names in braces are replaced, and nothing else of `str.format` is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.common.strangers.braces import MAX_FIELDS, fill, template_fields


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_values_are_put_in_as_they_are_braces_included(values: dict[str, str]) -> None:
    assert fill("{a}|{{b}}|{c}{a}", values) == f"{values['a']}|{{b}}|{values['c']}{values['a']}"


def test_names_are_listed_in_order() -> None:
    assert template_fields("{b}{{x}}{a-b}{b}", "here") == ("b", "a-b", "b")


@pytest.mark.parametrize(
    "text",
    [
        "{v.__class__}",
        "{v[0]}",
        "{v:>9999999999}",
        "{v!r}",
        "{}",
        "{0}",
        "{v:{w}}",
        "{v.__init__.__globals__[os]}",
        "{ v}",
    ],
)
def test_format_specifications_and_attributes_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="plain field names") as caught:
        template_fields(text, "here")
    assert caught.value.details["where"] == "here"


@pytest.mark.parametrize("text", ["{", "}", "{v", "v}", "{v}}"])
def test_stray_braces_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="stray brace"):
        template_fields(text, "here")


def test_a_text_repeats_a_long_value_a_bounded_number_of_times() -> None:
    template_fields("{v}" * MAX_FIELDS, "here")
    with pytest.raises(DataError, match="too many fields"):
        template_fields("{v}" * (MAX_FIELDS + 1), "here")
