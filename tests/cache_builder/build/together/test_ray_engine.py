"""Builders on a Ray cluster of two nodes, started here: killed, out of room, and with folders that are not the same."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.together.engines import build_together
from kd.cache_builder.build.together.ray_cluster import cluster_nodes
from kd.cache_builder.store.writers.claims import all_claims
from kd.common.errors import CacheError, DataError

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # Ray begins with a token by itself where it finds one of another cluster
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def node(
    options: list[str], temp: Path, *, hidden: Path | None = None, environment: dict[str, str] = NO_TOKEN
) -> subprocess.Popen[bytes]:
    """A node of a cluster, with one processor. It sees an empty folder in the place of `hidden`."""
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "start", *options, "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats", "--block"]
    if hidden is not None:
        script = f'mount -t tmpfs none "{hidden}" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
    env = os.environ | {"RAY_TMPDIR": "/tmp", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    with (temp / f"node-{secrets.token_hex(4)}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.terminate()  # `ray start --block` ends what it has started
    for process in processes:
        process.wait(60)


@dataclass
class TwoNodes:
    address: str
    hidden: Path
    """A folder of this machine that the second node does not see."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a node with other folders needs a mount namespace (root, unshare)")
    temp, port = tmp_path_factory.mktemp("ray"), free_port()
    hidden = temp / "hidden"
    hidden.mkdir()
    address = f"127.0.0.1:{port}"
    processes = [node(["--head", f"--port={port}", "--include-dashboard=false"], temp)]
    try:
        wait_for(address, 1)
        processes.append(node([f"--address={address}"], temp, hidden=hidden))
        wait_for(address, 2)
        yield TwoNodes(address, hidden)
    finally:
        end(processes)


def wait_for(address: str, nodes: int) -> None:
    deadline, seen = time.monotonic() + 120, "nothing"
    while time.monotonic() < deadline:
        cluster_nodes.cache_clear()
        try:
            found = cluster_nodes(address)
        except CacheError as error:
            seen = str(error)
        else:
            if len(found) == nodes:
                return
            seen = str(found)
        time.sleep(1)
    raise AssertionError(f"the cluster did not come up: {seen}")


@pytest.fixture
def at(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


def test_a_builder_killed_on_a_node_is_started_again_and_the_bytes_are_those_of_one(
    at: TwoNodes, tmp_path: Path, build_request, run_build, tree
) -> None:
    out, killed, said = tmp_path / "c", list[int](), list[str]()
    steps = []
    for step in build_together(plan_build(build_request(out)), workers=2, engine="ray", say=said.append):
        steps.append(step)
        for claim in all_claims(out):
            if not killed and claim.void is None:
                killed.append(int(claim.builder.split()[1]))
                os.kill(killed[0], signal.SIGKILL)
    assert len(killed) == 1
    assert (steps[-1].complete, steps[-1].restarted) == (True, 1)
    assert "was lost at shard" in said[0]
    run_build(build_request(tmp_path / "one"))
    assert tree(out) == tree(tmp_path / "one")


def test_more_builders_than_the_nodes_have_room_for_are_refused(at: TwoNodes, tmp_path: Path, build_request) -> None:
    with pytest.raises(DataError, match="no room for so many builders") as caught:
        list(build_together(plan_build(build_request(tmp_path / "c")), workers=3, engine="ray"))
    assert str(caught.value.details["nodes"]).count("has 1 CPUs and 0 GPUs") == 2
    assert caught.value.details["try"] == "--workers 2"
    assert not (tmp_path / "c").exists()


def test_a_node_that_does_not_see_the_output_is_named(at: TwoNodes, build_request) -> None:
    with pytest.raises(CacheError, match="not every node of the cluster sees the output folder") as caught:
        list(build_together(plan_build(build_request(at.hidden / "c")), workers=1, engine="ray"))
    assert (
        caught.value.details["found"]
        == f"{socket.gethostname()}: it has no such folder, or another one under this path"
    )
    assert not (at.hidden / "c").exists()


def test_a_cluster_that_wants_a_token_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    head = node(["--head", f"--port={port}", "--include-dashboard=false"], tmp_path, environment=TOKEN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in TOKEN.items():
                patch.setenv(name, value)
            wait_for(f"127.0.0.1:{port}", 1)
        cluster_nodes.cache_clear()
        with pytest.raises(CacheError, match="the Ray cluster wants a token"):
            cluster_nodes(f"127.0.0.1:{port}")
    finally:
        end([head])
