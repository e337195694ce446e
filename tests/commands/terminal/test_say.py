"""What commands print goes through one function, which shows escape sequences of strangers and hides secrets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hostile import change_manifest

from kd.cli import cli
from kd.commands.terminal.console import emit, emit_json, say

COMMANDS = Path(__file__).parents[3] / "commands"


def test_no_command_prints_past_it():
    for module in [*COMMANDS.rglob("*.py"), COMMANDS.parent / "cli.py"]:
        text = module.read_text(encoding="utf-8")
        printed = text.count("click.echo(") + text.count("click.secho(") + text.count("\n    print(")
        assert printed == (module.name == "console.py"), module


def test_lines_and_documents_are_shown_without_escapes_and_secrets(capsys: pytest.CaptureFixture[str]):
    say("a\x1b]0;owned\x07 https://u:p@h/c", err=True)
    emit({"na\x1bme": "\x9b31m", "cache": "https://h/c?sig=abc"}, False, "ti\x1btle")
    emit_json({"name": "\x1b[2J\x9b\x7f"})
    out, err = capsys.readouterr()
    assert err == "a\\u001b]0;owned\\u0007 https://***@h/c\n"
    assert out.splitlines()[:3] == ["ti\\u001btle", "  na\\u001bme  \\u009b31m", "  cache  https://h/c?sig=***"]
    assert json.loads(out.partition("{")[1] + out.partition("{")[2]) == {"name": "\x1b[2J\x9b\x7f"}
    assert not set(out + err) & set("\x1b\x07\x9b\x7f")


@pytest.mark.parametrize(
    "words", [["cache", "info"], ["cache", "info", "--json"], ["cache", "ls"], ["cache", "verify"]]
)
def test_a_strangers_cache_cannot_move_the_cursor(words: list[str], demo_cache: Path, tmp_path: Path):
    shutil.copytree(demo_cache, tmp_path / "c")
    change_manifest(
        tmp_path / "c", lambda d: d["provenance"].update(teacher="\x1b]0;owned\x07<script>", corpus="\x9b2J")
    )
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "c")], catch_exceptions=False)
    assert done.exit_code == 0
    assert not set(done.output) & set("\x1b\x07\x9b")


def test_an_error_of_the_command_line_is_shown_so_too(tmp_path: Path):
    command = [sys.executable, "-m", "kd.cli", "cache", "info", "x\x1b]0;owned\x07", "--no\x1bsuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "\x1b" not in done.stderr
    done = subprocess.run([*command[:-1]], capture_output=True, text=True, check=False)
    assert (done.returncode, "\x1b" in done.stderr, "\\u001b]0;owned" in done.stderr) == (1, False, True)
