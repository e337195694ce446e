"""`kd` commands run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from kd.cli import cli


def run_kd(*words: object, code: int = 0) -> Result:
    """Run a command to its end; errors of ours are raised as they are."""
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def kd(*words: object, code: int = 0) -> str:
    """Run a command to its end; returns what it printed to stdout."""
    return run_kd(*words, code=code).stdout
