"""Warnings of the package are plain lines; those of other files stay as Python shows them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from kd.commands.terminal import own_warnings
from kd.commands.terminal.own_warnings import say_own_warnings


def test_a_warning_of_the_package_is_one_plain_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
    own = str(Path(own_warnings.__file__).parents[2] / "models" / "loading.py")
    warnings.simplefilter("always")
    say_own_warnings()
    warnings.warn_explicit("two names", UserWarning, own, 7)
    assert capsys.readouterr() == ("", "warning: two names\n")
    warnings.warn_explicit("of a library", UserWarning, "/somewhere/library.py", 7)
    warnings.warn_explicit("old", DeprecationWarning, own, 7)
    assert others == ["of a library", "old"]
