"""Servers of strangers: whatever they send, and however slowly, a pull ends within a stated time, with an error in words.

The bounds are a hundredth of the real ones here, so that each server takes seconds and not minutes.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import RawServer

from kd.cache_builder.share import fetching
from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.remotes import PIECE
from kd.common.errors import CacheError
from kd.common.strangers import watched_connections, web

OK = b"HTTP/1.1 200 OK\r\n"
ATTEMPTS, ANSWER, SILENT, PER_PIECE = 3, 0.8, 0.6, 0.7
SECONDS = ATTEMPTS * (ANSWER + SILENT + PER_PIECE) + 4
"""Most seconds of a pull from any server: attempts, each up to its bounds, and a busy machine."""
Talk = Callable[[socket.socket, int], None]


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (fetching, "ATTEMPTS", ATTEMPTS),
        (fetching, "BACKOFF", 0.01),
        (fetching, "MAX_WAIT", 0.05),
        (web, "ANSWER_SECONDS", ANSWER),
        (web, "SILENT_SECONDS", SILENT),
        (web, "FLOOR", PIECE / PER_PIECE),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def serve_raw() -> Iterator[Callable[..., RawServer]]:
    servers: list[RawServer] = []

    def start(talk: Talk, host: str = "127.0.0.1") -> RawServer:
        servers.append(RawServer(talk, host))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def drip(connection: socket.socket, data: Iterator[bytes], pause: float = 0.05) -> None:
    for piece in data:
        connection.sendall(piece)
        time.sleep(pause)


def says_nothing(connection: socket.socket, number: int) -> None:
    time.sleep(60)


def hangs_up(connection: socket.socket, number: int) -> None:
    return


def drips_its_headers(connection: socket.socket, number: int) -> None:
    connection.sendall(OK)
    drip(connection, (b"X: y\r\n"[i % 6 :][:1] for i in itertools.count()))


def drips_its_body(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"Content-Length: 60000\r\n\r\n")
    drip(connection, itertools.repeat(b" "))


def drips_chunks(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    drip(connection, itertools.repeat(b"1\r\n \r\n"))


def says_continue_for_ever(connection: socket.socket, number: int) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def sends_headers_for_ever(connection: socket.socket, number: int) -> None:
    connection.sendall(OK)
    while True:
        connection.sendall(b"X: y\r\n" * 1000)


def sends_one_byte_and_hangs_up(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"Content-Length: 60000\r\n\r\n{")


def sends_one_byte_as_if_it_were_all(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"Content-Length: 1\r\n\r\n{")


def sends_a_body_for_ever(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"\r\n")
    while True:
        connection.sendall(bytes(2**20))


def is_busy_for_ever(connection: socket.socket, number: int) -> None:
    waits = (b"99999999999", "²".encode("latin-1"), b"Fri, 31 Dec 2999 23:59:59 GMT")
    connection.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: " + waits[number % 3] + b"\r\nContent-Length: 0\r\n\r\n")


def redirects_to_itself(connection: socket.socket, number: int) -> None:
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def redirects_to_nonsense(connection: socket.socket, number: int) -> None:
    connection.sendall(
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1/x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )


def speaks_no_http(connection: socket.socket, number: int) -> None:
    connection.sendall(b"\x16\x03\x01\x00\x05 \xff" * 1000)


SERVERS: tuple[Talk, ...] = (
    says_nothing,
    hangs_up,
    drips_its_headers,
    drips_its_body,
    drips_chunks,
    says_continue_for_ever,
    sends_headers_for_ever,
    sends_one_byte_and_hangs_up,
    sends_one_byte_as_if_it_were_all,
    sends_a_body_for_ever,
    is_busy_for_ever,
    redirects_to_itself,
    redirects_to_nonsense,
    speaks_no_http,
)


@pytest.mark.parametrize("talk", SERVERS, ids=lambda talk: talk.__name__)
def test_a_pull_ends_in_time_with_an_error_in_words(talk: Talk, serve_raw, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kd.cache_builder.share.transfer.MAX_JSON_BYTES", 2**22)
    server, started = serve_raw(talk), time.monotonic()
    with pytest.raises(CacheError) as caught:
        list(pull(server.url, tmp_path / "copy"))
    assert time.monotonic() - started < SECONDS
    assert caught.value.details.get("found") or caught.value.details.get("expected")
    assert not (tmp_path / "copy" / "manifest.json").exists()


@pytest.mark.parametrize("talk", [drips_its_body, sends_one_byte_and_hangs_up, sends_one_byte_as_if_it_were_all])
def test_a_file_of_a_server_that_gives_a_byte_at_a_time_ends_too(talk: Talk, serve_raw, tmp_path: Path):
    from kd.cache_builder.share.web_remote import WebRemote

    remote, started = WebRemote(serve_raw(talk).url), time.monotonic()
    with pytest.raises(CacheError, match=r"failed again and again|other bytes than committed"):
        fetching.fetch(remote, "x", tmp_path / "x", {"bytes": 60_000, "sha256": "0" * 64})
    assert time.monotonic() - started < SECONDS


def redirect_to(target: str) -> Talk:
    def talk(connection: socket.socket, number: int) -> None:
        head = (
            f"HTTP/1.1 302 Found\r\nLocation: {target}/manifest.json\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode())

    return talk


def answers(connection: socket.socket, number: int) -> None:
    connection.sendall(OK + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")


@pytest.fixture
def open_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 plays an address of the open network, `inside` and `outside` are names of the two kinds."""
    real = watched_connections.addresses_of
    names = {"inside": "127.0.0.1", "outside": "127.0.0.2"}
    monkeypatch.setattr(
        watched_connections, "addresses_of", lambda host, port: real(names.get(str(host), str(host)), port)
    )
    monkeypatch.setattr(watched_connections, "is_public", lambda address: address == "127.0.0.2")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "inside", "0.0.0.0", "127.1", "2130706433"])
