"""A command says that it is at work before it has anything to print."""

from __future__ import annotations

import builtins
import sys
import time

import pytest

from kd.commands.terminal import console, first_sign
from kd.commands.terminal.console import quiet_libraries, say


def waited_with_sign(*lines: str) -> None:
    """A command that waits for a second line, after it has printed `lines`."""
    with first_sign.first_sign():
        for line in lines:
            say(line)
        for _ in range(200):  # until the sign is there, or long after it should be
            if console.OUTPUT.has_printed:
                break
            time.sleep(0.01)
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_sign, "SECONDS", 0.01)
    monkeypatch.setattr(console, "OUTPUT", console.TerminalOutput())
    monkeypatch.setattr(sys, "argv", ["kd", "cache", "info"])


def test_a_slow_command_says_that_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    waited_with_sign()
    assert capsys.readouterr() == ("", "starting …\n")


def test_a_command_that_has_printed_needs_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    waited_with_sign("a result")
    assert capsys.readouterr() == ("a result\n", "")


@pytest.mark.parametrize(("words", "rank"), [(["-q"], "0"), (["--quiet"], "0"), ([], "1")])
def test_quiet_commands_and_further_processes_of_a_run_give_no_sign(
    words: list[str], rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd", "cache", "info", *words])
    monkeypatch.setenv("RANK", rank)
    with first_sign.first_sign():
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_torch_is_announced_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said_before: list[str] = []
    plain = builtins.__import__

    def importing(name: str, *rest, **options):
        if name == "transformers" and not said_before:
            said_before.append(capsys.readouterr().err)
        return plain(name, *rest, **options)

    modules = {name: module for name, module in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(sys, "modules", modules)
    monkeypatch.setattr(builtins, "__import__", importing)
    quiet_libraries()
    assert said_before == ["loading torch and transformers …\n"]
