"""A sign of life: a command that has printed nothing after a second says on stderr that it is at work.

Importing torch takes seconds, and so may a hub that is slow to answer. Commands that load torch say so before they do
(`console.quiet_libraries`); this covers every other wait before the first line.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kd.commands.terminal import console

SECONDS = 1.0
"""Time without a line after which the sign is printed."""
SILENT = ("-q", "--quiet")
"""Options with which there is none. They are looked for among the words, because options may not be read by then."""


@contextmanager
def first_sign() -> Iterator[None]:
    """Print the sign where nothing else was printed for `SECONDS`, unless the body ends before."""
    if any(word in SILENT for word in sys.argv[1:]) or not console.is_speaker():
        yield
        return
    timer = threading.Timer(SECONDS, _speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _speak() -> None:
    if not console.OUTPUT.has_printed and not console.OUTPUT.quiet:
        console.say("starting …", err=True)
