"""What is pushed is what is pulled, byte for byte, whatever the network does; what arrives wrong is named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from requests.adapters import HTTPAdapter
from servers import Answer, HubServer, Proxy, Server

from kd.cache_builder.share.pull import STAGING, pull
from kd.cache_builder.share.push import push
from kd.cache_builder.share.remotes import FolderRemote
from kd.cache_builder.share.transfer import TransferProgress
from kd.cache_builder.share.web_remote import WebRemote
from kd.cache_builder.store import commits
from kd.cache_builder.store.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError, DataError, KdError

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


def to_the_end(steps: Any) -> TransferProgress:
    return list(steps)[-1]


def findings(root: Path) -> list[str]:
    return [f"{f.where}: {f.problem}" for f in list(verify(root))[-1].findings]


@pytest.fixture(params=["folder", "file://", "s3", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address to push to and pull from, of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://shared/some/cache"
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "hf://datasets/us/cache"
    return f"{'file://' if request.param == 'file://' else ''}{tmp_path / 'a place'}".replace(
        " ", "%20" if request.param == "file://" else " "
    )


def test_what_is_pushed_is_what_is_pulled(small: Path, place: str, tmp_path: Path, tree: Tree):
    sent = to_the_end(push(small, place))
    got = to_the_end(pull(place, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(small)
    assert sent.bytes_done == sent.bytes_total == sent.bytes_moved
    assert got.bytes_done == got.bytes_total
    assert got.part is None
    again = to_the_end(push(small, place))
    assert (again.files, again.bytes_moved) == (0, 0)
    assert to_the_end(pull(place, tmp_path / "copy")).bytes_moved == 0


@pytest.mark.parametrize("server", ["nginx", "with ranges", "without ranges"])
def test_web_servers_are_read(server: str, cache: Path, tmp_path: Path, tree: Tree, request: pytest.FixtureRequest):
    if server == "nginx":
        url = request.getfixturevalue("nginx_over")(cache.parent)
    else:
        url = request.getfixturevalue("serve")(cache.parent, ranges=server == "with ranges").url
    to_the_end(pull(f"{url}/{cache.name}/", tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)


def test_a_cut_connection_goes_on_where_it_was_cut(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)

    def cut(path: str, before: int, answer: Answer) -> None:
        if before < 2 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 2

    server.fault = cut
    last = to_the_end(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)
    assert last.bytes_moved == last.bytes_total + sum(p.stat().st_size for p in (cache / "commits").iterdir())
    starts = [int(r.split("=")[1].split("-")[0]) for _, path, r in server.log if path.startswith("/targets") and r]
    assert sum(start > 0 for start in starts) >= 2 * sum(p.is_file() for p in (cache / "targets.zarr").rglob("*/c/*/*"))


def test_without_ranges_a_cut_file_is_skipped_up_to_where_it_was_cut(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache, ranges=False)

    def cut(path: str, before: int, answer: Answer) -> None:
        if before == 0 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 2

    server.fault = cut
    last = to_the_end(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)
    assert last.bytes_done == last.bytes_total


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
        to_the_end(push(small, url))

    def fault(path: str, before: int, answer: Answer) -> None:
        if before == 0 and answer.status < 300:
            answer.status, answer.body = 503, b"busy"
            answer.headers.clear()
        elif before == 1 and len(answer.body) > 64:
            answer.cut = len(answer.body) // 3

    server.fault = fault
    to_the_end(pull(url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(small)


@pytest.mark.parametrize("kind", ["s3", "hub"])
def test_a_push_survives_errors_of_the_server(
    kind: str, small: Path, tmp_path: Path, tree: Tree, request: pytest.FixtureRequest
):
    server = request.getfixturevalue(kind)
    url = {"s3": "s3://shared/cache", "hub": "hf://datasets/us/cache"}[kind]

    def fault(path: str, before: int, answer: Answer) -> None:
        if before == 0 and ("/commit/" in path or "PUT" in path or path.startswith(("/shared/cache/t", "/lfs/"))):
            answer.status, answer.body = 500, b""
            answer.headers.clear()

    server.fault = fault
    to_the_end(push(small, url))
    server.fault = None
    to_the_end(pull(url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(small)


def test_a_slow_link_is_only_slow(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)

    def slow(path: str, before: int, answer: Answer) -> None:
        answer.pause = 0.02

    server.fault = slow
    steps = list(pull(server.url, tmp_path / "copy", workers=32))
    assert tree(tmp_path / "copy") == tree(cache)
    assert len(steps) > 1  # somebody watching sees it move
    assert [s.bytes_done for s in steps] == sorted(s.bytes_done for s in steps)


def test_a_server_that_never_works_is_an_error_and_the_next_pull_goes_on(
    cache: Path, tmp_path: Path, tree: Tree, serve
):
    server = serve(cache)
    gold = commits.shard_files(load_manifest(cache).arrays, 1)["gold_ids"]

    def broken(path: str, before: int, answer: Answer) -> None:
        if path == f"/{gold}":
            answer.status, answer.body = 502, b""

    server.fault = broken
    with pytest.raises(CacheError, match="failed again and again") as error:
        to_the_end(pull(server.url, tmp_path / "copy", workers=1))
    assert error.value.details["file"] == gold
    assert error.value.exit_code == 1
    with pytest.raises(CacheError, match="this is not a cache"):
        load_manifest(tmp_path / "copy")
    server.fault, before = None, len(server.log)
    to_the_end(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)
    first = set(commits.shard_files(load_manifest(cache).arrays, 0).values())
    assert not first & {path[1:] for _, path, _ in server.log[before:]}  # what had arrived is not fetched again


def flip(answer: Answer) -> None:
    middle = len(answer.body) // 2
    answer.body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]


def test_a_byte_that_was_wrong_once_is_fetched_again(cache: Path, tmp_path: Path, tree: Tree, serve):
    server = serve(cache)
    server.fault = lambda path, before, answer: flip(answer) if before == 0 and path.startswith("/targets") else None
    to_the_end(pull(server.url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(cache)


@pytest.mark.parametrize(
    "name", ["vocabulary.parquet", "commits/00001.json", "examples/00000.parquet", "token_ids", "manifest.json"]
)
def test_a_wrong_byte_is_damage_and_names_the_file(name: str, cache: Path, tmp_path: Path, serve):
    server = serve(cache)
    if name == "token_ids":
        name = commits.shard_files(load_manifest(cache).arrays, 2)[name]
    server.fault = lambda path, before, answer: flip(answer) if path == f"/{name}" else None
    with pytest.raises(CacheDamageError) as error:
        to_the_end(pull(server.url, tmp_path / "copy"))
    if name != "manifest.json":
        assert error.value.details["file"] == name
    assert str(error.value.details["where"]).startswith(server.url)
    assert error.value.exit_code == 3
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert len(server.gets(name)) == (1 if name == "manifest.json" else 2)


def test_a_file_of_another_length_is_damage(cache: Path, tmp_path: Path, serve):
    for change in (lambda body: body[:-5], lambda body: b""):
        server = serve(cache)

        def short(path: str, before: int, answer: Answer, change=change) -> None:
            if path == "/vocabulary.parquet":
                answer.status, answer.body = 200, change((cache / "vocabulary.parquet").read_bytes())
                answer.headers.clear()

        server.fault = short
        with pytest.raises((CacheDamageError, CacheError)) as error:
            to_the_end(pull(server.url, tmp_path / "copy"))
        assert error.value.details["file"] == "vocabulary.parquet"
        shutil.rmtree(tmp_path / "copy")


def test_a_missing_file_is_damage_and_a_missing_manifest_no_cache(cache: Path, tmp_path: Path, serve):
    for name, kind, words in (
        ("commits/00000.json", CacheDamageError, "missing"),
        ("manifest.json", CacheError, "no cache"),
    ):
        server = serve(cache)

        def gone(path: str, before: int, answer: Answer, name=name) -> None:
            if path == f"/{name}":
                answer.status, answer.body = 404, b""
                answer.headers.clear()

        server.fault = gone
        with pytest.raises(kind, match=words):
            to_the_end(pull(server.url, tmp_path / name.split(".")[0]))


def test_no_more_is_taken_than_was_promised(cache: Path, tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(cache, ranges=False)
    server.fault = lambda path, before, answer: setattr(answer, "endless", path == "/vocabulary.parquet")
    to_the_end(pull(server.url, tmp_path / "copy"))  # the right bytes, then zeros for ever
    assert server.sent < 64 * 2**20
    monkeypatch.setattr("kd.cache_builder.share.transfer.MAX_JSON_BYTES", 10**6)
    server.fault = lambda path, before, answer: setattr(answer, "endless", path == "/manifest.json")
    with pytest.raises(CacheDamageError, match="too large"):
        to_the_end(pull(server.url, tmp_path / "other"))
    assert server.sent < 128 * 2**20


def test_a_redirect_leaves_neither_the_web_nor_https(cache: Path, tmp_path: Path, serve):
    server, secret = serve(cache), tmp_path / "secret"
    secret.write_text("mine")

    def away(path: str, before: int, answer: Answer) -> None:
        answer.status, answer.body = 302, b""
        answer.headers = {"Location": f"file://{secret}"}

    server.fault = away
    with pytest.raises(CacheError, match="cannot be read"):
        to_the_end(pull(server.url, tmp_path / "copy"))

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
    remote._local.session = session
    with pytest.raises(CacheError, match="from https to http"):
        list(remote.read("manifest.json", 0, 100))


def rewritten(cache: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest was changed by somebody who can compute its checksum."""
    from kd.common.files import canonical_json, digest_of

    shutil.copytree(cache, folder)
    document = json.loads((folder / "manifest.json").read_text())
    document.pop("checksum")
    change(document)
    (folder / "manifest.json").write_text(canonical_json(document | {"checksum": digest_of(document)}))
    return folder


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "..\\escaped", "a//b"])
def test_a_name_that_leaves_the_directory_is_refused_before_anything_is_fetched(
    name: str, cache: Path, tmp_path: Path, serve
):
    def change(document: dict[str, Any]) -> None:
        document["files"][name] = {"bytes": 3, "sha256": "0" * 64}

    server = serve(rewritten(cache, tmp_path / "hostile", change))
    with pytest.raises(CacheDamageError, match="contradicts itself"):
        to_the_end(pull(server.url, tmp_path / "deep" / "copy"))
    assert [path for path in server.gets() if "manifest" not in path and "partial" not in path] == []
    assert not list(tmp_path.rglob("escaped"))


