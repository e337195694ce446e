"""A model against a teacher at hand: itself, a naive softmax in float64, and the same teacher's cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluating import evaluated
from transformers import AutoModelForSeq2SeqLM

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.progress import final
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.evaluation.measures.agreement import evaluate_agreement, jensen_shannon, rest_bucket_jsd
from kd.evaluation.measures.live_agreement import evaluate_live_agreement
from kd.evaluation.measures.perplexity import evaluate_perplexity
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.tokenizer import load_tokenizer, vocabulary_size

LN2 = float(np.log(2))

WINDOW_24 = ReadingOptions(seq_len=24)


def distributions(rng, rows: int, size: int) -> np.ndarray:
    return np.log(rng.dirichlet(np.full(size, 0.3), rows))


def test_jsd_is_symmetric_and_between_nothing_and_ln_2():
    rng = np.random.default_rng(0)
    p, q = distributions(rng, 50, 9), distributions(rng, 50, 9)
    found = jensen_shannon(p, q)
    assert found == pytest.approx(jensen_shannon(q, p), rel=1e-12)
    assert (found > 0).all()
    assert (found < LN2).all()
    assert not jensen_shannon(p, p).any()
    apart = np.log(
        np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]) + 0.0,
        where=np.array([[True] * 2 + [False] * 2, [False] * 2 + [True] * 2]),
        out=np.full((2, 4), -np.inf),
    )
    assert jensen_shannon(apart[:1], apart[1:]) == pytest.approx([LN2], rel=1e-15)


def test_jsd_equals_its_definition_by_two_divergences():
    rng = np.random.default_rng(1)
    p, q = np.exp(distributions(rng, 20, 7)), np.exp(distributions(rng, 20, 7))
    m = (p + q) / 2
    expected = 0.5 * (p * np.log(p / m)).sum(axis=1) + 0.5 * (q * np.log(q / m)).sum(axis=1)
    assert jensen_shannon(np.log(p), np.log(q)) == pytest.approx(expected, rel=1e-12)


def test_one_more_outcome_for_the_rest_never_raises_jsd_and_without_mass_is_the_whole():
    rng = np.random.default_rng(2)
    log_p, log_q = distributions(rng, 30, 8), distributions(rng, 30, 8)
    whole = jensen_shannon(log_p, log_q)
    rest_p, rest_q = np.exp(log_p[:, 3:]).sum(axis=1), np.logaddexp.reduce(log_q[:, 3:], axis=1)
    assert (rest_bucket_jsd(log_p[:, :3], rest_p, log_q[:, :3], rest_q) <= whole + 1e-12).all()
    nothing = np.zeros(30), np.full(30, -np.inf)
    assert rest_bucket_jsd(log_p, nothing[0], log_q, nothing[1]) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_agrees_with_itself(teacher, tokenizer, prose, temperature):
    result = final(
        evaluate_live_agreement(teacher, teacher, tokenizer, prose, reading=WINDOW_24, temperature=temperature)
    )
    assert result.kl.value == 0
    assert result.jsd.value == 0
    assert result.top1_agreement.value == 1
    assert result.ece.value == result.teacher_ece.value
    assert result.nll_per_token.value == result.teacher_nll_per_token.value


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_figures_equal_a_naive_full_softmax(teacher, student, teacher64, student64, tokenizer, prose, temperature):
    size = vocabulary_size(tokenizer)
    kl, jsd, same, nll = [], [], [], []
    for row in tokenize_corpus(prose, tokenizer, BlockConfig(seq_len=24)):
        ids, first = torch.tensor([row.input_ids.tolist()]), len(row.context_ids)
        with torch.no_grad():
            z_p, z_q = (m(input_ids=ids).logits[0, first - 1 : -1, :size] for m in (teacher64, student64))
        p, q = (z.div(temperature).softmax(-1).numpy() for z in (z_p, z_q))
        kl += (p * np.log(p / q)).sum(axis=1).tolist()
        m = (p + q) / 2
        jsd += (0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(axis=1)).tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
        nll += (-z_q.log_softmax(-1)[torch.arange(len(row.target_ids)), row.target_ids.tolist()]).tolist()
    result = final(
        evaluate_live_agreement(student, teacher, tokenizer, prose, reading=WINDOW_24, temperature=temperature)
    )
    assert result.rows == len(kl)
    assert result.kl.value == pytest.approx(np.mean(kl), rel=2e-5)  # float32 forward passes on both sides
    assert result.jsd.value == pytest.approx(np.mean(jsd), rel=2e-5)
    assert result.top1_agreement.value == pytest.approx(np.mean(same), abs=1e-12)
    assert result.nll_per_token.value == pytest.approx(np.mean(nll), rel=2e-5)


def test_a_cache_of_everything_gives_the_live_teachers_figures(teacher, student, tokenizer, prose, whole_cache):
    reader = CacheReader(whole_cache)
    live = final(
        evaluate_live_agreement(
            student, teacher, tokenizer, prose, reading=ReadingOptions(seq_len=reader.manifest.blocks.seq_len)
        )
    )
    cached = final(evaluate_agreement(student, reader))
    for name in ("kl", "jsd", "top1_agreement", "nll_per_token", "ece", "teacher_ece"):
        assert getattr(cached, name).value == pytest.approx(getattr(live, name).value, rel=5e-5, abs=1e-7), name
    assert cached.rows == live.rows


def test_calibration_is_that_of_perplexity_on_the_same_rows(teacher, student, tokenizer, prose):
    live = final(evaluate_live_agreement(student, teacher, tokenizer, prose, reading=WINDOW_24))
    alone = final(evaluate_perplexity(student, tokenizer, prose, reading=WINDOW_24))
    assert live.ece.value == alone.ece.value
    assert live.nll_per_token.value == alone.nll_per_token.value
    assert final(evaluate_perplexity(teacher, tokenizer, prose, reading=WINDOW_24)).ece.value == live.teacher_ece.value


def test_encoder_decoders_are_compared_on_pairs(t5_dir, teacher):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(t5_dir).eval(), load_tokenizer(str(t5_dir))
    pairs = tuple(Example(str(i), "the river", f"Where did fox {i} go?") for i in range(3))
    corpus = Corpus("pairs", "test", "pairs", pairs, {})
    result = final(evaluate_live_agreement(model, model, tokenizer, corpus))
    assert (result.kl.value, result.top1_agreement.value) == (0, 1)
    with pytest.raises(DataError, match="has an encoder"):
        final(evaluate_live_agreement(model, teacher, tokenizer, corpus))


def test_the_task_takes_a_live_teacher_with_the_models_tokenizer_alone(student_dirs, model_dir, t5_dir, prose_file):
    def run(**options):
        return evaluated(str(student_dirs[0]), ["agreement"], seq_len=24, device="cpu", **options)

    report = run(teacher=str(model_dir), data=str(prose_file))
    assert report.settings["agreement"]["teacher"] == str(model_dir)
    assert len(report.settings["agreement"]["teacher_fingerprint"]) == 64
    assert report.tasks["agreement"]["jsd"]["value"] < LN2
    with pytest.raises(DataError, match="tokenizer is not the teacher's"):
        run(teacher=str(t5_dir), data=str(prose_file))
    for options in ({"teacher": str(model_dir)}, {}):
        with pytest.raises(DataError, match="the task agreement") as error:
            run(**options)
        assert "--teacher MODEL with --data SPEC" in error.value.details["try"]


def test_the_window_is_what_both_have_positions_for(student, teacher, tokenizer, prose, monkeypatch):
    monkeypatch.setattr(teacher.config, "n_positions", 24)
    short = final(evaluate_live_agreement(student, teacher, tokenizer, prose))
    asked = final(evaluate_live_agreement(student, teacher, tokenizer, prose, reading=WINDOW_24))
    assert short.kl.value == asked.kl.value
    with pytest.raises(DataError, match="model's positions"):
        final(evaluate_live_agreement(student, teacher, tokenizer, prose, reading=ReadingOptions(seq_len=32)))


def test_a_pair_that_the_window_does_not_hold_is_cut_and_counted(student, tokenizer):
    long = Example("long", "to the river", "It rained for a day and a night. " * 20)
    corpus = Corpus("pairs", "test", "pairs", (long, Example("short", "home", "Where?")), {})
    result = final(evaluate_perplexity(student, tokenizer, corpus, reading=WINDOW_24))
    assert result.pairs_cut == 1
    assert final(evaluate_live_agreement(student, student, tokenizer, corpus, reading=WINDOW_24)).pairs_cut == 1
