"""`kd` commands run in this process: starting one of its own imports torch again, which takes seconds."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from click.testing import CliRunner, Result

from kd.cli import cli, main


def run_kd(*words: object, code: int = 0) -> Result:
    """Run a command to its end; errors of ours are raised as they are."""
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def kd(*words: object, code: int = 0) -> str:
    """Run a command to its end; returns what it printed to stdout."""
    return run_kd(*words, code=code).stdout


def run_main(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `kd` as a shell would: errors become lines on stderr and an exit code."""
    arguments, handler = ["kd", *map(str, words)], signal.getsignal(signal.SIGTERM)
    heap = patch("kd.common.memory.share_one_heap")  # it is set once for a process, and this one is that of other tests
    out, err = io.StringIO(), io.StringIO()
    at_once = patch(
        "kd.commands.terminal.first_sign.SECONDS", 600
    )  # what is printed does not depend on how busy a machine is
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", arguments), heap, at_once:
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    assert status == code, f"exit {status}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
