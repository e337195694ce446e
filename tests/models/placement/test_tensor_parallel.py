"""Two processes that hold one model build the cache that one process builds, but for the rounding of sums."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError, KdError
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement
from kd.models.placement.tensor_parallel import VARIABLES, group_for, tensor_parallel_group

TP_ERROR = 1e-5
"""Nats between one process and two in float32: partial sums of 64 and 128 numbers, added in another order (1.4e-6 measured)."""


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def llama(request, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder)
    return folder


def build(out: Path, model: Path, data: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`kd cache build` in one process, or in several under torchrun."""
    command = [sys.executable, "-m", "kd.cli"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "kd.cli"]
    given = ["--teacher", model, "--data", data, "--seq-len", "32", "--top-k", "8", "--shard-rows", "128", "--json"]
    command += [
        "cache",
        "build",
        *map(str, given),
        "--logprob-codec",
        "float32",
        "--no-reuse",
        "--out",
        str(out),
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def require_equal(ours: Path, theirs: Path) -> None:
    one, two = CacheReader(ours), CacheReader(theirs)
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert len(one) == len(two)
    for number in range(len(one)):
        a, b = one[number].targets, two[number].targets
        np.testing.assert_array_equal(a.gold_ids, b.gold_ids)
        assert a.logprobs is not None
        assert b.logprobs is not None
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=TP_ERROR)
        np.testing.assert_allclose(a.log_z, b.log_z, rtol=0, atol=TP_ERROR)
        assert (a.token_ids != b.token_ids).mean() < 0.01  # neighbours closer than the error may change places


def test_two_processes_build_the_cache_of_one(llama: Path, text_file: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "one", llama, text_file).returncode == 0
    done = build(tmp_path / "two", llama, text_file, "--tensor-parallel", "2", processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"]  # one process of the two has written to stdout
    require_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_groups_share_the_shards_and_answers_are_those_of_one_process(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """`--workers` counts groups; every shard is written once. Greedy answers depend on no rounding here."""
    build(tmp_path / "one", llama, text_file)
    done = build(tmp_path / "four", llama, text_file, "--tensor-parallel", "2", "--workers", "2", processes=4)
    assert done.returncode == 0, done.stderr
    require_equal(tmp_path / "one", tmp_path / "four")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "{word}", "target": ""}}\n' for word in ("The fox", "A ship went", "It rained"))
    )
    answers = ("--targets", "teacher", "--target-len", "9", "--overlong", "truncate")
    build(tmp_path / "alone", llama, prompts, *answers)
    done = build(tmp_path / "both", llama, prompts, *answers, "--tensor-parallel", "2", processes=2)
    assert done.returncode == 0, done.stderr
    require_equal(tmp_path / "alone", tmp_path / "both")


SCRIPT = """
import sys
import kd
model, data, out = sys.argv[1:]
given = {"seq_len": 32, "top_k": 8, "shard_rows": 128, "logprob_codec": "float32", "reuse": False}
cache = kd.build_cache(model, data=data, out=out, tensor_parallel=2, workers=2, **given)
print(len(cache))
"""


@pytest.mark.slow
def test_a_script_under_torchrun_builds_the_same_and_goes_on_in_every_process(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    build(tmp_path / "one", llama, text_file)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command += [str(path) for path in (tmp_path / "script.py", llama, text_file, tmp_path / "four")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    require_equal(tmp_path / "one", tmp_path / "four")
    assert done.stdout.split() == [str(len(CacheReader(tmp_path / "four")))] * 4


def test_without_torchrun_the_error_holds_the_command(
    monkeypatch, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="needs processes that torchrun starts") as caught, tensor_parallel_group(4, 2):
        pass
    assert (
        "torchrun --nproc-per-node 8 --no-python kd cache build --tensor-parallel 4 --workers 2"
        in caught.value.details["try"]
    )


def test_another_number_of_processes_is_refused(monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "3")
    with pytest.raises(DataError, match="another number of processes"), tensor_parallel_group(2, 2):
        pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Placement.of("auto", tensor_parallel=2), "exclude each other"),
        (lambda: ModelRequest("demo", device="cpu", placement=Placement(tensor_parallel=2)), "--device cpu"),
        (lambda: ModelRequest("random:gpt2", placement=Placement(tensor_parallel=2)), "random weights"),
        (lambda: ModelRequest("demo", load_in_8bit=True, placement=Placement(tensor_parallel=2)), "--load-in-8bit"),
        (lambda: load_model(ModelRequest("demo", placement=Placement(tensor_parallel=2))), "no tensor-parallel group"),
    ],
)
def test_what_a_group_cannot_load_is_refused(make, words: str) -> None:
    with pytest.raises(KdError) as caught:
        make()
    assert words in str(caught.value)


def test_a_process_of_no_group_is_told_so() -> None:
    with pytest.raises(DataError, match="no tensor-parallel group"):
        group_for(2)
