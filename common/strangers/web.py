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

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from kd.common.errors import CacheError

CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0
"""Most seconds to connect, and without a byte."""
ANSWER_SECONDS = 60.0
"""Most seconds from a request to the end of the headers, all redirects included."""
FLOOR = 4096
"""Least bytes per second of a body: a piece of 256 KiB has to arrive within 64 s."""
MAX_REDIRECTS, MAX_ADDRESSES = 10, 4
"""Most redirects of one request, and most addresses of one name that are tried."""


class TooSlow(Exception):
    """A server took longer than the bounds above."""


class Clock:
    """The time that a request has left. When it is over, the request's connections are shut down."""

    def __init__(self) -> None:
        self.late = False
        self.public_only = False
        """Whether connections may only be made to public addresses."""
        self.public: bool | None = None
        """Whether the last connection was to a public address; None behind a proxy."""
        self._until: float | None = None
        self._sockets: list[socket.socket] = []

    def within(self, seconds: float | None) -> None:
        """From now on, `seconds` are left; None stops the clock."""
        self._until = None if seconds is None else time.monotonic() + seconds

    def watch(self, connection: Any) -> None:
        """Shut this connection down when the time is over."""
        self._sockets.append(socket.socket(fileno=os.dup(connection.fileno())))  # TLS takes the first one over

    def look(self, now: float) -> None:
        """Shut the connections down if the time is over. Called by the watching thread."""
        if self._until is not None and now > self._until:
            self.late = True
            for connection in list(self._sockets):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def watches(self) -> bool:
        """Whether a connection is watched."""
        return bool(self._sockets)

    def forget(self) -> None:
        """Watch no connection any more; they stay open."""
        watched, self._sockets = self._sockets, []
        for connection in watched:
            connection.close()


class _Watching:
    """The thread that looks at the clocks, and the clock of each thread's request."""

    def __init__(self) -> None:
        self._clocks: set[Clock] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.of_thread = threading.local()

    @contextmanager
    def clock(self) -> Iterator[Clock]:
        clock = Clock()
        with self._changed:
            self._clocks.add(clock)
            if self._thread is None or not self._thread.is_alive():  # threads do not survive a fork
                self._thread = threading.Thread(target=self._look, name="kd-clock", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield clock
        finally:
            with self._changed:
                self._clocks.discard(clock)
            clock.forget()

    def _look(self) -> None:
        while True:
            with self._changed:
                while not self._clocks:
                    self._changed.wait()
                for clock in self._clocks:
                    clock.look(time.monotonic())
            time.sleep(0.1)


WATCHING = _Watching()


def is_public(address: str) -> bool:
    """True for an address of the open network; False for this machine, private networks, and what is reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def addresses_of(host: str, port: int) -> list[tuple[Any, ...]]:
    """What the name of a host stands for, as `socket.getaddrinfo` answers; the first few."""
    return socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[:MAX_ADDRESSES]


def _connected(connection: Any) -> socket.socket:
    """A connected socket for a connection of urllib3, after a look at the addresses."""
    clock: Clock | None = getattr(WATCHING.of_thread, "clock", None)
    reason: Exception = OSError("no address")
    try:
        addresses = addresses_of(connection._dns_host, connection.port)
    except (OSError, UnicodeError) as error:
        raise NewConnectionError(connection, f"no such host: {error}") from error
    for family, kind, protocol, _, address in addresses:
        if clock is not None and connection.proxy is None:
            clock.public = is_public(address[0])
            if clock.public_only and not clock.public:
                raise private_target(connection.host, address[0])
        one = socket.socket(family, kind, protocol)
        try:
            for option in connection.socket_options or ():
                one.setsockopt(*option)
            one.settimeout(CONNECT_SECONDS)
            one.connect(address)
        except OSError as error:
            one.close()
            reason = error
            continue
        if clock is not None:
            clock.watch(one)
        return one
    raise NewConnectionError(connection, f"cannot connect: {reason}") from reason


def private_target(host: str, address: str) -> CacheError:
    """The error for a redirect from the open network to an address that does not lie in it."""
    return CacheError(
        "the server redirects into a private network",
        where=host,
        found=address,
        expected="an address of the open network, as the first one is",
        try_="that address itself, if you trust it",
    )


class _Http(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)

    def request(self, *arguments: Any, **options: Any) -> None:
        _watch_again(self)
        super().request(*arguments, **options)


class _Https(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)

    def request(self, *arguments: Any, **options: Any) -> None:
        _watch_again(self)
        super().request(*arguments, **options)


def _watch_again(connection: Any) -> None:
    """A connection that is used again is watched again."""
    clock: Clock | None = getattr(WATCHING.of_thread, "clock", None)
    if clock is not None and connection.sock is not None and not clock.watches:
        clock.watch(connection.sock)
        with suppress(OSError):
            if connection.proxy is None:
                clock.public = is_public(connection.sock.getpeername()[0])


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _Adapter(HTTPAdapter):
    """Connections of the classes above."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        if "socks" not in type(manager).__module__:
            manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return manager


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
            clock.public_only = clock.public_only or bool(_lies_open(url) if clock.public is None else clock.public)
            if clock.public_only and clock.public is None and not _lies_open(following):
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
                self._local.session.mount(scheme, _Adapter())
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


def _lies_open(url: str) -> bool:
    """Whether every address of an address's host is public; for requests through a proxy, which connects by itself."""
    parts = urlsplit(url)
    try:
        addresses = addresses_of(parts.hostname or "", parts.port or 443)
    except (OSError, UnicodeError, ValueError):  # only the proxy knows the name
        return True
    return all(is_public(address[0]) for *_, address in addresses)
