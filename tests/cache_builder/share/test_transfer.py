"""What is pushed is what is pulled, byte for byte, to and from every kind of place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Answer, Proxy, Server

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


def test_what_is_pushed_is_what_is_pulled(small: Path, place: str, tmp_path: Path, tree: Tree):
    *_, sent = push(small, place)
    *_, got = pull(place, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(small)
    assert sent.done == sent.total == sent.result.bytes_moved
    assert got.done == got.total == got.result.bytes_total
    assert got.result.part is None
    again = final(push(small, place))
    assert (again.files, again.bytes_moved) == (0, 0)
    assert final(pull(place, tmp_path / "copy")).bytes_moved == 0


@pytest.mark.parametrize("kind", ["s3", "hub", "nginx"])
def test_cuts_and_errors_in_front_of_real_servers(
    kind: str, small: Path, tmp_path: Path, tree: Tree, request: pytest.FixtureRequest
):
    if kind == "nginx":
        server: Server = Proxy(request.getfixturevalue("nginx_over")(small))
        url = server.url
    else:
        server = request.getfixturevalue(kind)
        url = {"s3": "s3://shared/cache", "hub": "hf://datasets/us/cache"}[kind]
        final(push(small, url))

    def fault(path: str, before: int, answer: Answer) -> None:
        if before == 0 and answer.status < 300:
            answer.status, answer.body = 503, b"busy"
            answer.headers.clear()
        elif before == 1 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 3

    server.fault = fault
    final(pull(url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(small)
