"""How much kd says, and where: on every command, before and after its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from terminal import run_main

from kd.cli import cli


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    if isinstance(command, click.Group):
        return {
            name: leaf
            for key in command.commands
            for name, leaf in commands(command.commands[key], (*path, key)).items()
        }
    return {" ".join(path): command}


def test_every_command_takes_them_and_only_the_help_of_kd_shows_them() -> None:
    names = {"-q", "--quiet", "-v", "--verbose", "--log-file"}
    shown = cli.get_help(click.Context(cli))
    assert all(name in shown for name in names)
    for path, command in commands().items():
        taken = {option for parameter in command.params for option in parameter.opts}
        assert names <= taken, path
        assert "--log-file" not in command.get_help(click.Context(command)), path


@pytest.mark.parametrize("after", [False, True])
def test_a_log_file_gets_every_line_with_the_time(tmp_path: Path, after: bool) -> None:
    log = tmp_path / "logs" / "kd.log"
    words = ["cache", "info", "nowhere"]
    run_main(*words, "--log-file", log, code=1) if after else run_main("--log-file", log, *words, code=1)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* CacheError: this is not a cache\n", log.read_text())
    run_main(*words, "--log-file", log, code=1)
    assert log.read_text().count("CacheError") == 2  # a second command adds


def test_a_log_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run_main("data", "ls", "--log-file", tmp_path / "file" / "log", code=2).stderr


def test_a_quiet_command_says_nothing_but_results_and_errors(tmp_path: Path) -> None:
    from kd.commands.terminal import console

    (tmp_path / "a.txt").write_text("One document.\n", encoding="utf-8")
    script = "from kd.commands.terminal.console import OUTPUT, say, progress_bar\nOUTPUT.quiet = True\n"
    script += (
        "say('note', err=True); say('why', error=True); say('result')\nwith progress_bar('x') as go: go(1, 1, '')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("result\n", "why\n")
    assert not console.OUTPUT.quiet


def test_with_json_an_error_is_the_one_document_on_stdout() -> None:
    found = json.loads(run_main("cache", "info", "nowhere", "--json", code=1).stdout)["error"]
    assert (found["kind"], found["headline"], found["exit_code"]) == ("CacheError", "this is not a cache", 1)
    assert found["details"]["where"].endswith("nowhere")
    assert found["page"].endswith("docs/building.md")
    assert json.loads(run_main("data", "ls", "--nope", "--json", code=2).stdout)["error"]["exit_code"] == 2
    assert run_main("cache", "info", "nowhere", code=1).stdout == ""


def test_every_error_names_a_page_that_is_there() -> None:
    from kd.common.errors import KdError

    for module in ("disk.disk_errors", "extras"):  # their errors are below KdError too
        import_module(f"kd.common.{module}")

    def below(error: type[KdError]) -> set[type[KdError]]:
        return {error}.union(*map(below, error.__subclasses__()))

    root = Path(__file__).parents[3]
    assert [error for error in below(KdError) if not (root / error.page.partition("#")[0]).is_file()] == []
    stderr = run_main("cache", "info", "nowhere", code=1).stderr
    assert re.search(r"^  see +https://\S+/docs/building\.md$", stderr, flags=re.MULTILINE)


def test_verbose_says_where_an_error_was_raised() -> None:
    assert "Traceback" not in run_main("cache", "info", "nowhere", code=1).stderr
    assert "load_manifest" in run_main("cache", "info", "nowhere", "-v", code=1).stderr


@pytest.mark.parametrize(("line", "expected"), [("kd tra", "train"), ("kd train --loss rev", "reverse-kl")])
def test_a_shell_completes_commands_and_values(line: str, expected: str) -> None:
    words = line.split(" ")
    shell = {"_KD_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    script = "import sys; sys.argv[0] = 'kd'; from kd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | shell, check=False
    )
    assert f"plain,{expected}" in done.stdout.split()


@pytest.fixture
def shell_words(tmp_path: Path) -> dict[str, str]:
    """An environment in which a shell finds this interpreter's `kd`."""
    program = tmp_path / "kd"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'kd'\nfrom kd.cli import main\nmain()\n")
    program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed (Debian: apt-get install fish)")
def test_fish_completes_commands_options_and_values(shell_words: dict[str, str]) -> None:
    asked = "; ".join(f"complete -C '{line}'" for line in ("kd tra", "kd train --lora-a", "kd train --loss text"))
    script = f"_KD_COMPLETE=fish_source kd | source; {asked}"
    done = subprocess.run(["fish", "-c", script], capture_output=True, text=True, env=shell_words, check=True)
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == ["train", "--lora-alpha", "text-kl"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed (Debian: apt-get install zsh)")
def test_zsh_completes_a_value_where_one_types(shell_words: dict[str, str]) -> None:
    """In an interactive zsh: the completion is defined, and the Tab key writes the rest of the word."""
    script = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'autoload -Uz compinit; compinit -u -D; eval "$(_KD_COMPLETE=zsh_source kd)"; print REA""DY'
zpty -r shell seen '*READY*'
zpty -w -n shell $'kd train --loss text\t'
zpty -r shell seen '*text-kl*' && print -r -- completed
zpty -d shell
"""
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, env=shell_words, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["completed"], done.stdout + done.stderr


def test_long_help_is_grouped_by_what_options_belong_to() -> None:
    text = commands()["train"].get_help(click.Context(commands()["train"]))
    headings = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert "What the student minimises" in headings
    assert headings[-1] == "Other options"
    assert text.index("What the student minimises:") < text.index("--temperature") < text.index("--lr ")
