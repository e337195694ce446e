"""The files for clusters: their syntax, every `kd` option in them, and the ones that can be run on one machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from safetensors.torch import load_file

from kd.cli import cli

FOLDER = Path(__file__).parents[2] / "recipes" / "cluster"
SCRIPTS = sorted(p for p in FOLDER.iterdir() if p.suffix in (".sh", ".sbatch"))
BIN = Path(sys.executable).parent


def kd_words(path: Path) -> Iterator[list[str]]:
    """The words of every `kd` command in a file, comments too: from `kd` or `-m kd.cli` to the end of the line."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.name == "build-job.yaml":
        (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
        yield [*container["command"][1:], *container["args"]]
    for line in text.splitlines():
        for found in re.finditer(r"(?:^|\s)(?:-m kd\.cli|kd)\s+((?:cache|train)\b.*)", line):
            yield [word for word in found[1].split() if not word.startswith(("$", '"$'))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_no_syntax_error(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda p: p.name)
def test_every_option_of_kd_exists(path: Path) -> None:
    commands = list(kd_words(path))
    assert commands or path.name == "train-hosts.sbatch"  # which runs train-host.sh
    for words in commands:
        command: click.Command = cli
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None
            command = found
        known = {spelling for parameter in command.params for spelling in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_the_job_has_what_kubernetes_asks_of_an_indexed_one() -> None:
    job = yaml.safe_load((FOLDER / "build-job.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] >= spec["parallelism"] > 1
    assert spec["backoffLimitPerIndex"] > 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what backoffLimitPerIndex asks for
    (container,) = pod["containers"]
    assert {"name", "image", "command", "args", "resources"} <= container.keys()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert all(isinstance(word, str) for word in container["args"])


@pytest.mark.parametrize("name", ["accelerate-two-hosts.yaml", "fsdp2.yaml"])
def test_accelerate_reads_its_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / name))  # refuses a key that it does not know
    assert config.num_processes == 8 * config.num_machines
    assert name != "fsdp2.yaml" or config.fsdp_config["fsdp_version"] == 2


def environment(**words: object) -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | {name: str(word) for name, word in words.items()}


@pytest.mark.slow
def test_two_tasks_of_the_array_build_one_cache(text_file: Path, model_dir: Path, tmp_path: Path, tree) -> None:
    options = "--seq-len 32 --top-k 8 --shard-rows 128 --device cpu --no-reuse"
    words = {"TEACHER": model_dir, "DATA": text_file, "BUILD_OPTIONS": options}
    tasks = [
        subprocess.Popen(
            ["bash", str(FOLDER / "build-array.sbatch")],
            env=environment(**words, OUT=tmp_path / "two", SLURM_ARRAY_TASK_ID=task),
        )
        for task in range(2)
    ]
    assert [task.wait(300) for task in tasks] == [0, 0]
    script = ["bash", str(FOLDER / "build-array.sbatch")]
    subprocess.run(script, env=environment(**words, OUT=tmp_path / "one"), check=True)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them; the first has the address 10.77.0.1."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = f"kd-{os.getpid()}-0", f"kd-{os.getpid()}-1"
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}")
    for number, name in enumerate(names):
        commands.append(f"-n {name} addr add 10.77.0.{number + 1}/24 dev v{number}")
        commands += [f"-n {name} link set {device} up" for device in (f"v{number}", "lo")]
    try:
        for command in commands:
            subprocess.run(["ip", *shlex.split(command)], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.mark.slow
def test_two_hosts_train_the_weights_of_one(two_hosts, demo_cache: Path, tmp_path: Path) -> None:
    options = "--max-steps 3 --batch-size 2"

    def train(hosts: int, processes: int, out: Path) -> None:
        words = {"HEAD": "10.77.0.1:29511", "HOSTS": hosts, "PROCESSES": processes, "OUT": out}
        words |= {"CACHE": demo_cache, "STUDENT": "demo", "TRAIN_OPTIONS": options}
        running = [
            subprocess.Popen(
                ["ip", "netns", "exec", two_hosts[host], "bash", str(FOLDER / "train-host.sh")],
                env=environment(**words, HOST=host, GLOO_SOCKET_IFNAME=f"v{host}", CUDA_VISIBLE_DEVICES=""),
            )
            for host in range(hosts)
        ]
        assert [process.wait(400) for process in running] == [0] * hosts

    train(2, 1, tmp_path / "two")
    train(1, 2, tmp_path / "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_fsdp_that_does_not_happen_stops_the_training(demo_cache: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text(encoding="utf-8"))
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(config))
    launch = [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        str(tmp_path / "cpu.yaml"),
        "--main_process_port",
        "29512",
    ]
    command = ["-m", "kd.cli", "train", "--cache", str(demo_cache), "--student", "demo", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*launch, *command, "--max-steps", "1"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "accelerate does not share the model as FSDP would" in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
