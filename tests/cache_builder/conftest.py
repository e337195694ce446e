"""Places to share caches at: an S3 server, a hub, web servers, all on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from servers import FileServer, Server, nginx

from kd.cache_builder.share import fetching
from kd.cache_builder.store.records.manifest import Layout


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a hundredth of a second, where a user's program waits seconds, before another attempt."""
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """A finished `kl` cache of few files: for servers that take their time."""
    out = tmp_path_factory.mktemp("caches") / "small"
    run_build(build_request(out, layout=Layout(512, 128)))
    return out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of kd for this test alone."""
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(folder, ranges=True)`: a web server over a folder, with a place for faults; `serve.proxy(url)` before another."""
    servers: list[Server] = []

    def start(folder: Path, ranges: bool = True) -> FileServer:
        server = FileServer(folder, ranges)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def nginx_over(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """`nginx_over(folder)`: the address of an nginx that serves it."""
    if shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    with ExitStack() as stack:
        (tmp_path / "nginx").mkdir()
        yield lambda folder: stack.enter_context(nginx(folder, tmp_path / "nginx"))
