"""Text of strangers where it is shown: one escaping for each place, and no secrets.

Names of models, texts and folders come from whoever made a cache or a task. A terminal obeys escape sequences in them, a
spreadsheet computes what begins with `=`, and Markdown turns `<script>` and `[x](javascript:…)` into markup. Addresses carry
passwords and signatures, and paths the name of the person who wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import PurePosixPath
from typing import Any

HIDDEN = "***"
"""What is printed in place of a secret."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Control characters but for line feed and tab, marks that turn the direction of text, and halves of characters."""
_USER = re.compile(r"(?<=://)[^/\s?#'\"<>]*@")
_QUERY = re.compile(r"([?&][\w.%~+-]{1,100}=)[^\s&'\"<>()#]+")
_BARE_QUERY = re.compile(r"(://[^\s?#'\"<>]*\?)(?![\w.%~+-]{1,100}=)[^\s'\"<>()#]+")
_FRAGMENT = re.compile(r"(://[^\s#'\"<>]*#)[^\s'\"<>()]+")
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|AKIA)\w{12,}")


def for_terminal(text: str) -> str:
    """Text whose control characters are shown as `\\u001b`, which JSON reads back; lines and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def for_markdown(value: Any) -> str:
    """A value as one line of Markdown in which nothing is markup."""
    text = escape(" ".join(for_terminal(without_secrets(str(value))).split()), quote=False)
    return re.sub(r"([\\`*|\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def for_spreadsheet(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula: text that begins like one gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = for_terminal(without_secrets(value))
    return (
        f"'{text}"
        if re.match(r"[\s'\"]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\n]", text) and not _is_number(text)
        else text
    )


def for_figure(text: str) -> str:
    """A label of a figure: no formula between dollars, and not left out of the legend because it begins with `_`."""
    shown = " ".join(for_terminal(without_secrets(text)).split()).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def without_secrets(text: str) -> str:
    """Text without what gives access: user and password of an address, the values of its query, its fragment, and tokens."""
    text = _USER.sub(f"{HIDDEN}@", text)
    for secret in (_QUERY, _BARE_QUERY, _FRAGMENT, _TOKEN):
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


def masked(text: str) -> str:
    """As `without_secrets`, with a star for each character of a secret: characters keep their places, so tokens can be cut out."""
    stars = list(text)
    for secret, first in ((_USER, 0), (_QUERY, 1), (_BARE_QUERY, 1), (_FRAGMENT, 1), (_TOKEN, 1)):
        for match in secret.finditer(text):
            start, stop = match.end(1) if first else match.start(), match.end() if first else match.end() - 1
            stars[start:stop] = "*" * (stop - start)
    return "".join(stars)


def redacted(document: Any) -> Any:
    """A JSON document whose texts are `without_secrets`."""
    if isinstance(document, Mapping):
        return {key: redacted(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [redacted(value) for value in document]
    return without_secrets(document) if isinstance(document, str) else document


def public_place(text: str) -> str:
    """A place as a file says it that others will read: no secrets, and of an absolute path the last name alone.

    Several places may stand between commas. A relative path stays, unless it leaves the folder with `..`.
    """
    return re.sub(r"[^,\s][^,]*", lambda match: _public(match[0]), without_secrets(text))


def _public(address: str) -> str:
    path = address.removeprefix("file://")
    absolute = path.startswith(("/", "~")) or ".." in path.split("/")
    return (PurePosixPath(path).name or HIDDEN) if absolute else address


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
