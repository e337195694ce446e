"""The English of Python's standard library: the corpus of the demo and the tests.

It needs no network and puts no foreign text into the repository. Documents are read from the running interpreter's standard
library (the language reference in `pydoc_data.topics`, docstrings, comments), in a fixed order with a fixed filter. They
have about 3 MB on CPython 3.11: prose mixed with code, like many technical corpora.

A document is one topic or one module. The digest of its *name* decides its split, so that a held-out module is held out on
every Python version. Its text may differ between versions; the corpus digest in a cache identifies the text.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT_SHARE = 0.1
"""Share of document names that belong to the `heldout` split."""

MIN_DOCUMENT_CHARS = 200
"""Shorter documents are left out."""
_SKIPPED = {
    "__pycache__",
    "config",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def split_of_document(name: str) -> str:
    """The split of a document, by its name only: `heldout` for about one name in ten, else `train`."""
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    return "heldout" if bucket < HELD_OUT_SHARE else "train"


def documents(split: str) -> Iterator[tuple[str, str]]:
    """`(name, text)` of every document in `split` (`train`, `heldout` or `all`): topics, then modules, ordered by name."""
    for name, text in _topics():
        if split in ("all", split_of_document(name)):
            yield name, text
    for name, path in _modules():
        if split not in ("all", split_of_document(name)):
            continue
        text = module_prose(path)
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for key in sorted(topics):
        text = topics[key].strip()
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield f"topic:{key}", text


def _modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED or part.startswith("config-") for part in parts):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if not module.rpartition(".")[2].startswith("_sysconfigdata"):  # differs from machine to machine
            modules.append((f"module:{module}", path))
    yield from sorted(modules)


def module_prose(path: Path) -> str:
    """Docstrings and comment blocks of one source file, in source order, separated by blank lines.

    A file that this interpreter cannot parse gives an empty text.
    """
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():  # under `-W error` an invalid escape would count as a syntax error
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(source)))
        comments = comment_blocks(source, nodes)
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return ""
    pieces = list(comments)
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                line = 0 if isinstance(node, ast.Module) else node.lineno
                pieces.append((line, docstring.strip()))
    return "\n\n".join(text for _, text in sorted(pieces) if _is_prose(text))


def comment_blocks(source: str, nodes: Iterable[ast.AST]) -> list[tuple[int, str]]:
    """Blocks of consecutive comment lines, as `(first line, text without the hash signs)`.

    A line that starts with a hash sign is a comment, unless it lies inside a string. Only in files with such lines is
    Python's tokenizer used, which takes longer than all the rest.

    nodes   of the source's syntax tree
    """
    lines = source.split("\n")
    hashes = [n for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")]
    inside: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno + 1, (node.end_lineno or 0) + 1))
    if inside.isdisjoint(hashes):
        return _joined((n, lines[n - 1].strip()) for n in hashes)
    return _joined(tokenized_comments(source))


def tokenized_comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment that has a line to itself, by Python's tokenizer."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            yield token.start[0], token.string


def _joined(comments: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    blocks: list[tuple[int, list[str]]] = []
    last_line = -2
    for line, comment in comments:
        text = comment.lstrip("#!").removeprefix(" ").rstrip()
        if line == last_line + 1:
            blocks[-1][1].append(text)
        else:
            blocks.append((line, [text]))
        last_line = line
    return [(line, "\n".join(lines).strip()) for line, lines in blocks]


def _is_prose(text: str) -> bool:
    """Whether a text has at least 40 characters, 55 % of them lower-case letters: no rulers, tables, or code in comments."""
    return len(text) >= 40 and sum(c.islower() for c in text) >= 0.55 * len(text)
