"""What a cluster cannot do is told at once, with what its nodes have."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest

from kd.cache_builder.build.together import ray_cluster
from kd.cache_builder.build.together.ray_cluster import (
    Node,
    builder_needs,
    cluster_nodes,
    for_cluster,
    nodes_of,
    room,
)
from kd.common.errors import CacheError, DataError
from kd.models.placement.device_maps import Placement

BIG, SMALL, GPUS = Node("big", "0", 64, 0), Node("small", "1", 1, 0), Node("gpus", "2", 16, 4)


def on(request, device: str, **placement):
    return replace(request, teacher=replace(request.teacher, device=device, **placement))


@pytest.fixture
def request_(build_request, tmp_path):
    return build_request(tmp_path / "c")


@pytest.mark.parametrize(
    ("workers", "nodes", "cpus"),
    [
        (1, [SMALL, SMALL], 1),
        (2, [SMALL, SMALL], 1),
        (1, [BIG, SMALL], 64),
        (2, [BIG, SMALL], 32),
        (65, [BIG, SMALL], 1),
    ],
)
def test_builders_on_processors_get_as_many_as_let_all_run_at_once(request_, workers: int, nodes, cpus: int) -> None:
    assert builder_needs(on(request_, "cpu"), workers, nodes) == {"num_cpus": cpus, "num_gpus": 0}
    assert room(nodes, cpus, 0) >= workers
    assert room(nodes, cpus + 1, 0) < workers or cpus == 64


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_are_those_of_the_nodes(request_, device: str) -> None:
    assert builder_needs(on(request_, device), 4, [BIG, GPUS]) == {"num_cpus": 1, "num_gpus": 1}
    spread = on(request_, "auto", placement=Placement.of("auto"))
    assert builder_needs(spread, 1, [BIG, GPUS]) == {"num_cpus": 1, "num_gpus": 4}
    assert builder_needs(spread, 3, [GPUS, GPUS]) == {"num_cpus": 1, "num_gpus": 2}
    assert builder_needs(on(request_, "auto"), 65, [BIG, SMALL])["num_gpus"] == 0


@pytest.mark.parametrize(
    ("device", "workers", "nodes", "advice"),
    [
        ("cpu", 3, [SMALL, SMALL], "--workers 2"),
        ("auto", 5, [BIG, GPUS], "--workers 4"),
        ("cuda", 1, [BIG], "--device cpu, or nodes with free processors and GPUs"),
        ("cpu", 1, [], "--device cpu, or nodes with free processors and GPUs"),
    ],
)
def test_builders_without_room_are_refused_with_what_the_nodes_have(
    request_, device: str, workers: int, nodes, advice: str
) -> None:
    with pytest.raises(DataError, match="no room for so many builders") as caught:
        builder_needs(on(request_, device), workers, nodes)
    assert caught.value.details["try"] == advice
    assert caught.value.details["nodes"] == ("\n".join(map(str, nodes)) or "none")


def test_a_gpu_by_its_number_is_of_one_machine(request_) -> None:
    with pytest.raises(DataError, match="a GPU of one machine"):
        builder_needs(on(request_, "cuda:1"), 1, [GPUS])


def test_dead_nodes_do_not_count() -> None:
    record = {"NodeManagerHostname": "a", "NodeID": "1", "Resources": {"CPU": 2.0}}
    assert nodes_of([record | {"Alive": True}, record | {"Alive": False}]) == [Node("a", "1", 2.0, 0.0)]


def test_the_number_type_is_that_of_the_nodes_device(request_, monkeypatch) -> None:
    request = on(request_, "auto", dtype="auto")
    assert for_cluster(request) == request  # a cluster of this machine
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(ray_cluster, "cluster_nodes", lambda address: [BIG])
    assert for_cluster(request) == request
    monkeypatch.setattr(ray_cluster, "cluster_nodes", lambda address: [BIG, GPUS])
    monkeypatch.setattr(ray_cluster, "stored_dtype", lambda teacher: "bfloat16")
    assert for_cluster(request).teacher.dtype == "bfloat16"
    assert for_cluster(on(request, "cpu")).teacher.dtype == "auto"
    assert for_cluster(on(request, "auto", dtype="float16")).teacher.dtype == "float16"


def test_an_address_where_nobody_listens_is_told_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(CacheError, match="no Ray cluster can be joined") as caught:
        cluster_nodes(f"127.0.0.1:{port}")
    assert time.monotonic() - started < ray_cluster.CONNECT_SECONDS + 1
    assert "nobody listens there" in str(caught.value)


def test_a_listener_that_is_no_cluster_is_not_waited_for_long(monkeypatch) -> None:
    monkeypatch.setattr(ray_cluster, "JOIN_SECONDS", 1.0)
    none = pytest.raises(CacheError, match="no Ray cluster can be joined")
    with socket.create_server(("127.0.0.1", 0)) as server, none as caught:
        cluster_nodes(f"127.0.0.1:{server.getsockname()[1]}")
    assert "no answer within 1 seconds" in str(caught.value)
