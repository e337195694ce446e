"""The GPU benchmark's code runs, on small shapes and a CPU; its figures are for a GPU."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def gpu(load_benchmark):
    return load_benchmark("gpu")


def test_every_kind_of_case_runs_and_the_last_line_is_json(gpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--cases", "neo,t5-bf16,gpt2"])
    gpu.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert set(results) == {"neo", "t5-bf16", "gpt2 128"}
    for name in ("neo", "t5-bf16"):
        assert results[name]["tokens"] == 2048
        assert 0 < results[name]["bare_mfu"] < 1
        assert results[name]["ratio"] > 0
    assert {f"{n}_ratio" for n in ("kl", "uld", "uld_exact", "ce")} < set(results["gpt2 128"])


def test_without_a_gpu_it_says_how_to_try_it(gpu, monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--cases", "neu"])
    with pytest.raises(SystemExit, match="unknown case 'neu'"):
        gpu.main()
