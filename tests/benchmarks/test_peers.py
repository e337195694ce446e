"""The benchmark against others: their encodings give back what was put in, and the page has a row for every case.

No test looks at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
MACHINE = {"cores": 2, "cpu": "any", "python": "3", "versions": {}}


@pytest.fixture(scope="session")
def encodings(load_benchmark) -> ModuleType:
    return load_benchmark("peer_encodings")


def rows(vocabulary: int, k: int = 64, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[n, k]` without repetition, the largest among them, and descending log-probabilities."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(vocabulary)[:k] for _ in range(n)])
    ids[0, 0] = vocabulary - 1
    logits = -np.sort(rng.gamma(1.0, 3.0, (n, k)), axis=1)
    return ids, (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.05).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [100, 2048, 50257, 2**16, 2**17])
@pytest.mark.parametrize("name", ["torch", "parquet", "megatron", "distillkit"])
def test_every_encoding_gives_the_ids_back_and_log_probabilities_to_its_precision(
    encodings: ModuleType, name: str, vocabulary: int, tmp_path: Path
) -> None:
    ids, logprobs = rows(vocabulary)
    encoding = encodings.ENCODINGS[name]
    encoding.write(tmp_path, 3, ids, logprobs, vocabulary)
    found_ids, found = encoding.read(tmp_path, 3, vocabulary)
    assert np.array_equal(found_ids, ids)
    if name == "distillkit":  # 8 bits of significand exactly, a fitted curve beyond
        np.testing.assert_allclose(found[:, :16], logprobs[:, :16], rtol=2**-8)
        design = encodings._terms(48)
        best = design @ np.linalg.lstsq(design, logprobs[:, 16:].T.astype(float), rcond=None)[0]
        np.testing.assert_allclose(found[:, 16:], best.T, atol=1e-4)  # float32 coefficients of up to a few hundred
    else:  # float16 has 11 bits of significand
        np.testing.assert_allclose(found, logprobs, rtol=2**-11)


def test_a_curve_that_the_terms_span_survives_distillkits_encoding(encodings: ModuleType, tmp_path: Path) -> None:
    x = np.arange(48) / 47
    tail = -3 - 2 * x - np.sqrt(x) + 0.5 * x**3
    logprobs = np.concatenate([np.linspace(-1, -2.9, 16), tail])[None].astype(np.float32)
    ids = np.arange(64)[None]
    encodings.ENCODINGS["distillkit"].write(tmp_path, 0, ids, logprobs, 64)
    found = encodings.ENCODINGS["distillkit"].read(tmp_path, 0, 64)[1]
    np.testing.assert_allclose(found[0, 16:], tail, atol=1e-5)  # float32


@given(width=st.integers(1, 18), k=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_packed_ids_come_back_and_fill_no_byte_more_than_needed(
    encodings: ModuleType, width: int, k: int, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(0, 2**width, (3, k))
    packed = encodings.pack_bits(ids, width)
    assert packed.shape == (3, -(-k * width // 8))
    assert np.array_equal(encodings.unpack_bits(packed, width, k), ids)
    assert int.from_bytes(packed[0].tobytes(), "big") >> (-k * width) % 8 == sum(
        int(value) << width * (k - 1 - place) for place, value in enumerate(ids[0])
    )


def test_head_kl_is_zero_for_shifted_rows_and_the_textbook_sum_otherwise(encodings: ModuleType) -> None:
    _, logprobs = rows(2048, n=3)
    assert encodings.head_kl(logprobs, logprobs - 1.5) == pytest.approx(0.0, abs=1e-7)  # float32 of the shift
    p, q = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert encodings.head_kl(np.log(p), np.log(q)) == pytest.approx(expected, rel=1e-12)


def test_megatrons_encoding_refuses_ids_of_more_than_17_bits(encodings: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="17 bits"):
        encodings.ENCODINGS["megatron"].write(tmp_path, 0, *rows(100), 2**17 + 1)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Heading -> the cells of its tables."""
    found: dict[str, list[list[str]]] = {}
    for section in page.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
        found[section.splitlines()[0]] = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return found


@pytest.mark.slow
def test_the_command_writes_a_page_with_a_row_for_every_case(load_benchmark, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "peers.py"),
        "--quick",
        "--out",
        str(tmp_path),
        "--cases",
        "kd,uld,stored",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    teacher, stored, student = tables((tmp_path / "benchmarks.md").read_text(encoding="utf-8")).values()
    assert [row[0] for row in teacher[1:]] == ["bare forward pass", "kd cache build"]
    assert [row[0] for row in student[1:]] == ["plain cross-entropy (transformers)", "kd train --loss uld"]
    for table in (teacher, student):
        assert table[1][1:3] == ["1.00", "1.00"]  # the base against itself
        assert all(float(cell.replace(",", "")) > 0 for row in table[1:] for cell in row[1:5])
    assert stored[1][0] == "kd cache build"
    by_name = {row[0]: row for row in stored[1:]}
    assert len(by_name) == 5
    assert float(by_name["torch.save, float16"][1]) > 64 * (2 + 4)  # what 64 float16 and int32 take
    assert float(by_name["torch.save, float16"][2]) < 1e-6 < float(by_name["DistillKit's encoding"][2])
    for name in ("teacher", "stored", "student"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
    raw = json.loads((tmp_path / "figures" / "benchmarks.json").read_text())
    assert raw["sizes"]["top_k"] == 64

    load_benchmark("peers_page").write_page(raw, tmp_path / "figures")  # --page-from
    assert (tmp_path / "figures" / "benchmarks.md").read_bytes() == (tmp_path / "benchmarks.md").read_bytes()


def test_growth_gives_every_line_a_value_for_every_size(
    load_benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = load_benchmark("growth")
    monkeypatch.setattr(growth, "Point", partial(growth.Point, vocabulary=2048, length=32, batch=64, tokens=128))
    found = growth.grow("k", tmp_path, values=(4, 64), turns=1)
    assert found["x"] == [4, 64]
    assert set(found["lines"]) == {"build", "read", "kl", "plain", "bytes"}
    assert all(len(values) == 2 and min(values) > 0 for values in found["lines"].values())
    assert found["lines"]["bytes"][1] - found["lines"]["bytes"][0] > 60  # sixty more tokens take a byte each, and more

    page = load_benchmark("peers_page")
    page.write_page({"machine": MACHINE, "growth": {"k": found}}, tmp_path)
    (table,) = tables((tmp_path / "benchmarks.md").read_text(encoding="utf-8")).values()
    assert [row[0] for row in table[1:]] == ["4", "64"]
    assert (tmp_path / "figures" / "growth.png").stat().st_size > 10_000


def test_a_page_made_without_trl_says_so(load_benchmark, tmp_path: Path) -> None:
    page = load_benchmark("peers_page")
    row = {"us": 2.0, "us_ratio": 1.0, "peak_mb": 3.0, "peak_mb_ratio": 1.0}
    results = {
        "sizes": {"student": (64, 2), "vocabulary": 100, "student_batch": 2, "length": 8, "top_k": 4},
        "repeats": 1,
        "machine": MACHINE,
        "student": {"plain": row},
    }
    page.write_page(results, tmp_path)
    assert "TRL was not installed" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    results["student"] |= {"trl-sft": row}
    page.write_page(results, tmp_path)
    assert "TRL was not installed" not in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "kd,speed"], "no such case: speed"),
        (["--trl-python", "/nowhere/python"], "--trl-python /nowhere/python"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--out", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr
    assert not list(tmp_path.iterdir())