def test_what_cannot_fit_is_refused_before_it_is_fetched(cache: Path, tmp_path: Path, serve, monkeypatch):
    server = serve(cache)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CacheError, match="too small"):
        to_the_end(pull(server.url, tmp_path / "copy"))
    assert not server.gets("gold_ids/c")


def test_a_pull_mends_a_damaged_copy(cache: Path, tmp_path: Path, tree: Tree):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    gold = copy / commits.shard_files(load_manifest(cache).arrays, 0)["gold_ids"]
    gold.write_bytes(gold.read_bytes()[:-1] + b"x")
    (copy / "commits" / "00001.json").unlink()
    (copy / "vocabulary.parquet").write_bytes(b"")
    assert len(findings(copy)) >= 3
    last = to_the_end(pull(str(cache), copy))
    assert tree(copy) == tree(cache)
    assert last.files == 3


def test_another_cache_is_not_overwritten(cache: Path, tmp_path: Path, build_request, run_build, tree: Tree):
    run_build(build_request(tmp_path / "other"))
    before = tree(tmp_path / "other")
    with pytest.raises(CacheMismatchError, match="another cache is there") as error:
        to_the_end(pull(str(cache), tmp_path / "other"))
    assert "differs targets.profile" in error.value.details
    assert tree(tmp_path / "other") == before or STAGING in {p.name for p in (tmp_path / "other").iterdir()}
    with pytest.raises(CacheMismatchError, match="another cache is there"):
        to_the_end(push(cache, str(tmp_path / "other")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(CacheError, match="not empty"):
        to_the_end(pull(str(cache), tmp_path / "mine"))


def test_two_pulls_into_one_directory_are_refused(cache: Path, tmp_path: Path, tree: Tree, serve):
    first = pull(serve(cache).url, tmp_path / "copy")
    next(first)
    with pytest.raises(CacheError, match="another pull"):
        next(pull(str(cache), tmp_path / "copy"))
    to_the_end(first)
    assert tree(tmp_path / "copy") == tree(cache)


def test_a_push_that_was_cut_is_no_cache_to_anybody_and_goes_on(cache: Path, tmp_path: Path, tree: Tree, monkeypatch):
    write, written = FolderRemote.write, []

    def dies(self: FolderRemote, root: Path, names: list[str]) -> None:
        if len(written) == 20:
            raise KeyboardInterrupt
        written.extend(names)
        write(self, root, names)

    monkeypatch.setattr(FolderRemote, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        to_the_end(push(cache, str(tmp_path / "place"), workers=1))
    monkeypatch.setattr(FolderRemote, "write", write)
    with pytest.raises(CacheError, match="no cache"):
        to_the_end(pull(str(tmp_path / "place"), tmp_path / "copy"))
    again = to_the_end(push(cache, str(tmp_path / "place")))
    assert 0 < again.bytes_moved < again.bytes_total
    assert tree(tmp_path / "place") == tree(cache)


def test_a_damaged_or_unfinished_cache_is_not_shared(cache: Path, tmp_path: Path, build_request, run_build):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    gold = copy / commits.shard_files(load_manifest(cache).arrays, 0)["gold_ids"]
    gold.write_bytes(gold.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheDamageError, match="was changed"):
        to_the_end(push(copy, str(tmp_path / "place")))
    assert not (tmp_path / "place" / "manifest.json").exists()
    run_build(build_request(tmp_path / "some", shard=(1, 2)))
    with pytest.raises(CacheError, match="only a whole cache"):
        to_the_end(push(tmp_path / "some", str(tmp_path / "place")))


def test_addresses_that_name_no_place_are_refused(cache: Path, tmp_path: Path, s3: Proxy, hub: HubServer):
    for url, kind, words in (
        ("ftp://host/cache", DataError, "kind of address"),
        ("hf://us/cache", CacheError, "not the address"),
        ("hf://datasets/us/cache/../other", CacheError, "not the address"),
        ("hf://datasets/us/none", CacheError, "refuses"),
        ("s3://", CacheError, "not the address"),
        ("s3://nobody/cache", CacheError, "no cache"),
        ("file://elsewhere/cache", CacheError, "this machine"),
    ):
        with pytest.raises(kind, match=words):
            to_the_end(pull(url, tmp_path / "copy"))
    for url, words in (("https://host/cache", "only be read"), ("s3://nobody/cache", "no such bucket")):
        with pytest.raises(KdError, match=words):
            to_the_end(push(cache, url))


def test_a_cache_on_the_hub_has_a_card(cache: Path, hub: HubServer, tmp_path: Path):
    to_the_end(push(cache, "hf://datasets/us/cache", license="cc-by-4.0", private=True))
    repository = hub.repositories["us/cache"]
    files = repository.files("main")
    assert files is not None
    card = files["README.md"][0].decode()
    assert repository.private
    assert "license: cc-by-4.0" in card.split("---")[1]
    assert "kd train --cache hf://datasets/us/cache" in card
    assert load_manifest(cache).fingerprint in card
    assert repository.messages[-1] == "Add manifest.json"
    mine = b"---\nlicense: mit\n---\nwritten by hand\n"
    repository.commits["f" * 40] = files | {"README.md": (mine, False)}
    repository.branches["main"] = "f" * 40
    to_the_end(push(cache, "hf://datasets/us/cache"))
    files = repository.files("main")
    assert files is not None
    assert files["README.md"][0] == mine


def test_a_cache_with_a_card_beside_it_is_sound_and_without_a_licence_it_says_so(cache: Path, tmp_path: Path):
    from kd.cache_builder.share.dataset_card import dataset_card

    shutil.copytree(cache, tmp_path / "clone")
    card = dataset_card(cache, "hf://datasets/us/cache")
    assert "license: other\nlicense_name: not-stated" in card
    assert "**not stated**" in card.replace("**Not", "**not")
    (tmp_path / "clone" / "README.md").write_text(card)
    (tmp_path / "clone" / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "clone" / ".git").mkdir()
    (tmp_path / "clone" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    assert findings(tmp_path / "clone") == []
    (tmp_path / "clone" / "examples" / "README.md").write_text("not here")
    assert findings(tmp_path / "clone") == ["examples/README.md: a file that no commit knows"]


def test_branches_and_folders_of_the_hub_hold_caches_of_their_own(
    cache: Path, small: Path, hub: HubServer, tmp_path: Path, tree: Tree
):
    to_the_end(push(cache, "hf://datasets/us/both@other"))
    to_the_end(push(small, "hf://datasets/us/both/deep/inside"))
    for url, root in (
        ("both@other", cache),
        ("both/deep/inside", small),
        (f"both@{hub.repositories['us/both'].branches['other']}", cache),
    ):
        to_the_end(pull(f"hf://datasets/us/{url}", tmp_path / url.replace("/", "-")))
        assert tree(tmp_path / url.replace("/", "-")) == tree(root)


def test_a_push_during_a_pull_does_not_mix_two_states(small: Path, hub: HubServer, tmp_path: Path, tree: Tree):
    to_the_end(push(small, "hf://datasets/us/cache"))
    steps = pull("hf://datasets/us/cache", tmp_path / "copy")
    next(steps)
    repository = hub.repositories["us/cache"]
    repository.commits["e" * 40] = {}
    repository.branches["main"] = "e" * 40
    to_the_end(steps)
    assert tree(tmp_path / "copy") == tree(small)


@pytest.mark.slow
def test_a_pull_that_is_killed_again_and_again_ends_with_the_same_bytes(cache: Path, tmp_path: Path, tree: Tree, serve):
    server, copy = serve(cache), tmp_path / "copy"
    server.fault = lambda path, before, answer: setattr(answer, "pause", 0.02)
    program = (
        f"from kd.cache_builder.share.pull import pull\nfor _ in pull({server.url!r}, {str(copy)!r}, workers=2): pass"
    )
    killed = 0
    for moment in (0.2, 0.5, 0.9, 1.4, 2.0, 2.7):  # seconds after the first bytes
        before = server.sent
        process = subprocess.Popen([sys.executable, "-c", program])
        while server.sent == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    server.fault = None
    to_the_end(pull(server.url, copy))
    assert tree(copy) == tree(cache)
