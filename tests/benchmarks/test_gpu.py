"""The GPU benchmark's code runs, on small shapes and a CPU; its figures are for a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kd.cache_builder.store.targets import band_edges
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings

TAUGHT = ("dense_kl", "dense_uld")


@pytest.fixture
def gpu(load_benchmark):
    return load_benchmark("gpu")


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *options])
    gpu.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])["results"]


def test_every_kind_of_case_runs_and_the_last_line_is_json(gpu, monkeypatch, capsys) -> None:
    results = run(gpu, monkeypatch, capsys, "--cases", "neo,t5-bf16,gpt2,head", "--no-compile")
    assert set(results) == {"neo", "t5-bf16", "gpt2 128", "head"}
    for name in ("neo", "t5-bf16"):
        assert results[name]["tokens"] == 2048
        assert 0 < results[name]["bare_mfu"] < 1
        assert results[name]["ratio"] > 0
        assert results[name]["idle_share left out"] == "no GPU"
    student = results["gpt2 128"]
    assert {f"{n}_ratio" for n in ("kl", "uld", "uld_exact", "ce", "sparse_kl", *TAUGHT)} < set(student)
    for name, library in {"trl_gkd": "trl", "trl_gold": "trl", "liger_ce": "liger_kernel"}.items():
        assert f"{name}_seconds" in student or find_spec(library) is None or not torch.cuda.is_available()
        assert (f"{name}_seconds" in student) != (f"{name} left out" in student)
    assert "aten::mm" in results["head"]["product_float32 left out"]  # there on a GPU alone
    assert results["head"]["uld_kernel_seconds"] > 0


def test_what_cannot_be_run_is_left_out_with_its_reason(gpu, monkeypatch, capsys) -> None:
    found = run(gpu, monkeypatch, capsys, "--cases", "gpt2", "--methods", "plain,kl", "--minutes", "0")["gpt2 128"]
    assert found == {f"{n} left out": "TimeoutError: more than 0 minutes" for n in ("plain", "kl")}

    def fails(*_: object):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(gpu, "load_model", fails)
    monkeypatch.setattr(gpu, "random_model", fails)
    results = run(gpu, monkeypatch, capsys, "--cases", "t5-bf16,gpt2", "--methods", "plain")
    message = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert results == {"t5-bf16": {"left out": message}, "gpt2 128": {"plain left out": message}}


def test_without_a_gpu_it_says_how_to_try_it(gpu, monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main()
    for option, name, known in (("--cases", "neu", "case"), ("--methods", "kll", "method")):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", option, name])
        with pytest.raises(SystemExit, match=f"unknown {known} '{name}'"):
            gpu.main()


def test_busy_seconds_are_the_device_s_and_count_once(gpu) -> None:
    kinds = torch.autograd.DeviceType  # type: ignore[attr-defined]
    spans = [(kinds.CUDA, 0, 4), (kinds.CUDA, 2, 3), (kinds.CUDA, 3, 6), (kinds.CUDA, 8, 9), (kinds.CPU, 0, 100)]
    events = [
        SimpleNamespace(device_type=k, time_range=SimpleNamespace(start=a * 1e6, end=b * 1e6)) for k, a, b in spans
    ]
    assert gpu.busy_seconds(events) == pytest.approx(7.0)


def test_operations_are_two_per_weight_and_token_that_goes_through_it(gpu) -> None:
    model = load_model(ModelRequest("random:demo-t5-student", device="cpu"))
    config = model.config
    attention, forward = 4 * config.d_model * config.num_heads * config.d_kv, 3 * config.d_model * config.d_ff
    encoder = (
        config.num_layers * (attention + forward) + config.num_decoder_layers * attention // 2
    )  # and what is read of it
    decoder = config.num_decoder_layers * (attention + attention // 2 + forward) + config.d_model * config.vocab_size
    assert gpu.flops_of(model, 7, 3) == 2 * (7 * encoder + 3 * decoder)


@pytest.fixture
def case(gpu):
    """A student, and a teacher that is the same."""
    model = load_model(ModelRequest("random:demo-student", device="cpu"))
    return gpu.Case(model, 2048, tuple(band_edges(16, 2048, 16)), model)


def test_methods_compute_what_they_are_called(gpu, case) -> None:
    steps = importlib.import_module("gpu_steps")
    batch = gpu.batch_of("kl", 64, 2048, "cpu", 32)
    plain = steps.METHODS["plain"].make(case)(batch)
    for name in TAUGHT:  # of equal models
        assert float(steps.METHODS[name].make(case)(batch).detach()) == pytest.approx(0, abs=1e-5)
    kept = torch.log_softmax(case.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), 1).gather(
        1, batch["token_ids"]
    )
    alike = batch | {"logprobs": kept.detach()}
    assert float(steps.METHODS["sparse_kl"].make(case)(alike).detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(steps.METHODS["ce"].make(case)(batch), plain)  # replaces the model's forward: last


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on import of inductor
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")  # what is cached is traced again
@pytest.mark.parametrize(("loss", "tail"), [("ce", "none"), ("kl", "ghost"), ("uld", "bands")])
def test_compiled_kernels_give_the_same_gradients_whatever_was_compiled_before(gpu, loss: str, tail: str) -> None:
    """Compiled a second time with another number in it, inductor would reuse the first number: see `heads.Compiled`."""
    heads = importlib.import_module("heads")
    torch.manual_seed(0)
    edges = tuple(band_edges(16, 300, 16))
    data = heads.made_up(16, 300, edges)
    logits = 3 * torch.randn(16, 300)
    torch.compiler.reset()
    for alpha in (0.0,) if loss == "ce" else (1.0, 0.5, 0.75):
        objective = Objective(loss, tail, alpha, settings=GroupSettings(edges=edges, ranking="fast"))
        compiled = heads.Compiled(objective)
        for rows in (slice(0, 16), slice(0, 7)):
            eager, other, targets = logits[rows].clone(), logits[rows].clone(), data[objective.groups][rows]
            sums = objective.gradient_(eager, targets)
            torch.testing.assert_close(compiled.gradient_(other, targets), sums)
            torch.testing.assert_close(other, eager)  # float32; sums over 300 columns in another order
