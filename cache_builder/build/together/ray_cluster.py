"""A Ray cluster before builders are started on it: can it be reached, what do its nodes have, do they see the same folder?

Ray itself waits long, or for ever, where one of the answers is no. So each is asked first, within a bounded time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kd.cache_builder.build.request import BuildRequest
from kd.common.errors import CacheError, DataError
from kd.common.extras import needed
from kd.common.files import process_tag, write_error
from kd.models.model_config import stored_dtype

CONNECT_SECONDS = 4.0
"""Time for an address to take a connection."""
JOIN_SECONDS = 25.0
"""Time for a cluster to take a driver; with `CONNECT_SECONDS` less than half a minute."""
LOOK_SECONDS = 90.0
"""Time for every node to look at the output folder. Its first task there starts a process."""
ASK = """
import json, ray
ray.init(address={address!r}, log_to_driver=False, logging_level="ERROR")
print("NODES " + json.dumps(ray.nodes()))
"""


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, and what Ray may give to tasks there."""

    name: str
    id: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.name} has {self.cpus:g} CPUs and {self.gpus:g} GPUs"


def nodes_of(records: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, from what `ray.nodes()` says."""
    alive = [(record, record.get("Resources", {})) for record in records if record["Alive"]]
    return [Node(r["NodeManagerHostname"], r["NodeID"], has.get("CPU", 0.0), has.get("GPU", 0.0)) for r, has in alive]


@cache
def cluster_nodes(address: str) -> tuple[Node, ...]:
    """The nodes of the cluster at an address. Raises CacheError where there is none.

    A process of its own asks: where Ray cannot join a cluster, it ends the whole process, after more than a minute.
    """
    _refuse_silence(address)
    command = [sys.executable, "-c", ASK.format(address=address)]
    late = False
    try:
        asked = subprocess.run(command, capture_output=True, timeout=JOIN_SECONDS, check=False)
        printed, said = asked.stdout.decode(errors="replace"), asked.stderr
    except subprocess.TimeoutExpired as error:
        late, printed, said = True, "", error.stderr or b""
    for line in printed.splitlines():
        if line.startswith("NODES "):
            return tuple(nodes_of(json.loads(line.removeprefix("NODES "))))
    if b"Unauthenticated" in said:
        raise CacheError(
            "the Ray cluster wants a token",
            where=address,
            found="no token, or another one",
            try_="RAY_AUTH_MODE=token, with the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
        )
    if late:
        raise _no_cluster(address, f"no answer within {JOIN_SECONDS:.0f} seconds")
    raise _no_cluster(address, (said.decode(errors="replace").strip().splitlines() or ["no word"])[-1])


def _refuse_silence(address: str) -> None:
    """Raise CacheError where nobody listens at `HOST:PORT`. Other addresses (auto, a folder) are left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, f"nobody listens there: {error}") from error


def _no_cluster(address: str, problem: str) -> CacheError:
    return CacheError(
        "no Ray cluster can be joined",
        where=f"RAY_ADDRESS={address}",
        found=problem,
        try_="ray status there; RAY_ADDRESS=HOST:6379 of the head node; without RAY_ADDRESS, Ray runs on this machine alone",
    )


def for_cluster(request: BuildRequest) -> BuildRequest:
    """The request with the number type that the cluster's nodes will compute in, where that is left to the device.

    The machine that starts the build may have no GPU, and would name another type for the same build.
    """
    address, teacher = os.environ.get("RAY_ADDRESS"), request.teacher
    if address is None or teacher.dtype != "auto" or teacher.device not in ("auto", "cuda") or request.given:
        return request
    with needed("ray", "--engine ray"):
        import ray  # noqa: F401
    if not any(node.gpus for node in cluster_nodes(address)):
        return request
    return replace(request, teacher=replace(teacher, dtype=stored_dtype(teacher)))


