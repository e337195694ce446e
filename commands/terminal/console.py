"""Print results to stdout, and progress and messages to stderr.

A result is one JSON document with --json. Otherwise it is aligned lines under a title, with thousands separators, four
significant digits, yes and no, and "-" for unknown values. On a terminal, progress is a bar; elsewhere it is a plain line
about every ten per cent, or every 20 seconds, without control characters. rich is imported when a bar is drawn.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

import click

from kd.common.progress import AnyStep, Progress, Result, final
from kd.common.shown_text import for_terminal, without_secrets
from kd.data.left_out import said


@dataclass
class TerminalOutput:
    """How much this process prints, and what it has printed; see `output_options`."""

    quiet: bool = False
    """Print no progress and no notes."""
    verbose: bool = False
    """Keep the notes of the libraries, and say where an error was raised."""
    log: TextIO | None = None
    """File that gets every line as well."""
    has_printed: bool = False
    """Whether a line was printed, or a progress bar is drawn."""
    document_printed: bool = False
    """Whether a JSON document is on stdout already: there is one for each command."""

    def note(self, line: str) -> None:
        """Add a line to the log, with the time."""
        if self.log is not None:
            self.log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")


OUTPUT = TerminalOutput()

UNKNOWN_SECONDS = 20.0
"""Seconds between two lines of work of which nobody knows how much there is."""


def say(text: object = "", *, err: bool = False, error: bool = False) -> None:
    """Print lines, without secrets and without control characters: names in them come from strangers.

    Every line that a command prints goes through here; it is the same in a pipe.

    err     to stderr: a note, which a quiet command leaves out
    error   to stderr, and always: why the command failed
    """
    shown = for_terminal(without_secrets(str(text)))
    OUTPUT.note(shown)
    if error or not (err and OUTPUT.quiet):
        OUTPUT.has_printed = True
        click.echo(shown, err=err or error)


SHADES = (
    "",
    "black on color(230)",
    "black on color(229)",
    "black on color(222)",
    "black on color(215)",
    "black on color(208)",
    "bold white on color(130)",
)
"""Style of each shade: ever darker orange, with letters that can be read on a light and on a dark terminal."""


def shades_are_seen() -> bool:
    """Whether stdout is a terminal with colours."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and console.color_system is not None


def say_shaded(pieces: Iterable[tuple[str, int]]) -> None:
    """Print pieces of text, each on the ground of its shade where stdout is a terminal; elsewhere as plain text."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    shown = [(for_terminal(text), shade) for text, shade in pieces]
    if not console.is_terminal:
        say("".join(text for text, _ in shown).rstrip("\n"))
        return
    OUTPUT.has_printed = True
    whole = Text()
    for text, shade in shown:
        whole.append(text, style=SHADES[shade])
    console.print(whole, end="")


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else None


def say_bold(lines: Iterable[Sequence[tuple[str, bool]]]) -> None:
    """Print lines of pieces on a terminal, those that are marked in bold. Without secrets and control characters, as `say`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        pieces = [(for_terminal(without_secrets(text)), "bold" if bold else "") for text, bold in line]
        OUTPUT.note("".join(text for text, _ in pieces))
        console.print(Text.assemble(*pieces))


RECORDS = ("left_out", "token_notes", "left_out_of_sample", "token_notes_of_sample")
"""Entries of results that are records of `kd.data.left_out`."""


def emit(result: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print one result: a JSON document, or aligned lines. The records of what was left out and found are lines of words."""
    if as_json:
        emit_json(result)
        return
    result = {**result, **{name: said(result[name]) for name in RECORDS if name in result}}
    if title:
        say(title)
    width = max((len(k) for k in result), default=0) + 2
    for key, value in result.items():
        say(f"  {key.replace('_', ' '):<{width}}{readable(value)}")


def emit_json(document: Any) -> None:
    """Print one JSON document."""
    OUTPUT.document_printed = True
    say(json.dumps(document, indent=2))


def fail(
    text: str,
    kind: str,
    headline: str,
    exit_code: int,
    details: Mapping[str, str] | None = None,
    page: str | None = None,
) -> NoReturn:
    """Say why a command failed, and end. With --json, the one document on stdout is the error, unless a result is there already.

    text   what people read, on stderr
    kind   name of the error's class
    """
    say(text, error=True)
    if "--json" in sys.argv[1:] and not OUTPUT.document_printed:
        error = {"kind": kind, "headline": headline, "details": dict(details or {}), "exit_code": exit_code}
        emit_json({"error": error | ({} if page is None else {"page": page})})
    if OUTPUT.verbose:
        traceback.print_exc()
    sys.exit(exit_code)


def readable(value: Any) -> str:
    """A value as text, as `emit` shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {readable(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(readable(v) for v in value)
    return str(value)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function `(done, total, note)` that draws a bar on a terminal, and elsewhere prints a line every ten per cent.

    Where nobody knows the total (0), the bar moves without a share, and elsewhere a line comes every UNKNOWN_SECONDS.
    """
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or OUTPUT.quiet:
        shown, said_at = -1, time.monotonic()

        def plain(done: int, total: int, note: str) -> None:
            nonlocal shown, said_at
            if not total:
                if time.monotonic() - said_at >= UNKNOWN_SECONDS:
                    said_at = time.monotonic()
                    say(f"{label}  {note}", err=True)
                return
            tenth = 10 * done // max(total, 1)
            if tenth > shown:
                shown = tenth
                say(f"{label} {10 * tenth}%  {note}", err=True)

        yield plain
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[share]}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    OUTPUT.has_printed = True
    with rich_progress.Progress(*columns, console=console) as bar:
        task, logged = bar.add_task(label, total=None, note="", share=""), -1

        def draw(done: int, total: int, note: str) -> None:
            nonlocal logged
            share = f"{100 * done / total:>3.0f}%" if total else ""
            bar.update(task, completed=done, total=total or None, note=for_terminal(note), share=share)
            tenth = 10 * done // total if total else -1
            if tenth > logged:
                logged = tenth
                OUTPUT.note(f"{label} {10 * tenth}%  {for_terminal(note)}")

        yield draw


def follow(stage: str, steps: Iterable[AnyStep]) -> AnyStep:
    """Drive a generator of progress records to its end behind a progress bar; returns the last record."""
    last: AnyStep | None = None
    with progress_bar(stage) as advance:
        for last in steps:
            advance(last.done, last.total, last.note)
    assert last is not None
    return last


def outcome(stage: str, steps: Iterable[Progress[Result]]) -> Result:
    """Drive work to its end behind a progress bar; returns its result."""
    return final([follow(stage, steps)])


def is_speaker() -> bool:
    """Whether this process is the one of its run that prints: of torchrun's processes the first."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries() -> None:
    """Keep progress bars and notices of the model libraries off stderr; their errors stay, and with `-v` all of them.

    Their import takes seconds, so the user is told what is going on. Raises MissingPackageError where these libraries are not
    installed.
    """
    import logging

    from kd.common.extras import require

    require("train", "this command")
    if "torch" not in sys.modules and is_speaker():
        say("loading torch and transformers …", err=True)
    import transformers

    if OUTPUT.verbose:
        return

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels on every import
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it says that offloaded weights are offloaded
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