@pytest.mark.usefixtures("open_network")
def test_a_redirect_from_the_open_network_to_this_machine_is_refused_unread(host: str, serve_raw, tmp_path: Path):
    inner = serve_raw(answers)
    outer = serve_raw(redirect_to(f"http://{host}:{inner.url.rpartition(':')[2]}"), "127.0.0.2")
    with pytest.raises(CacheError, match="into a private network"):
        list(pull(outer.url, tmp_path / "copy"))
    assert inner.connections == 0


@pytest.mark.usefixtures("open_network")
def test_other_redirects_are_followed(serve_raw, tmp_path: Path):
    inner, public = serve_raw(answers), serve_raw(answers, "127.0.0.2")
    for start in (
        serve_raw(redirect_to(public.url), "127.0.0.2"),
        serve_raw(redirect_to(public.url)),
        serve_raw(redirect_to(inner.url)),
    ):
        with pytest.raises(CacheError, match="a JSON file of the cache"):
            list(pull(start.url, tmp_path / "copy"))
    assert inner.connections
    assert public.connections


@pytest.mark.usefixtures("open_network")
def test_a_name_that_turns_private_after_it_was_looked_at_is_refused(serve_raw, tmp_path: Path, monkeypatch):
    """The address of the connection counts, not that of an earlier look."""
    inner = serve_raw(answers)
    port = inner.url.rpartition(":")[2]
    outer = serve_raw(redirect_to(f"http://turning:{port}"), "127.0.0.2")
    real = watched_connections.addresses_of
    monkeypatch.setattr(
        watched_connections, "addresses_of", lambda host, port: real("127.0.0.1" if host == "turning" else host, port)
    )
    with pytest.raises(CacheError, match="into a private network"):
        list(pull(outer.url, tmp_path / "copy"))
    assert inner.connections == 0


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
    ],
)
def test_which_addresses_lie_in_the_open_network(address: str, public: bool):
    assert watched_connections.is_public(address) == public


def test_a_pause_between_pieces_is_nobodys_fault_but_the_readers(serve_raw):
    """A slow disk does not end a transfer: only the time that the server takes is counted."""
    size = 3 * PIECE

    def talk(connection: socket.socket, number: int) -> None:
        connection.sendall(OK + f"Content-Length: {size}\r\n\r\n".encode() + bytes(size))

    with web.Web().get(serve_raw(talk).url, {}) as answer:
        arrived = 0
        for piece in answer.pieces(PIECE):
            time.sleep(1.5 * PER_PIECE)
            arrived += len(piece)
    assert arrived == size
