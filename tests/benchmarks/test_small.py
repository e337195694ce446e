"""The benchmarks run, at sizes of a second, and what is law in their tables holds; no test looks at a time.

All in this process: `bench.py` gives each case one of its own, which would import torch again.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from kd.data.sources import load_corpus
from kd.student_trainer.losses.loss_registry import LOSSES


@pytest.fixture
def printed(load_benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`printed(name, arguments)`: the lines that the command prints."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        load_benchmark(name).main()
        return capsys.readouterr().out.splitlines()

    return run


def numbers(line: str) -> list[float]:
    """Those that stand alone."""
    return [float(x.replace(",", "")) for x in re.findall(r"(?<![\w.^/-])-?[\d,]*\.?\d+(?:e[+-]\d+)?(?![\w.^/])", line)]


def cells(line: str) -> list[str]:
    return [c.strip() for c in line.strip("|").split("|")]


def test_heads_compares_every_loss_with_and_without_its_kernel(printed) -> None:
    lines = printed("heads", "--rows", "8", "--width", "8", "--vocabulary", "200", "--chunk", "4", "--repeats", "1")
    plain, *others = lines
    assert numbers(plain)[1] == 1.0
    cases = [line[:12].strip() for line in others]
    assert {name.split(" ")[0] for name in cases} == {*LOSSES}
    assert all(len(numbers(line[12:])) == 6 for line in others)


def test_chunks_has_a_line_for_each_side(printed) -> None:
    lines = printed("chunks", "--rows", "512", "--width", "8", "--vocabulary", "300", "--repeats", "1")
    assert {side: len(rest.split(",")) for side, _, rest in (line.partition(":") for line in lines)} == {
        "teacher": 7,
        "head": 12,
        "select": 6,
        "top-k": 2,
        "student": 6,
    }


def test_uld_is_off_by_less_the_more_bands_there_are(printed, monkeypatch: pytest.MonkeyPatch, load_benchmark) -> None:
    monkeypatch.setattr(load_benchmark("uld"), "SPLITS", ((16, 0), (16, 8), (16, 16)))
    lines = printed("uld", "--student", "random:demo-student", "--positions", "32")
    assert lines[0] == "32 positions, vocabulary 2048; per cent"
    tables = [line.split() for line in lines if line.startswith("  k=16")]
    assert len(tables) == 2 * 3 * 4  # temperatures, splits, codecs
    for codec in ("linear8", "graded", "graded-fine", "float16"):
        values = [[float(x) for x in row[4:]] for row in tables if row[3] == codec][:3]
        for column in (0, 1, 2, 5, 6, 7):  # value, rows, logits: exact and fast
            without, eight, sixteen = (row[column] for row in values)
            assert without > eight > sixteen > 0


def test_tails_at_temperature_one_the_rule_is_the_exact_normaliser(printed) -> None:
    lines = printed("tails", "--student", "random:demo-student", "--positions", "128")
    assert lines[0] == "128 positions, vocabulary 2048; RMS over positions | sum over the batch"
    figures = {line[:24].strip(): numbers(line[24:].replace("|", " ").replace("/", " ")) for line in lines[2:]}
    ghost, rule, cut = (figures[n] for n in ("ghost, exact log Z", "rest^(1/T)", "renormalised"))
    assert ghost[:4] == rule[:4]  # T=1: rest^(1/1) is the rest
    assert all(a < b for a, b in zip(ghost[4::2], rule[4::2], strict=True))  # RMS at T=2 and 4
    assert all(a < b for a, b in zip(ghost[::2], cut[::2], strict=True))
    true, at_rule = figures["tail mass true / rule"][::2], figures["tail mass true / rule"][1::2]
    assert true[:2] == at_rule[:2]


def test_verify_reads_whole_caches_and_refuses_damaged_ones(printed, cache: Path, tmp_path: Path) -> None:
    import shutil

    lines = printed("verify", str(cache), "--repeats", "1")
    assert [line[:20].strip() for line in lines[1:]] == ["read", "sha256", "verify --checksums", "verify"]
    assert all(min(numbers(line[20:])) > 0 for line in lines[1:])
    shutil.copytree(cache, tmp_path / "damaged")
    victim = next((tmp_path / "damaged" / "examples").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="damaged"):
        printed("verify", str(tmp_path / "damaged"), "--repeats", "1")


def test_readers_all_read_the_same_values(printed, cache: Path) -> None:
    lines = printed("readers", str(cache), "--repeats", "1")
    assert {"kd", "tensorstore", "zarr-python"} <= {line.split()[0] for line in lines[1:]}
    assert all(min(numbers(line[14:])) > 0 for line in lines[1:])


def test_packing_leaves_less_padding_than_batches_by_length(printed, t5_cache: Path) -> None:
    lines = printed("packing", "--cache", str(t5_cache), "--seq-len", "112", "--batches", "1")
    rows = [line.split() for line in lines[1:]]
    assert [" ".join(row[:-4]) for row in rows] == [
        f"random:{student} {way}" for student in ("demo-t5-student", "demo-student") for way in ("plain", "packed 112")
    ]
    for plain, packed in (rows[:2], rows[2:]):
        assert plain[-1] == "1.00"
        assert float(packed[-3]) < float(plain[-3])


@pytest.fixture(scope="session")
def t5_cache(tmp_path_factory: pytest.TempPathFactory, run_build) -> Path:
    """Two dozen examples of the made-up mixture, by the embedded encoder-decoder."""
    from kd.cache_builder.build.request import BuildRequest
    from kd.cache_builder.store.targets import TargetConfig
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.models.model_request import ModelRequest

    out = tmp_path_factory.mktemp("caches") / "t5"
    run_build(
        BuildRequest(
            out,
            ModelRequest("demo-t5", device="cpu"),
            load_corpus("mini", limit=24),
            BlockConfig(256),
            TargetConfig.of_profile("kl"),
        )
    )
    return out


def test_the_parts_of_a_cache_in_sizes_make_up_its_whole(
    printed, load_benchmark, text_file: Path, model_dir: Path
) -> None:
    lines = printed("sizes", "--teacher", str(model_dir), "--data", str(text_file), "--seq-len", "32")
    rows = [cells(line) for line in lines if re.match(r"\| (kl|compact|uld|sampled)", line)]
    caches = load_benchmark("sizes").CACHES
    assert [row[0] for row in rows] == [f"{profile}, {codec}" if codec else profile for profile, codec in caches]
    for row in rows:
        *parts, whole = (float(x.strip("*")) for x in row[1:7])
        assert sum(parts) == pytest.approx(whole, abs=0.3)  # six figures rounded to 0.1
        assert min(parts[2:]) > 0
        assert float(row[8].replace(",", "")) >= 0
    by_name = {row[0]: float(row[7]) for row in rows[:-1]}
    assert by_name["kl, float32"] <= by_name["kl, float16"] < by_name["kl, linear8"]  # nats that the heads are off by
    assert rows[-1][7] == ""  # draws have no head


def test_a_teacher_for_sizes_learns(printed, load_benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kd.models.loading import load_model
    from kd.models.model_request import ModelRequest

    monkeypatch.setattr(load_benchmark("train_teacher"), "FREQUENT", 256)
    monkeypatch.setattr(load_benchmark("train_teacher"), "EXACT", 0.5)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(e.target for e in load_corpus("demo:heldout", limit=6).examples), encoding="utf-8")
    embedded = Path(__file__).parents[2] / "models" / "embedded"
    lines = printed(
        "train_teacher",
        "--tokenizer",
        str(embedded),
        "--data",
        str(text),
        "--out",
        str(tmp_path / "teacher"),
        "--steps",
        "60",
        "--width",
        "32",
        "--layers",
        "1",
    )
    assert numbers(lines[-1])[-1] < math.log(2048)  # nats per token of guessing
    assert load_model(ModelRequest(str(tmp_path / "teacher"), device="cpu")).config.vocab_size == 2048


def test_a_teachers_steps_have_the_gradient_of_cross_entropy(load_benchmark, model_dir: Path) -> None:
    """Both in bfloat16, which has 8 bits of significand; a tensor's norm averages over them."""
    from transformers import AutoModelForCausalLM

    step_loss = load_benchmark("train_teacher").step_loss
    model, twin = (AutoModelForCausalLM.from_pretrained(model_dir).train() for _ in range(2))
    batch = torch.randint(400, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = twin(batch, labels=batch).loss
    loss.backward()
    assert step_loss(model, batch, None) == pytest.approx(loss.item(), rel=0.01)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.03 * theirs.grad.norm()


def test_eval_speed_has_the_log_probabilities_of_lm_eval(
    printed, load_benchmark, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_benchmark("eval_speed")
    monkeypatch.setattr(module, "BATCH_SIZES", (4,))
    monkeypatch.setattr(module.logging, "disable", lambda level: None)  # would last
    lines = printed("eval_speed", "--shared", str(shared), "--rows", "2", "--repeats", "1", "--models", "stories260K")
    assert [line.split()[:2] for line in lines[1:]] == [["stories260K", "hellaswag"], ["stories260K", "boolq"]]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines[1:])  # nats, float32


TINY = {"VOCABULARY": 2048, "SEQ_LEN": 64, "BATCH": 2, "T5": "random:demo-t5-student"}


def test_bench_has_a_line_for_every_case(
    load_benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load_benchmark("bench")
    for name, value in TINY.items():
        monkeypatch.setattr(bench, name, value)
    shape_config = bench.shape_config

    def tiny(name: str) -> object:
        config = shape_config(name)
        config.bos_token_id = config.eos_token_id = 0
        config.vocab_size, config.n_embd, config.n_layer, config.n_head = 2048, 16, 1, 2
        return config

    monkeypatch.setattr(bench, "shape_config", tiny)
    monkeypatch.setattr(
        bench, "corpus", lambda tokens: load_corpus("demo:heldout", limit=2)
    )  # `demo` takes seconds to gather
    bench.make_model(tmp_path / "model", "small")
    for profile, folder in (("kl", "cache"), ("uld", "cache-uld")):
        assert list(bench.build_cache(tmp_path, tmp_path / folder, 256, profile=profile)[1])
    bench.make_read_cache(tmp_path)
    found = {name: [case(tmp_path, 256)] for name, case in bench.CASES.items()}
    for name, (row,) in found.items():
        assert row["tokens_per_second"] > 0, name
        assert row["tokens_per_cpu_second"] > 0, name
        json.dumps(row)  # what the child prints
        row["peak_mb"] = 1.0  # at this size there may be none above the model, and ratios are of it
    capsys.readouterr()
    bench.report(found, tmp_path / "cache")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(bench.CASES) + 1]] == [*bench.BASES, "read"]
    assert lines[1].split()[2] == "1.00"
    assert any(line.startswith("cache of random weights") for line in lines)


def test_a_checkpoint_is_written_and_sealed_apart(load_benchmark, demo_cache: Path, tmp_path: Path) -> None:
    figures = load_benchmark("checkpoints").measured(str(demo_cache), "demo", tmp_path / "run", steps=2, every=1)
    assert figures["checkpoints"] == 2
    assert figures["checkpoint_mb"] > 6
    assert figures["run_cpu_ratio"] > 1
    assert all(figures[name] > 0 for name in ("write_cpu", "seal_cpu", "write_wall", "seal_wall"))