def builder_needs(request: BuildRequest, workers: int, nodes: Sequence[Node]) -> dict[str, float]:
    """What Ray must give each builder: `num_cpus` and `num_gpus`. Raises DataError where the nodes have no room for all.

    A builder gets a GPU where the nodes have any, or an equal share of them for a teacher with a device map; else as many
    processors as let all builders run at once.
    """
    device = request.teacher.device
    if device.startswith("cuda:"):
        raise DataError(
            "this names a GPU of one machine", found=f"--device {device} with --engine ray", try_="--device cuda"
        )
    most_gpus = max((int(node.gpus) for node in nodes), default=0)
    if device == "cuda" or (device == "auto" and most_gpus):
        most = most_gpus if request.teacher.placement.spread else min(1, most_gpus)
        for gpus in range(most, 0, -1):
            if room(nodes, 1, gpus) >= workers:
                return {"num_cpus": 1, "num_gpus": gpus}
        raise _no_room(workers, nodes, room(nodes, 1, 1), "a GPU and a CPU each")
    for cpus in range(max((int(node.cpus) for node in nodes), default=0), 0, -1):
        if room(nodes, cpus, 0) >= workers:
            return {"num_cpus": cpus, "num_gpus": 0}
    raise _no_room(workers, nodes, room(nodes, 1, 0), "a CPU each")


def room(nodes: Sequence[Node], cpus: int, gpus: int) -> int:
    """How many builders with so many processors and GPUs the nodes have room for."""
    return sum(int(min(n.cpus // cpus, n.gpus // gpus if gpus else n.cpus // cpus)) for n in nodes)


def _no_room(workers: int, nodes: Sequence[Node], places: int, each: str) -> DataError:
    said = [str(node) for node in nodes]
    return DataError(
        "the cluster has no room for so many builders",
        found=f"--workers {workers}, which need {each}",
        nodes="\n".join([*said[:16], *([f"and {len(said) - 16} more"] if len(said) > 16 else [])]) or "none",
        try_=f"--workers {places}" if places else "--device cpu, or nodes with free processors and GPUs",
    )


def refuse_other_folders(ray: Any, out: Path, nodes: Sequence[Node]) -> None:
    """Raise CacheError where a node does not see the output folder of this machine, or cannot write there.

    This machine writes a file with a random word. Every node reads it and writes one of its own, which this machine reads.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    word, made = os.urandom(8).hex(), not out.exists()
    token, answers = _token(out, "here"), {node.id: _token(out, node.id) for node in nodes}
    try:
        out.mkdir(parents=True, exist_ok=True)
        token.write_text(word, encoding="utf-8")
        look = ray.remote(_look)
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(token, answers[node.id])] = node
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        wrong = [f"{asked[reference].name}: no answer within {LOOK_SECONDS:.0f} seconds" for reference in late]
        for reference in done:
            node = asked[reference]
            fault = _fault(ray, reference, word, answers[node.id])
            wrong += [f"{node.name}: {fault}"] if fault else []
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        for path in (token, *answers.values()):
            path.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # somebody else builds there by now
                out.rmdir()
    if wrong:
        raise CacheError(
            "not every node of the cluster sees the output folder",
            where=out,
            found="\n".join(sorted(wrong)),
            expected="one folder that all nodes and this machine share under this path",
            try_="--out on a shared file system, or --out s3://BUCKET/PATH, which needs none",
        )


def _fault(ray: Any, reference: Any, word: str, answer: Path) -> str | None:
    """What is wrong with a node by its answer, in words; None where it reads and writes the same folder."""
    try:
        read = ray.get(reference)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    if read != word:
        return read if isinstance(read, str) and " " in read else "it reads another file there"
    try:
        return None if answer.read_text(encoding="utf-8") == word else "what it writes there is not what is here"
    except OSError:
        return "it sees the folder, and what it writes there does not appear here"


def _look(token: Path, answer: Path) -> str:
    """Read the word, write it back; returns the word, or a sentence on what failed. Runs on a node."""
    try:
        word = token.read_text(encoding="utf-8")
        answer.write_text(word, encoding="utf-8")
    except FileNotFoundError:
        return "it has no such folder, or another one under this path"
    except OSError as error:
        return f"it cannot use the folder: {error.strerror}"
    return word


def _token(out: Path, name: str) -> Path:
    """A file that is swept up if this process is killed."""
    return out / f".node-{name}.json.{process_tag()}.tmp"
