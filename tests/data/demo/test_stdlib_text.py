"""The standard library's English: the same documents each time, split by name."""

from __future__ import annotations

import ast
import warnings
from itertools import islice
from pathlib import Path

from kd.data.demo import stdlib_text
from kd.data.demo.stdlib_text import documents, module_prose, split_of_document

SOURCE = '''\
#!/usr/bin/env python
# A comment that runs over
# two lines and is long enough to be kept.
"""The module explains itself in more than forty characters."""

x = 1  # a comment beside code is left out, however long it may be

# ------------------------------------------------------------------

class Thing:
    """A thing has a docstring of more than forty characters."""

    # for i in range(10): x[i] += y[i] * (z[i] - 1) / 2
    def do(self):
        """Short."""
'''


def write(folder: Path, text: str) -> Path:
    path = folder / "module.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_docstrings_and_comment_blocks_are_kept_in_source_order(tmp_path: Path):
    assert module_prose(write(tmp_path, SOURCE)).split("\n\n") == [
        "The module explains itself in more than forty characters.",
        "/usr/bin/env python\nA comment that runs over\ntwo lines and is long enough to be kept.",
        "A thing has a docstring of more than forty characters.",
    ]


def test_a_file_that_cannot_be_parsed_is_empty(tmp_path: Path):
    assert module_prose(write(tmp_path, "def broken(:\n")) == ""


TRICKY = (
    '"""A text\n# in it, no comment\n"""\n# a comment\n',
    'x = ("one"  # beside\n     # alone\n     "two")\n',
    "f = f'''{x}\n# no comment {y}\n'''\n  # a comment\n",
    "\x0c# after a form feed\nb = b'''\n#\n'''\n#",
    "# one\n# two\n\n    # three\nif x:\n    # four\n    pass\n",
)


def test_comments_are_those_of_the_tokenizer():
    sources = [path.read_text(encoding="utf-8") for _, path in list(stdlib_text._modules())[::7]]
    assert len(sources) > 50
    for source in (*TRICKY, *sources):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stdlib_text.comment_blocks(source, ast.walk(ast.parse(source)))
        assert found == stdlib_text._joined(stdlib_text.tokenized_comments(source))


def test_warnings_as_errors_do_not_change_the_text(tmp_path: Path):
    path = write(tmp_path, '"""The module explains itself in more than forty characters."""\npattern = "\\d"\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict = module_prose(path)
    assert strict == "The module explains itself in more than forty characters."


def test_a_tenth_of_the_names_is_held_out_whatever_the_text():
    held_out = sum(split_of_document(f"module:name{i}") == "heldout" for i in range(5000))
    # binomial: 500 expected, standard deviation 21; five of them
    assert abs(held_out - 500) < 106
    assert split_of_document("topic:lambda") == split_of_document("topic:lambda")


def test_the_splits_divide_the_documents():
    everything = dict(islice(documents("all"), 60))
    parts = {s: dict(islice(documents(s), 60)) for s in ("train", "heldout")}
    for name in everything:
        assert (name in parts["heldout"]) == (split_of_document(name) == "heldout")
    assert not parts["train"].keys() & parts["heldout"].keys()


def test_documents_come_ordered_by_name_and_the_same_each_time():
    first = list(islice(documents("all"), 60))
    assert first == list(islice(documents("all"), 60))
    names = [name for name, _ in first]
    assert names == sorted(names)
    assert all(len(text) >= stdlib_text.MIN_DOCUMENT_CHARS for _, text in first)


def test_modules_are_the_librarys_own_and_not_its_tests():
    names = [name for name, _ in stdlib_text._modules()]
    assert names == sorted(set(names))
    assert "module:json.decoder" in names
    assert not [n for n in names if ".test." in n or "site-packages" in n or "_sysconfigdata" in n]
