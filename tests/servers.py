"""Real servers on loopback for the tests of sharing: a web server with faults, a proxy with faults, nginx, S3, a hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Answer:
    """What a server is about to send; a fault changes it, or how it is sent."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None
    """Close the connection after so many bytes of the body"""
    pause: float = 0.0
    """Seconds between pieces of 1 KiB"""
    endless: bool = False
    """Go on sending zeros until the other side closes"""


Fault = Callable[[str, int, Answer], None]
"""(path, how often it was asked for before, answer): changes the answer."""


class Server:
    """A threaded HTTP server; `answer` says what, `fault` spoils it, `log` remembers (method, path, range, bytes sent)."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.log: list[tuple[str, str, str | None]] = []
        self.sent = 0
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    while self.rfile.readline().strip():
                        pass
                answer = server.answer(self.command, self.path, dict(self.headers.items()), body)
                server.send(self, answer)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        raise NotImplementedError

    def send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        path = handler.path
        with self._lock:
            self.log.append((handler.command, unquote(path), handler.headers.get("Range")))
            before, self._asked[path] = self._asked[path], self._asked[path] + 1
        if self.fault is not None:
            self.fault(unquote(path), before, answer)
        try:
            handler.send_response(answer.status)
            head = handler.command == "HEAD"
            if not answer.endless:
                answer.headers.setdefault("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            if answer.endless or answer.cut is not None:
                handler.send_header("Connection", "close")
                handler.close_connection = True
            handler.end_headers()
            body = b"" if head else answer.body if answer.cut is None else answer.body[: answer.cut]
            if answer.pause:
                for start in range(0, len(body), 1024):
                    handler.wfile.write(body[start : start + 1024])
                    time.sleep(answer.pause)
            else:
                handler.wfile.write(body)
            self.sent += len(body)
            while answer.endless:
                handler.wfile.write(bytes(2**16))
                self.sent += 2**16
            if answer.cut is not None:
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            handler.close_connection = True

    def gets(self, part: str = "") -> list[str]:
        """Paths that were asked for."""
        return [path for method, path, _ in self.log if method == "GET" and part in path]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def of_range(data: bytes, wanted: str | None, ranges: bool = True) -> Answer:
    """A file, or the range of it that was asked for."""
    if wanted is None or not ranges:
        return Answer(200, {"Accept-Ranges": "bytes" if ranges else "none"}, data)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
    if start >= len(data):
        return Answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
    return Answer(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])


class FileServer(Server):
    """Serves a folder, with ranges or without."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        super().__init__()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        file = self.folder / unquote(path).lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"")
        return of_range(file.read_bytes(), headers.get("Range"), self.ranges)


class Proxy(Server):
    """Passes everything on to another server on loopback, so that faults can be put in between."""

    def __init__(self, upstream: str) -> None:
        self.host = urlsplit(upstream).netloc
        super().__init__()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = HTTPConnection(self.host, timeout=20)
        passed = {k: v for k, v in headers.items() if k not in ("Transfer-Encoding", "Connection", "Content-Length")}
        connection.request(method, path, body, passed | {"Content-Length": str(len(body))})
        response = connection.getresponse()
        skipped = ("transfer-encoding", "connection", "content-length" if method != "HEAD" else "")
        kept = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
        answer = Answer(response.status, kept, response.read())
        connection.close()
        return answer


@contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """nginx over a folder; yields its address. Raises FileNotFoundError where there is no nginx."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        raise FileNotFoundError("nginx")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    (work / "nginx.conf").write_text(
        ("user root;\n" if os.getuid() == 0 else "")
        + f"daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;\n"
        + "events { worker_connections 64; }\nhttp { access_log off; gzip on; gzip_types application/json;\n"
        + "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in kinds)
        + f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    process = subprocess.Popen(
        [program, "-p", str(work), "-e", str(work / "error.log"), "-c", str(work / "nginx.conf")]
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@dataclass
class Repository:
    """Branches of commits; a commit is path -> (bytes, is it a large file?)."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, tuple[bytes, bool]] | None:
        return self.commits.get(self.branches.get(revision, revision))


