"""The real vLLM: its server, and its `LLM` in the process of a build, against the same model in transformers.

    KD_VLLM=~/vllm/bin/vllm pytest -m slow tests/cache_builder/served/test_real_vllm.py

vLLM pins its own torch, so it lives in an environment of its own (docs/how-to/served-teacher.md). Starting it takes a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import TeacherError
from kd.common.progress import final
from kd.common.settings import make

VLLM = os.environ.get("KD_VLLM") or shutil.which("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="KD_VLLM names no vllm command")]

ON_A_CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
START_SECONDS = 600
CLOSE = 1e-4
"""Nats between vLLM's float32 and transformers': 1.2e-5 was measured at 50,257 ids; sums of 256 tokens add to it."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A Llama of two layers whose head dimension vLLM's CPU attention knows, with peaked predictions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(tokenizer_dir, tmp_path_factory.mktemp("llama"), dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


class Vllm:
    """A server that can be killed and started again at the same address."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
        command = [
            str(VLLM),
            "serve",
            str(self.folder),
            *options,
            "--max-logprobs",
            "64",
            "--served-model-name",
            "tiny",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ON_A_CPU
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=2):
                return
            time.sleep(1)
        raise AssertionError(f"vLLM did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own
        self.process.wait()


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    running = Vllm(llama, tmp_path_factory.mktemp("vllm") / "log")
    running.start()
    yield running
    running.kill()


@pytest.fixture
def settings(llama: Path, text_file: Path, tmp_path: Path) -> Callable[..., BuildSettings]:
    def of(out: str, **more: Any) -> BuildSettings:
        base = {"teacher": str(llama), "spec": str(text_file), "seq_len": 64, "top_k": 16, "shard_rows": 256}
        fixed = {"reuse": False, "device": "cpu", "logprob_codec": "float32", "out": str(tmp_path / out)}
        return make(BuildSettings, base | fixed | more)

    return of


def every(path: Path) -> dict[str, np.ndarray]:
    reader = CacheReader(path)
    targets = [reader[i].targets for i in range(len(reader))]
    names = ("gold_ids", "token_ids", "logprobs", "tail_mass", "gold_logprob", "gold_rank", "byte_end")
    return {name: np.concatenate([getattr(t, name) for t in targets]) for name in names}


def compare(ours: Path, theirs: Path) -> None:
    """The same rows, but for tokens that are as probable as each other."""
    a, b = every(ours), every(theirs)
    for name in ("gold_ids", "byte_end"):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=CLOSE)
    np.testing.assert_allclose(a["tail_mass"], b["tail_mass"], atol=CLOSE)
    np.testing.assert_allclose(a["gold_logprob"], b["gold_logprob"], atol=2e-2)  # float16
    rows, places = np.nonzero(a["token_ids"] != b["token_ids"])
    beside = np.clip(places + 1, 0, a["logprobs"].shape[1] - 1), np.clip(places - 1, 0, None)
    gaps = [np.abs(b["logprobs"][rows, places] - b["logprobs"][rows, other]) for other in beside]
    assert len(rows) < 0.01 * a["token_ids"].size
    # the last place may be shared with a token beyond the k, which is not stored
    inside = places < a["logprobs"].shape[1] - 1
    assert (np.minimum(*[np.where(gap == 0, np.inf, gap) for gap in gaps])[inside] < CLOSE).all()
    assert (a["gold_rank"] != b["gold_rank"]).mean() < 0.01
    assert final(verify(ours)) == ()


def test_its_rows_are_those_of_transformers(server: Vllm, settings, tmp_path: Path) -> None:
    assert build_of(settings("served", teacher_url=server.url)).complete
    build_of(settings("loaded", temperatures=(1.0,)))
    compare(tmp_path / "served", tmp_path / "loaded")


def build_and_kill(chosen: BuildSettings, server: Vllm) -> None:
    """Build, and kill the server when the first shard is committed."""

    def killing(stage: str, steps: Iterator[Any]) -> Any:
        last = None
        for last in steps:
            if getattr(last, "shards_done", 0) and server.process is not None and server.process.poll() is None:
                server.kill()
        return last

    build_of(chosen, watch=killing)


def test_killed_in_the_middle_it_is_started_again_and_nothing_differs(server: Vllm, settings, tmp_path: Path) -> None:
    small = {
        "teacher_url": server.url,
        "shard_rows": 64,
    }  # a shard per example: most are left when the first is written
    build_of(settings("undisturbed", **small))
    with pytest.raises(TeacherError, match="does not answer"):
        build_and_kill(settings("cut", tokens_in_flight=64, patience=3.0, **small), server)
    assert 0 < len(commits.committed(tmp_path / "cut", 100)) < len(load_manifest(tmp_path / "cut").shards)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    server.start()
    assert build_of(settings("cut", **small)).complete
    ours, theirs = every(tmp_path / "cut"), every(tmp_path / "undisturbed")
    for name in ("gold_ids", "byte_end"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    # which sequences share a batch depends on when they arrive, and a sum's last bits on the batch: values, not bytes
    np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=CLOSE)


def test_it_writes_the_answers_that_transformers_writes(server: Vllm, settings, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The fox"}\n{"prompt": "It rained"}\n{"prompt": "There were seven"}\n')
    asked = {"spec": str(prompts), "columns": {"prompt": "prompt"}, "target_source": "teacher", "seq_len": 60}
    asked |= {"target_len": 12, "overlong": "truncate"}
    build_of(settings("served", teacher_url=server.url, **asked))
    build_of(settings("loaded", temperatures=(1.0,), **asked))
    ours, theirs = (CacheReader(tmp_path / name) for name in ("served", "loaded"))
    assert [ours[i].target for i in range(len(ours))] == [theirs[i].target for i in range(len(theirs))]
    first, again = (
        build_of(settings(f"drawn-{n}", teacher_url=server.url, sample_temperature=1.0, seed=3, **asked))
        for n in (1, 2)
    )
    assert first.complete
    assert again.complete
    drawn = [[r[i].target for i in range(len(r))] for r in (CacheReader(tmp_path / f"drawn-{n}") for n in (1, 2))]
    assert drawn[0] == drawn[1]


def test_in_the_process_of_the_build_it_gives_the_same_rows(llama: Path, settings, text_file, tmp_path: Path) -> None:
    python = Path(str(VLLM)).with_name("python")
    house = Path(__file__).parents[3] / ".typing"
    words = [
        "--teacher",
        str(llama),
        "--data",
        str(text_file),
        "--seq-len",
        "64",
        "--top-k",
        "16",
        "--shard-rows",
        "256",
    ]
    words += ["--no-reuse", "--device", "cpu", "--logprob-codec", "float32", "--out", str(tmp_path / "inside")]
    environment = os.environ | ON_A_CPU | {"PYTHONPATH": str(house), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(python), "-m", "kd.cli", "cache", "build", "--backend", "vllm", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    if "MissingPackageError" in done.stderr or "No module named" in done.stderr:
        pytest.skip(f"kd does not run beside that vLLM: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    build_of(settings("loaded", temperatures=(1.0,)))
    compare(tmp_path / "inside", tmp_path / "loaded")
    identity = CacheReader(tmp_path / "inside").manifest.identity["teacher"]
    assert identity["engine"] == "vllm"
    assert list(identity["weights"]) == ["model.safetensors"]
