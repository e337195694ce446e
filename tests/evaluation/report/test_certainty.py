"""What a cache holds, against a plain loop over its rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.evaluation.report.certainty import certainty, section


def test_means_are_those_of_a_loop(exact_cache: Path):
    reader = CacheReader(exact_cache)
    targets = reader.read_rows(range(len(reader)))
    entropy = top1 = certain = nll = kept = 0.0
    for n in range(len(targets)):
        p = [math.exp(float(x)) for x in targets.logprobs[n]]
        rest = float(targets.tail_mass_at(1.0)[n])
        entropy -= sum(x * math.log(x) for x in [*p, rest] if x > 0)
        top1 += int(targets.token_ids[n, 0]) == int(targets.gold_ids[n])
        certain += p[0] > 0.95
        nll -= float(targets.gold_logprob[n])
        kept += sum(p)
    found = certainty(reader)
    assert found is not None
    assert found.rows == len(targets)
    expected = [x / len(targets) for x in (entropy, certain, top1, nll, kept)]
    # the stored values are float32; both sides add them in float64
    assert [found.entropy, found.certain, found.top1, found.nll, found.kept] == pytest.approx(expected, rel=1e-6)
    assert found.entropy < math.log(9)  # eight tokens and the rest
    assert f"{found.entropy:.3f} nats" in [cell for row in section(found).table.rows for cell in row]


def test_a_whole_vocabulary_has_the_entropy_itself(whole_cache: Path, exact_cache: Path):
    whole, cut = certainty(CacheReader(whole_cache)), certainty(CacheReader(exact_cache))
    assert whole.kept == pytest.approx(1, abs=1e-4)
    assert whole.entropy > cut.entropy
    assert whole.nll == pytest.approx(cut.nll, rel=1e-3)


def test_a_cache_without_ids_says_the_same(
    tmp_path: Path, exact_cache: Path, build_request, run_build, prose_file: Path
):
    run_build(build_request(tmp_path / "uld", text=prose_file, profile="uld", logprob_codec="float32"))
    reader = CacheReader(tmp_path / "uld")
    assert reader.read_rows([0]).token_ids is None
    found, expected = certainty(reader), certainty(CacheReader(exact_cache))
    assert (found.rows, found.certain, found.top1) == (expected.rows, expected.certain, expected.top1)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-5)


def test_a_cache_of_draws_alone_has_no_answer(tmp_path: Path, build_request, run_build, prose_file: Path):
    run_build(build_request(tmp_path / "sampled", text=prose_file, profile="sampled", samples=4))
    assert certainty(CacheReader(tmp_path / "sampled")) is None
