"""Pages of docs/ run as they are written: commands, Python, files to save, and what the page says is printed.

What is run, in the page's order:

- a line of an indented block that begins with `kd` or `python examples/`; `# exit code 3` behind it says how it ends (0 otherwise);
- a block of Python, all of a page in one namespace;
- a block of another language whose first line is `# NAME`: it is saved under that name, before anything is run.

A block of text right after one command is what it prints: each line must come, in this order. `…` stands for any text, a line of it
for any lines, and numbers may differ by a twentieth, because another machine sums in another order.
"""

from __future__ import annotations

import glob
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from terminal import run_main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    language: str
    """`shell` for an indented one, else what stands behind the fence; often nothing."""
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The blocks of code of a page, in order."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^    [^\n]*\n)+)", flags=re.MULTILINE | re.DOTALL)
    for found in pattern.finditer(text + "\n"):
        line = text.count("\n", 0, found.start()) + 1
        if found[3] is None:
            yield Block(found[1], found[2], line)
        else:
            yield Block("shell", re.sub(r"^    ", "", found[3], flags=re.MULTILINE), line)


def commands(block: Block) -> list[str]:
    """The commands of an indented block, each on one line, with its comment."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith(("kd ", "python examples/"))]


def typed_commands(page: Path) -> list[str]:
    """Every command of a page."""
    return [
        one
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language == "shell"
        for one in commands(block)
    ]


def as_it_is(words: list[str]) -> list[str]:
    """A command as the page has it."""
    return words


def run_page(
    page: Path,
    folder: Path,
    *,
    small: Callable[[list[str]], list[str]] = as_it_is,
    compare: bool = True,
    names: dict[str, object] | None = None,
    left_out: Collection[str] = (),
) -> dict[str, str]:
    """Run a page in `folder`; returns command -> what it printed.

    small     puts small models, or fewer steps, into a command; an empty list leaves it out
    compare   whether commands must print what the page shows; with fewer steps they print other figures
    names     what the Python of the page has before its first block
    left_out  beginnings of commands, or of blocks of Python, that are not run; each must be on the page once
    """
    printed: dict[str, str] = {}
    names = dict(names or {})
    last = ""
    text = page.read_text(encoding="utf-8")
    waiting = list(left_out)

    def is_left_out(command: str) -> bool:
        beginning = next((one for one in waiting if command.startswith(one)), None)
        if beginning is not None:
            waiting.remove(beginning)
        return beginning is not None

    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        save_files(text)
        for block in blocks(text):
            where = f"{page.name}, line {block.line}"
            if block.language == "shell":
                for last in commands(block):
                    printed[last] = "" if is_left_out(last) else run_command(last, where, small)
            elif block.language == "python":
                if is_left_out(block.text):
                    continue
                out = io.StringIO()
                with redirect_stdout(out):
                    exec(compile(block.text, where, "exec"), names)
                printed[last := block.text] = out.getvalue()
            elif compare and block.language in ("", "text") and last:
                require_printed(block.text, printed[last], where)
    assert not waiting, f"{page.name} does not have {waiting}"
    return printed


def save_files(text: str) -> None:
    """Save the blocks of a page that name the file they are."""
    for block in blocks(text):
        saved = re.match(r"# ([\w/-]+\.\w+)$", block.text, flags=re.MULTILINE)
        if saved is not None and block.language not in ("shell", "python"):
            Path(saved[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(saved[1]).write_text(block.text, encoding="utf-8")


def run_command(command: str, where: str, small: Callable[[list[str]], list[str]]) -> str:
    """What one command prints, errors and progress included."""
    typed, _, comment = command.partition(" #")
    if not (words := small(with_files(shlex.split(typed)))):
        return ""
    program, *words = words
    code = re.match(r" exit code (\d+)", comment)
    try:
        if program == "kd":
            done = run_main(*words, code=int(code[1]) if code else 0)
            return done.stdout + done.stderr
        out = io.StringIO()
        with redirect_stdout(out), patch.object(sys, "argv", words):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return out.getvalue()
    except BaseException as error:
        error.add_note(f"{where}: {command}")
        raise


def with_files(words: list[str]) -> list[str]:
    """The words as a shell gives them to a program: a pattern becomes the files that it matches."""
    return [file for word in words for file in (sorted(glob.glob(word)) or [word])]


def require_printed(expected: str, output: str, where: str) -> None:
    """Every line of `expected` comes in `output`, in this order."""
    rest = output.splitlines()
    for line in expected.splitlines():
        if line.strip() in ("", "…"):
            continue
        at = next((number for number, one in enumerate(rest) if alike(line, one)), None)
        assert at is not None, f"{where}: not printed: {line!r}\n{output}"
        rest = rest[at + 1 :]


def alike(expected: str, found: str) -> bool:
    """Whether a line is the expected one: `…` stands for any text, numbers may differ by a twentieth."""
    pieces = [re.escape(NUMBER.sub("\0", piece.strip())) for piece in expected.split("…")]
    words = (
        re.sub(r"(\\ )+", r"\\s+", ".*".join(pieces))
        .replace("\0", f"({NUMBER.pattern})")
        .replace("\\\0", f"({NUMBER.pattern})")
    )
    match = re.fullmatch(words, found.strip())
    if match is None:
        return False
    numbers = [float(one[0].replace(",", "")) for one in NUMBER.finditer(expected)]
    others = [float(one.replace(",", "")) for one in match.groups()]
    return all(abs(a - b) <= 0.05 * abs(a) for a, b in zip(numbers, others, strict=True))
