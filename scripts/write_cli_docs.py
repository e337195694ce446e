"""Write docs/cli.md from the commands' own --help: `python scripts/write_cli_docs.py`. A test compares the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kd.cli import cli

HEAD = """# The `kd` command

Written from `--help` by `scripts/write_cli_docs.py`; a test keeps it so.

Results go to stdout (one JSON document with `--json`), progress and messages to stderr.

[Errors](errors.md) has the exit codes, and the document that a command prints with `--json` when it fails.

`-q` prints results and errors alone, `-v` keeps the notes of the libraries and prints where an error was raised, and
`--log-file FILE` adds every line to a file, with the time. They go with every command and may stand before or after it.

Completion of commands, options and the values of choices:

    eval "$(_KD_COMPLETE=bash_source kd)"             # in ~/.bashrc
    eval "$(_KD_COMPLETE=zsh_source kd)"              # in ~/.zshrc
    _KD_COMPLETE=fish_source kd | source              # in ~/.config/fish/config.fish

`--data SPEC` is one of

- `demo[:heldout]`, `mini[:heldout]`, `mini-open[:heldout]`, `mini-chat[:heldout]`, `wikitext-2[:validation|test]`;
- a local file or folder: `.txt .tokens .jsonl .csv .tsv .parquet`, with `--columns` where names differ;
- `hub-id[:config][@revision]`;
- instruction tasks: `flan:four`, `flan:ten`, `flan:TASK[,TASK…]`, `flan:all-but=CLUSTER`, or the path of a task's `.yaml` file
  (`docs/extending.md`);
- `glue/TASK`.

`--teacher` and `--student` take a hub id, a local folder, `demo` (the embedded models; `demo-t5` as a teacher), or
`random:NAME`. The last means random weights in the real shape of gpt2, gpt2-medium, gpt-neo-2.7B, pythia-410m,
SmolLM-360M or flan-t5-small, -base, -large, -xl, -xxl. gpt2-mini is GPT-2 at width 128, not a published model.
"""


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`(name, help text)` of every command below `command`."""
    # the names that `cli` gives its help: click remembers the first it is asked for
    context = click.Context(
        command, info_name=" ".join(path), max_content_width=110, terminal_width=110, help_option_names=["-h", "--help"]
    )
    yield " ".join(path), command.get_help(context)
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], (*path, name))


def render() -> str:
    """The whole document."""
    return HEAD + "".join(f"\n## `{name}`\n\n```\n{text}\n```\n" for name, text in commands(cli, ("kd",)))


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "cli.md").write_text(render(), encoding="utf-8")
