"""Questions to an inference server over HTTP: JSON out, JSON back, tried again while the server cannot answer.

    client = ServerClient("http://localhost:8000/v1")
    models = client.ask("/models")

A connection that is cut, a server that restarts (5xx) or is full (429): the question is asked again after a pause that doubles,
or that the server names, until `patience` seconds have passed. What the server refuses (4xx) is an error at once, with
its own words. An answer that is no JSON, or that `read` finds wrong, is asked for again twice. The bounds of
`kd.common.strangers.web` hold, and an answer has a largest size. The key of a server is read from KD_TEACHER_API_KEY and
is written nowhere.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from kd.cache_builder.served.logprob_rows import WrongAnswer
from kd.common.errors import DataError, KdError, TeacherError
from kd.common.strangers.watched_connections import TooSlow
from kd.common.strangers.web import Web

Value = TypeVar("Value")

API_KEY = "KD_TEACHER_API_KEY"
"""Environment variable with the server's key."""
BACKOFF, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a question is asked again; they double up to the second number, and a random part of up to a half is added."""
PATIENCE = 300.0
"""Seconds for which a question is asked again where the settings name no number."""
ANSWER_SECONDS = 600.0
"""Most seconds from a question to the headers of its answer: a busy server queues it."""
WRONG_ANSWERS = 3
"""Answers to one question that may be wrong, before it is an error."""
MAX_ANSWER_BYTES = 2**28
"""Largest answer: 512 tokens with 200 log-probabilities each are 8 MB."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer later."""
MAX_WORDS = 600
"""Characters that are shown of what a server says."""


class Unavailable(Exception):
    """The server does not answer now. `wait`: seconds after which it asks to be asked again."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        self.wait = wait
        super().__init__(reason)


class Refused(Exception):
    """The server answered, and does not do what it was asked."""

    def __init__(self, status: int, words: str) -> None:
        self.status, self.words = status, words
        super().__init__(f"{status}: {words}")


class HungUp(Exception):
    """The client was closed while a question was under way."""


class ServerClient:
    """Asks one server. Threads may share it."""

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        """`url`: address of the OpenAI-compatible interface, which ends with /v1. Raises DataError for another kind of text."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise DataError(
                "this is not the address of a server",
                found=f"--teacher-url {url}",
                expected="http://HOST:PORT/v1",
            )
        self.url = url.rstrip("/")
        self.root = self.url.removesuffix("/v1")
        """Address of what the server has beside the OpenAI-compatible interface."""
        self.patience = patience
        self._web = Web()
        self._closed = threading.Event()

    def close(self) -> None:
        """End the questions that are under way: they raise HungUp."""
        self._closed.set()
        self._web.hang_up()

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], Value] = lambda document: document,
        *,
        what: str = "a question",
        beside: bool = False,
    ) -> Value:
        """What `read` makes of the answer to a question; without a body it is a GET.

        what    what is asked about, for errors
        beside  whether `path` starts at `root`, and not at the address itself

        Raises Refused where the server refuses, TeacherError where it does not answer or answers wrongly, HungUp.
        """
        address, began, failures, wrong = (self.root if beside else self.url) + path, time.monotonic(), 0, 0
        while True:
            try:
                return read(self._once(address, body))
            except WrongAnswer as error:
                wrong += 1
                if wrong == WRONG_ANSWERS:
                    raise self._wrong(what, error) from error
                pause = None
            except Unavailable as error:
                failures += 1
                pause = error.wait
                if time.monotonic() - began + (pause or 0) > self.patience:
                    raise self._silent(what, error) from error
            usual = min(BACKOFF * 2 ** min(failures, 10), LONGEST_PAUSE) * random.uniform(1.0, 1.5)
            if self._closed.wait(usual if pause is None else pause):
                raise HungUp

    def _once(self, address: str, body: dict[str, Any] | None) -> Any:
        """One attempt. Raises Unavailable, Refused, WrongAnswer, HungUp."""
        if self._closed.is_set():
            raise HungUp
        try:
            if body is None:
                with self._web.get(address, self._headers()) as answer:
                    status, headers, data = answer.status, answer.headers, _whole(answer.pieces(2**18))
            else:
                sent = json.dumps(body, separators=(",", ":")).encode()
                headers_sent = self._headers() | {"Content-Type": "application/json"}
                with self._web.post(address, headers_sent, sent, ANSWER_SECONDS) as answer:
                    status, headers, data = answer.status, answer.headers, _whole(answer.pieces(2**18))
        except (TooSlow, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if self._closed.is_set():
                raise HungUp from error
            raise Unavailable(_reason(error)) from error
        if status in BUSY:
            raise Unavailable(f"status {status}: {_words(data)}", _seconds(headers.get("Retry-After")))
        if status != 200:
            raise Refused(status, _words(data))
        try:
            return json.loads(data)
        except ValueError as error:
            raise WrongAnswer(f"no JSON, but {_words(data)[:80]!r}") from error

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(API_KEY)
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _silent(self, what: str, error: Unavailable) -> KdError:
        return TeacherError(
            "the teacher's server does not answer",
            where=self.url,
            asked=what,
            found=error,
            tried=f"for {self.patience:g} seconds",
            try_="the same command again, when the server runs: it continues",
        )

    def _wrong(self, what: str, error: WrongAnswer) -> KdError:
        return TeacherError(
            "the teacher's server answers wrongly",
            where=self.url,
            asked=what,
            found=f"{error}, {WRONG_ANSWERS} times",
            try_="another --server-api, if the server is of another kind; see docs/how-to/served-teacher.md",
        )

    def refusal(self, what: str, error: Refused) -> KdError:
        """The error for a question that the server refuses."""
        key = error.status in (401, 403)
        return TeacherError(
            "the teacher's server refuses",
            where=self.url,
            asked=what,
            found=str(error),
            try_=f"the server's key in the environment variable {API_KEY}" if key else None,
        )


def _whole(pieces: Any) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise WrongAnswer(f"more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _words(data: bytes) -> str:
    """What a server says in words: the message of an error document, or the text."""
    text = data[: 2**16].decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except ValueError:
        document = text
    for name in ("error", "message", "detail"):
        if isinstance(document, dict) and name in document:
            document = document[name]
    return " ".join(str(document).split())[:MAX_WORDS]


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds, at most two minutes; None where there is none, or a date."""
    try:
        return min(max(float(header or ""), 0.0), 120.0)
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    """A failed connection in a few words; urllib3 puts its reason behind several layers."""
    inner = error
    while isinstance(getattr(inner, "reason", None) or (inner.args[0] if inner.args else None), Exception):
        inner = getattr(inner, "reason", None) or inner.args[0]
    return f"{type(error).__name__}: {' '.join(str(inner).split())}"[:MAX_WORDS]
