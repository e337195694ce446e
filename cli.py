"""The `kd` command: its subcommands, its errors and its exit codes.

Results go to stdout (one JSON document with --json), progress and messages to stderr. The exit code is 0 for success, 1 for
an error, 2 for wrong usage, 3 when a check found damage, 4 when a build is not finished because other builders hold shards of
it, and 130 after an interruption (the same command continues).
The commands are in `commands/` and are imported on first use. They import heavy libraries inside functions, so that
`kd --help` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from kd.commands.terminal.lazy import LazyCommands, ListedGroup
from kd.commands.terminal.output_options import output_options

if TYPE_CHECKING:
    from kd.common.errors import KdError


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(error: KdError) -> NoReturn:
    """Print an error, in which the page of its kind is the last detail, and end."""
    from kd.commands.terminal.console import fail
    from kd.common.errors import page_of

    details = {name: str(value) for name, value in error.details.items()}
    error.details["see"] = page = f"{PAGES}/{page_of(error)}"
    fail(f"{type(error).__name__}: {error}", type(error).__name__, error.headline, error.exit_code, details, page)


def main() -> None:
    """Run `kd`. Errors that a user can cause become a few lines on stderr and an exit code; with --json, a document as well."""
    from kd.commands.terminal.console import OUTPUT, TerminalOutput
    from kd.commands.terminal.first_sign import first_sign
    from kd.commands.terminal.own_warnings import say_own_warnings
    from kd.common.memory import share_one_heap

    vars(OUTPUT).update(vars(TerminalOutput()))
    share_one_heap()
    say_own_warnings()
    signal.signal(signal.SIGTERM, _interrupt)  # Slurm and Docker send it before they kill
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # it warns about forks that the read-ahead threads do not make
    try:
        with first_sign():
            _run()
    finally:
        if OUTPUT.log is not None:
            OUTPUT.log.close()


def _run() -> None:
    from kd.commands.terminal.console import fail
    from kd.common.errors import KdError
    from kd.common.extras import missing_package

    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        _with_what_is_meant(error).show(shown)
        fail(shown.getvalue().rstrip("\n"), type(error).__name__, error.format_message(), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.exceptions.Abort) else error  # click wraps ours
        arguments = cause.args if isinstance(cause, KeyboardInterrupt) else ()
        what = arguments[0] if arguments else "interrupted"
        how_to_continue = arguments[1] if len(arguments) > 1 else "run the same command again to continue"
        fail(f"{what}; {how_to_continue}", "Interrupted", what, 130, {"try": how_to_continue})
    except KdError as error:
        _fail(error)
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        _fail(missing)
    except OSError as error:
        from kd.common.disk.disk_errors import write_error_of, write_failure

        if write_failure(error, Path()) is None:
            raise
        _fail(write_error_of(error, Path(), "make room or name another place, then run the same command again"))


PAGES = "https://github.com/kd-logit-cache/kd/blob/main"
"""Where the pages are that errors point to."""


def _with_what_is_meant(error: click.ClickException) -> click.ClickException:
    """The error; for an unknown option, with what it is called here in place of what is spelled most like it."""
    from kd.common.synonyms import nearest_name

    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        spellings = [name for option in error.ctx.command.get_params(error.ctx) for name in option.opts]
        meant = nearest_name(error.option_name, [name for name in spellings if name.startswith("--")])
        advice = "" if meant is None else f" Did you mean {meant}?"
        return click.UsageError(error.message + advice, error.ctx)
    return error


COMMANDS = {
    "cache": "kd.commands.cache:cache",
    "classify": "kd.commands.classify:classify",
    "data": "kd.commands.data:data",
    "demo": "kd.commands.demo:demo",
    "doctor": "kd.commands.looking.doctor:doctor",
    "eval": "kd.commands.eval:eval_command",
    "experiment": "kd.commands.experiment:experiment",
    "merge": "kd.commands.merge:merge",
    "recipe": "kd.commands.recipe:recipe",
    "report": "kd.commands.eval:report",
    "train": "kd.commands.train:train",
}
"""Name -> `module:attribute` of the command."""
LINES = {
    "cache": "Build, inspect, check and share teacher-logit caches.",
    "classify": "Fine-tune and score sequence classifiers on GLUE.",
    "data": "Look at text sources.",
    "demo": "Run the whole pipeline on the embedded teachers and texts, offline, in minutes.",
    "doctor": "Check this machine: versions, devices, extras, disk, and access to the hub.",
    "eval": "Score one or more models.",
    "experiment": "Train students with and without the teacher over several seeds from one cache, score both, "
    "and test the difference.",
    "merge": "Merge models of one architecture: classifiers keep a head per task, language models are merged whole.",
    "recipe": "Run the settings of the reference systems, command by command.",
    "report": "Compare runs and evaluations: tables, gains, loss curves and bars as PNG, Markdown, CSV, JSON "
    "and one HTML page.",
    "train": "Train a student from a cache; the teacher is never loaded.",
}
"""Name -> its line in `kd --help`, which imports no command."""


@click.group(
    cls=ListedGroup,
    commands=LazyCommands(COMMANDS),
    lines=LINES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    params=output_options(hidden=False),
)
@click.version_option(package_name="kd-logit-cache", prog_name="kd")
def cli() -> None:
    """Distil language models through a teacher-logit cache: run the teacher once, train many students.

    \b
    kd demo                                              the whole pipeline, offline, in minutes
    kd cache build --teacher ID --data SPEC --out DIR    stage one
    kd train --cache DIR --student ID --out RUN          stage two
    kd eval RUN --tasks perplexity --data SPEC           scores
    kd merge --method ties --pool FILE.yaml --out DIR    one model out of several

    -q, -v and --log-file may also stand after any command.
    """


if __name__ == "__main__":
    main()
