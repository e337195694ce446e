"""Web servers are read with and without ranges, cut connections continue, and redirects are bounded."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from requests.adapters import HTTPAdapter
from servers import Answer

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.web_remote import WebRemote
from kd.common.errors import CacheError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("server", ["nginx", "with ranges", "without ranges"])
def test_web_servers_are_read(server: str, cache: Path, tmp_path: Path, tree: Tree, request: pytest.FixtureRequest):
    if server == "nginx":
        url = request.getfixturevalue("nginx_over")(cache.parent)
    else:
        url = request.getfixturevalue("serve")(cache.parent, ranges=server == "with ranges").url
    final(pull(f"{url}/{cache.name}/", tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)


def test_a_cut_connection_goes_on_where_it_was_cut(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)

    def cut(path: str, before: int, answer: Answer) -> None:
        if before < 2 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 2

    server.fault = cut
    last = final(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)
    assert last.bytes_moved == last.bytes_total + sum(p.stat().st_size for p in (cache / "commits").iterdir())
    starts = [int(r.split("=")[1].split("-")[0]) for _, path, r in server.log if path.startswith("/targets") and r]
    assert sum(start > 0 for start in starts) >= 2 * sum(p.is_file() for p in (cache / "targets.zarr").rglob("c.*.0"))


def test_without_ranges_a_cut_file_is_skipped_up_to_where_it_was_cut(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache, ranges=False)

    def cut(path: str, before: int, answer: Answer) -> None:
        if before == 0 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 2

    server.fault = cut
    *_, last = pull(server.url, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(cache)
    assert last.done == last.total


def test_a_redirect_leaves_neither_the_web_nor_https(cache: Path, tmp_path: Path, serve):
    server, secret = serve(cache), tmp_path / "secret"
    secret.write_text("mine")

    def away(path: str, before: int, answer: Answer) -> None:
        answer.status, answer.body = 302, b""
        answer.headers = {"Location": f"file://{secret}"}

    server.fault = away
    with pytest.raises(CacheError, match="cannot be read"):
        final(pull(server.url, tmp_path / "copy"))

    server.fault = None

    class Downgrade(HTTPAdapter):
        """An https server that redirects to the http one."""

        def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
            response = requests.Response()
            response.status_code, response.url, response.request = 302, str(request.url), request
            response.headers["Location"] = str(request.url).replace("https://safe", server.url)
            response.raw = urllib3.HTTPResponse(BytesIO(), preload_content=False)
            return response

    session = requests.Session()
    session.mount("https://", Downgrade())
    remote = WebRemote("https://safe")
    remote._web._local.session = session
    with pytest.raises(CacheError, match="from https to http"):
        list(remote.read("manifest.json", 0, 100))
