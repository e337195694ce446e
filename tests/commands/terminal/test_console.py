"""Progress of known and of unknown length, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest
import rich.console

from kd.commands.terminal import console
from kd.commands.terminal.console import progress_bar


def test_elsewhere_a_line_comes_every_ten_per_cent_and_now_and_then_where_nobody_knows_the_total(capsys, monkeypatch):
    monkeypatch.setattr(console.OUTPUT, "quiet", False)
    with progress_bar("tokenising") as advance:
        advance(5, 0, "5 examples")
        monkeypatch.setattr(console, "UNKNOWN_SECONDS", 0.0)
        advance(6, 0, "6 examples")
        for done in range(21):
            advance(done, 20, "more")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["tokenising  6 examples", *(f"tokenising {share}%  more" for share in range(0, 101, 10))]


@pytest.mark.parametrize(("total", "share"), [(0, ""), (40, "15%")])
def test_a_bar_has_a_share_only_where_the_total_is_known(monkeypatch, total: int, share: str):
    monkeypatch.setattr(console.OUTPUT, "quiet", False)
    drawn = io.StringIO()
    terminal = rich.console.Console(file=drawn, force_terminal=True, width=100)
    monkeypatch.setattr(rich.console, "Console", lambda stderr: terminal)
    with progress_bar("tokenising") as advance:
        advance(6, total, "6 examples")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.getvalue())
    assert "6 examples" in shown
    assert re.findall(r"\d+%", shown)[-1:] == ([share] if share else [])
