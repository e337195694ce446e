"""The settings of a class have the names, types and docstrings of its fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from setting_classes import Group, Inner, Outer

from kd.common.setting_fields import field_docs, settings_of


def test_a_name_may_be_used_once_in_all_groups() -> None:
    twice = dataclasses.make_dataclass("twice", [("group", Group), ("steps", int, 1)], frozen=True)
    with pytest.raises(AssertionError, match="two settings called steps"):
        settings_of(twice)


def test_every_field_s_docstring_is_its_help_in_one_line() -> None:
    known = settings_of(Outer)
    assert known["name"].doc == "Name of the thing, over two lines."
    assert all(one.doc for one in known.values())
    assert field_docs(Inner) == {
        "weights": "Weights of the parts.",
        "mode": "How fast it goes.",
        "points": "Points to visit.",
    }


def test_a_class_has_the_docstrings_of_those_it_inherits_from() -> None:
    @dataclass(frozen=True)
    class Derived(Inner):
        more: int = 0
        """More of it."""

    assert field_docs(Derived) == {**field_docs(Inner), "more": "More of it."}
