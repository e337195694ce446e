"""HTTP requests to servers of strangers: they end within a stated time, and a redirect does not lead into this network.

    with Web().get(url, headers) as answer:
        for piece in answer.pieces(2**18): ...

A server may send a byte now and then, for ever; `requests` only bounds the silence between two of them. Here one thread watches
the clock of every request: up to the last header of the last redirect it may take `ANSWER_SECONDS`, and every piece of the body has
to arrive at `FLOOR` bytes per second. Then the connection is shut down.

An address that lies in the open network may not redirect to one that does not: to this machine, to a private network, to a
cloud's metadata. The addresses of each connection are looked at before it is made, so a name that changes its address is
of no use. What the user named may lie anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from kd.common.errors import CacheError
from kd.common.strangers.watched_connections import (
    CONNECT_SECONDS,
    WATCHING,
    Clock,
    TooSlow,
    WatchedAdapter,
    lies_open,
    private_target,
)

SILENT_SECONDS = 30.0
"""Most seconds without a byte."""
ANSWER_SECONDS = 60.0
"""Most seconds from a request to the end of the headers, all redirects included."""
FLOOR = 4096
"""Least bytes per second of a body: a piece of 256 KiB has to arrive within 64 s."""
MAX_REDIRECTS = 10
"""Most redirects of one request."""


class WebAnswer:
    """A response whose headers are there and whose body is not."""

    def __init__(self, response: requests.Response, clock: Clock) -> None:
        self.response, self._clock = response, clock
        self.status, self.headers = response.status_code, response.headers

    def pieces(self, size: int) -> Iterator[bytes]:
        """The body in pieces of `size` bytes or, where it is sent in chunks, fewer.

        Raises TooSlow, and what `requests` and `urllib3` raise.
        """
        stream = self.response.raw.stream(size, decode_content=False)
        seconds, arrived = size / FLOOR, 0
        while True:
            began = time.monotonic()
            self._clock.within(seconds)
            piece = next(stream, None)
            if self._clock.late:
                raise TooSlow(f"less than {FLOOR} bytes per second")
            self._clock.within(None)  # what is done with a piece takes as long as it takes
            if piece is None:
                return
            seconds, arrived = seconds - (time.monotonic() - began), arrived + len(piece)
            if arrived >= size:
                seconds, arrived = size / FLOOR, 0
            yield piece


class Web:
    """Requests through sessions of `requests`, one per thread."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._asking: set[Clock] = set()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[WebAnswer]:
        """Ask for an address and follow its redirects. Raises TooSlow, CacheError, and what `requests` and `urllib3` raise."""
        with self._timed(ANSWER_SECONDS) as clock, self._last(url, dict(headers), clock) as response:
            clock.within(None)
            yield WebAnswer(response, clock)

    @contextmanager
    def post(self, url: str, headers: Mapping[str, str], body: bytes, seconds: float) -> Iterator[WebAnswer]:
        """Send `body`; the answer may take `seconds` to its last header. A redirect is not followed. Raises as `get`."""
        with (
            self._timed(seconds) as clock,
            self._session().post(
                url,
                data=body,
                headers=dict(headers),
                stream=True,
                timeout=(CONNECT_SECONDS, seconds),
                allow_redirects=False,
            ) as response,
        ):
            clock.within(None)
            yield WebAnswer(response, clock)

    def hang_up(self) -> None:
        """Shut down the connections of all requests that are under way, in whatever thread: they raise TooSlow."""
        for clock in list(self._asking):
            clock.within(0.0)

    @contextmanager
    def _timed(self, seconds: float) -> Iterator[Clock]:
        """A clock for the request of this thread, with `seconds` left."""
        with WATCHING.clock() as clock:
            WATCHING.of_thread.clock = clock
            self._asking.add(clock)
            try:
                clock.within(seconds)
                yield clock
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                if clock.late:
                    raise TooSlow("it takes too long") from error
                raise
            finally:
                self._asking.discard(clock)
                WATCHING.of_thread.clock = None

    def _last(self, url: str, headers: dict[str, str], clock: Clock) -> requests.Response:
        """The response at the end of the redirects."""
        session = self._session()
        for _ in range(MAX_REDIRECTS + 1):
            timeout = (CONNECT_SECONDS, SILENT_SECONDS)
            response = session.get(url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
            target = session.get_redirect_target(response)
            if target is None:
                return response
            response.close()
            following = urljoin(url, target)
            self._check(url, following)
            clock.public_only = clock.public_only or bool(lies_open(url) if clock.public is None else clock.public)
            if clock.public_only and clock.public is None and not lies_open(following):
                raise private_target(url, following)
            if session.should_strip_auth(url, following):
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            clock.forget()
            url = following
        raise requests.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")

    def _check(self, url: str, following: str) -> None:
        schemes = urlsplit(url).scheme, urlsplit(following).scheme
        if schemes[1] not in ("http", "https"):
            raise requests.exceptions.InvalidSchema(f"a redirect to {schemes[1]}://")
        if schemes == ("https", "http"):
            raise CacheError("the server redirects from https to http", where=url, found=following)

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, WatchedAdapter())
        session: requests.Session = self._local.session
        return session


def refuse_private_redirect(url: str) -> None:
    """Raise CacheError where an address of the open network redirects into a private one; for what another library reads.

    Nothing else is an error here: whoever reads the address says so.
    """
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    with (
        suppress(TooSlow, requests.RequestException, urllib3.exceptions.HTTPError, ValueError),
        Web().get(url, headers),
    ):
        pass