class HubServer(Server):
    """As much of the hub's interface as its client uses to make, fill, list and read a repository of data or of a model."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        super().__init__()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        parts, query = urlsplit(path), parse_qs(urlsplit(path).query)
        steps = [unquote(s) for s in parts.path.strip("/").split("/")]
        own = f"http://{headers['Host']}"
        match method, steps:
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                made = name not in self.repositories
                self.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
                return reply({"url": f"{own}/datasets/{name}"}, 200 if made else 409)
            case "POST", ["api", "validate-yaml"]:
                front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
                return reply(
                    {"errors": [], "warnings": []}
                    if "license" in front or "library_name" in front
                    else {"errors": [{"message": "license"}]}
                )
            case "PUT", ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return reply({"error": "digest"}, 400)
                self.blobs[oid] = body
                return Answer(200, {}, b"")
            case "GET" | "HEAD", ["blob", oid]:
                return of_range(self.blobs[oid], headers.get("Range"))
            case "POST", [*_, owner, name, "info", "lfs", "objects", "batch"]:
                upload = [
                    {"oid": o["oid"], "size": o["size"]}
                    | ({} if o["oid"] in self.blobs else {"actions": {"upload": {"href": f"{own}/lfs/{o['oid']}"}}})
                    for o in json.loads(body)["objects"]
                ]
                return reply({"transfer": "basic", "objects": upload})
            case "GET", ["api", "datasets"]:
                return reply([self._listed(n) for n in self.repositories if set(query["filter"]) <= set(self._tags(n))])
            case _, ["api", "datasets" | "models", owner, name, *rest]:
                repository = self.repositories.get(f"{owner}/{name}")
                if repository is None:
                    return reply({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
                return self._api(method, repository, f"{owner}/{name}", rest, query, body, path, own)
            case _, ["datasets", owner, name, "resolve", revision, *inside]:
                return self._file(self.repositories[f"{owner}/{name}"], revision, "/".join(inside), headers, own)
        return reply({"error": f"not here: {method} {path}"}, 404)

    def _listed(self, name: str) -> dict[str, object]:
        return {"id": name, "tags": self._tags(name), "downloads": 7}

    def _tags(self, name: str) -> list[str]:
        """Those of the card, as the hub has them."""
        card = (self.repositories[name].files("main") or {}).get("README.md", (b"", False))[0].decode()
        return list(yaml.safe_load(card.split("---")[1]).get("tags", ())) if card else []

    def _api(
        self,
        method: str,
        repository: Repository,
        name: str,
        rest: list[str],
        query: dict[str, list[str]],
        body: bytes,
        path: str,
        own: str,
    ) -> Answer:
        match method, rest:
            case "GET", [] | ["revision", _]:
                revision = rest[1] if rest else "main"
                if repository.files(revision) is None:
                    return reply({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
                return reply(
                    {"id": name, "sha": repository.branches.get(revision, revision), "tags": [], "private": False}
                )
            case "POST", ["branch", branch]:
                made = branch not in repository.branches
                repository.branches.setdefault(branch, repository.branches["main"])
                return reply({}, 200 if made else 409)
            case "GET", ["tree", revision]:
                found = [
                    describe(p, data, large) for p, (data, large) in sorted((repository.files(revision) or {}).items())
                ]
                start = int(query.get("cursor", ["0"])[0])
                base = path.split("?")[0]
                more = {"Link": f'<{own}{base}?recursive=true&cursor={start + 20}>; rel="next"'}
                return reply(found[start : start + 20], 200, more if start + 20 < len(found) else {})
            case "POST", ["preupload", _]:
                files = json.loads(body)["files"]
                return reply(
                    {
                        "files": [
                            {
                                "path": f["path"],
                                "shouldIgnore": False,
                                "uploadMode": "regular" if f["path"].endswith((".json", ".md")) else "lfs",
                            }
                            for f in files
                        ]
                    }
                )
            case "POST", ["commit", branch]:
                lines = [json.loads(line) for line in body.splitlines()]
                files = dict(repository.files(branch) or {})
                for line in lines:
                    value = line["value"]
                    if line["key"] == "header":
                        repository.messages.append(value["summary"])
                    elif line["key"] == "file":
                        files[value["path"]] = (base64.b64decode(value["content"]), False)
                    elif value["oid"] not in self.blobs:
                        return reply({"error": "no such object"}, 400)
                    else:
                        files[value["path"]] = (self.blobs[value["oid"]], True)
                oid = f"{len(repository.commits):040x}"
                repository.commits[oid] = files
                repository.branches[branch] = oid
                return reply({"commitUrl": f"{own}/datasets/{name}/commit/{oid}", "commitOid": oid})
        return reply({"error": f"not here: {method} {rest}"}, 404)

    def _file(self, repository: Repository, revision: str, name: str, headers: dict[str, str], own: str) -> Answer:
        entry = (repository.files(revision) or {}).get(name)
        if entry is None:
            return reply({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, large = entry
        if large:  # as the hub does: to another address, which knows nothing of tokens
            return Answer(302, {"Location": f"{own}/blob/{hashlib.sha256(data).hexdigest()}"}, b"")
        return of_range(data, headers.get("Range"))


def describe(path: str, data: bytes, large: bool) -> dict[str, Any]:
    """A file as the hub's listing shows it."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data), "oid": oid} | (lfs if large else {})


def reply(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """A JSON answer."""
    return Answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(document).encode())


class RawServer:
    """A server on a socket: `talk(connection, number)` says what happens to each connection, after its request was read."""

    def __init__(self, talk: Callable[[socket.socket, int], None], host: str = "127.0.0.1") -> None:
        self._socket = socket.create_server((host, 0))
        self.talk, self.connections = talk, 0
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self.closed = False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection, self.connections - 1), daemon=True).start()

    def _talk(self, connection: socket.socket, number: int) -> None:
        with connection:
            try:
                connection.recv(2**16)
                self.talk(connection, number)
            except OSError:
                return

    def close(self) -> None:
        self.closed = True
        self._socket.close()
