"""A model against a cache: its own teacher, a naive full softmax in float64, and caches that cannot serve."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import CacheError, DataError
from kd.common.progress import final
from kd.evaluation.measures.agreement import evaluate_agreement, rest_bucket_kl

VOCAB = 400


def naive(teacher64, student64, reader: CacheReader, temperature: float) -> dict[str, float]:
    """Means over every cached row from both models' full distributions; the kept tokens are the teacher's own top k."""
    kl, full, same, nll, teacher_nll = [], [], [], [], []
    for i in range(len(reader)):
        example = reader[i]
        ids, first = torch.tensor([example.input_ids.tolist()]), len(example.context_ids)
        with torch.no_grad():
            z_p, z_q = (m(input_ids=ids).logits[0, first - 1 : -1, :VOCAB] for m in (teacher64, student64))
        log_p, log_q = (z.div(temperature).log_softmax(-1).numpy() for z in (z_p, z_q))
        for row, gold in enumerate(example.targets.gold_ids):
            order = np.argsort(-log_p[row])
            kept, rest = order[: reader.config.top_k], order[reader.config.top_k :]
            p, q = np.exp(log_p[row]), np.exp(log_q[row])
            terms = float((p[kept] * (log_p[row, kept] - log_q[row, kept])).sum())
            if len(rest):
                terms += float(p[rest].sum() * (np.log(p[rest].sum()) - np.log(q[rest].sum())))
            kl.append(terms)
            full.append(float((p * (log_p[row] - log_q[row])).sum()))
            same.append(int(log_q[row].argmax()) == order[0])
            nll.append(-float(z_q[row].log_softmax(-1)[gold]))
            teacher_nll.append(-float(z_p[row].log_softmax(-1)[gold]))
    means = {"kl": kl, "full": full, "same": same, "nll": nll, "teacher_nll": teacher_nll}
    return {"rows": len(kl)} | {name: float(np.mean(values)) for name, values in means.items()}


def test_the_teacher_agrees_with_its_own_cache(teacher, exact_cache):
    result = final(evaluate_agreement(teacher, CacheReader(exact_cache)))
    assert abs(result.kl.value) < 1e-6  # float32 head: what is left is rounding of two float32 forward passes
    assert result.top1_agreement.value == 1.0
    # the cache holds the gold log-probability as float16: three digits
    assert result.nll_per_token.value == pytest.approx(result.teacher_nll_per_token.value, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teacher_differs_from_its_own_cache_by_the_codec_alone(teacher, cache, temperature):
    result = final(evaluate_agreement(teacher, CacheReader(cache), temperature=temperature))
    assert abs(result.kl.value) < 1e-6  # float16's error is about 1e-7 nats, as is float32's rounding of two passes
    assert result.top1_agreement.value == 1.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_figures_equal_a_naive_full_softmax(teacher64, student, student64, exact_cache, temperature):
    reader = CacheReader(exact_cache)
    expected = naive(teacher64, student64, reader, temperature)
    result = final(evaluate_agreement(student, reader, temperature=temperature))
    assert result.rows == expected["rows"] == reader.manifest.rows
    assert result.kl.value == pytest.approx(expected["kl"], rel=2e-5)  # float32 forward passes on both sides
    assert result.top1_agreement.value == pytest.approx(expected["same"], abs=1e-12)
    assert result.nll_per_token.value == pytest.approx(expected["nll"], rel=2e-5)
    assert result.teacher_nll_per_token.value == pytest.approx(expected["teacher_nll"], rel=1e-3)  # float16
    assert 0 < expected["kl"] < expected["full"]  # the rest bucket is a lower bound, and not a trivial one


def test_the_whole_vocabulary_gives_the_full_divergence(teacher64, student, student64, whole_cache):
    reader = CacheReader(whole_cache)
    expected = naive(teacher64, student64, reader, 1.0)
    result = final(evaluate_agreement(student, reader))
    assert result.kl.value == pytest.approx(expected["full"], rel=2e-5)


def test_keeping_fewer_tokens_never_raises_the_divergence(student, whole_cache):
    found = [final(evaluate_agreement(student, CacheReader(whole_cache, top_k=k))).kl.value for k in (1, 4, 64, VOCAB)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_result_does_not_depend_on_the_batch(student, exact_cache):
    reader = CacheReader(exact_cache)
    few, many = (final(evaluate_agreement(student, reader, tokens_per_batch=n)) for n in (1, 10**6))
    assert few.kl.value == pytest.approx(many.kl.value, rel=1e-6)  # another order of float32 sums
    assert few.kl.influence == pytest.approx(many.kl.influence, abs=1e-5)


def test_documents_are_the_texts_and_not_their_blocks(student, exact_cache, prose):
    reader = CacheReader(exact_cache)
    result = final(evaluate_agreement(student, reader))
    assert result.documents.names == tuple(e.id for e in prose.examples)
    assert len(reader) > len(prose.examples)


def test_a_limit_keeps_the_first_examples_across_shards(student, exact_cache):
    reader = CacheReader(exact_cache)
    count = reader.manifest.shards[0][1] + 1 if len(reader.manifest.shards) > 1 else 2
    rows = sum(len(reader[i].targets) for i in range(count))
    assert final(evaluate_agreement(student, reader, limit=count)).rows == rows
    assert final(evaluate_agreement(student, reader, limit=10**6)).rows == reader.manifest.rows


def test_a_rest_without_mass_adds_nothing():
    log_p, log_q = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75]]))
    found = rest_bucket_kl(log_p, np.zeros(1), log_q, np.array([-np.inf]))
    assert found == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3)], rel=1e-12)


@pytest.mark.parametrize("profile", ["uld", "sampled"])
def test_a_cache_without_ids_or_logprobs_is_refused(teacher, profile, tmp_path, build_request, run_build, prose_file):
    run_build(build_request(tmp_path / "c", text=prose_file, profile=profile))
    with pytest.raises(CacheError, match="token by token") as error:
        final(evaluate_agreement(teacher, CacheReader(tmp_path / "c")))
    assert profile in error.value.details["found"]


def test_a_temperature_off_the_grid_is_refused(teacher, exact_cache):
    with pytest.raises(CacheError, match="temperature"):
        final(evaluate_agreement(teacher, CacheReader(exact_cache), temperature=3.0))


def test_a_model_with_too_few_positions_is_refused(teacher, exact_cache, monkeypatch):
    monkeypatch.setattr(teacher.config, "n_positions", 16)
    with pytest.raises(DataError, match="positions"):
        final(evaluate_agreement(teacher, CacheReader(exact_cache)))
