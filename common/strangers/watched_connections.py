"""Connections that are shut down when their time is over, and that are not made to this network when that is not allowed.

    session.mount("https://", WatchedAdapter())
    with WATCHING.clock() as clock:
        WATCHING.of_thread.clock = clock
        clock.within(60.0)
        session.get(url)

`requests` only bounds the silence between two bytes. Here one thread looks at the clock of every request ten times a second. The
addresses of a connection are looked at before it is made, so a name that changes its address is of no use.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from kd.common.errors import CacheError

CONNECT_SECONDS = 10.0
"""Most seconds to connect."""
MAX_ADDRESSES = 4
"""Most addresses of one name that are tried."""


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


def lies_open(url: str) -> bool:
    """Whether every address of an address's host is public; for requests through a proxy, which connects by itself."""
    parts = urlsplit(url)
    try:
        addresses = addresses_of(parts.hostname or "", parts.port or 443)
    except (OSError, UnicodeError, ValueError):  # only the proxy knows the name
        return True
    return all(is_public(address[0]) for *_, address in addresses)


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


class WatchedAdapter(HTTPAdapter):
    """Connections of `requests` that are watched, and whose addresses are looked at."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        if "socks" not in type(manager).__module__:
            manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return manager
