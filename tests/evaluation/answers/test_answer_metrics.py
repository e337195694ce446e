"""Metrics of answers: laws, SQuAD's and BLEU's published definitions written again, and what a text's tasks name."""

from __future__ import annotations

import json
import math
import re
import shutil
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from tiny_encoder import save_encoder

from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.task_files import load_task, task_names
from kd.data.rows.example import Example
from kd.data.sources import load_corpus
from kd.evaluation.answers.accepted import best_over, squad_exact_match, token_f1
from kd.evaluation.answers.answer_metrics import (
    ANSWER_METRICS,
    CHOICES_METRICS,
    MetricSettings,
    bleu_of_sums,
    covered_share,
    metrics_by_task,
    score_answers,
)
from kd.evaluation.measures.generation import generation_of
from kd.evaluation.statistics.estimates import Documents, standard_error

OFFLINE = [name for name in ANSWER_METRICS if name != "bertscore"]
TEXTS = (
    "The fox went down to the river to look at the fish.",
    "There were seven ships on Monday,\nfive on Tuesday, and fog.",
    "They talked about bells and then went home.",
    "It rained for a day and a night.",
)
EXAMPLES = tuple(
    Example(
        f"e/{i}",
        text,
        f"prompt {i}",
        ("story", "log")[i % 2],
        references=(text, "Nothing of the kind."),
        keywords=("river", "ship", "talk", "rain")[i : i + 1],
    )
    for i, text in enumerate(TEXTS)
)
PLAIN = MetricSettings()


def values(name: str, answers: list[str], examples=EXAMPLES, settings: MetricSettings = PLAIN) -> np.ndarray:
    return ANSWER_METRICS[name].score(answers, examples, settings)


def scored(answers: list[str], *names: str, examples=EXAMPLES, settings: MetricSettings = PLAIN):
    chosen = metrics_by_task(examples, {}, names, settings)
    return score_answers(answers, examples, Documents.of_prompts(examples), chosen, settings)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_reference_itself_scores_full_marks_and_unrelated_text_none(name):
    full = 100.0 if name == "bleu" else 1.0
    estimates, made_by = scored([*TEXTS], name)
    assert estimates[name].value == pytest.approx(full, rel=1e-12)
    assert estimates[f"{name}_mean_of_tasks"].value == pytest.approx(full, rel=1e-12)
    assert set(estimates) == {name, f"{name}_mean_of_tasks", f"{name}/story", f"{name}/log"}
    assert made_by[name]
    for nothing in ("", "zzz qqq"):
        assert scored([nothing] * 4, name)[0][name].value == 0


@pytest.mark.parametrize("name", OFFLINE)
def test_the_order_of_the_examples_changes_nothing(name):
    answers = ["the fox looked at fish", "five ships on Tuesday", "they went home", "it rains"]
    forth = scored(answers, name)[0]
    back = scored(answers[::-1], name, examples=EXAMPLES[::-1])[0]
    for key, estimate in forth.items():
        assert back[key].value == pytest.approx(estimate.value, rel=1e-12)


def test_more_references_never_lower_a_score_that_takes_the_best():
    answers = ["the fox looked at fish", "five ships on Tuesday", "nothing of that kind", "it rains"]
    single = [replace(e, references=(e.target,)) for e in EXAMPLES]
    for name in ("rouge1", "rougeL", "rougeLsum", "squad_em", "squad_f1"):
        assert (values(name, answers) >= values(name, answers, single)).all()
    assert values("rouge1", answers)[2] > values("rouge1", answers, single)[2]


# SQuAD: the official scripts' steps, from their description, one function per step


def official_normalise(text: str) -> str:
    text = text.lower()
    text = "".join(ch for ch in text if ch not in set(string.punctuation))
    text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
    return " ".join(text.split())


def official_f1(got: str, gold: str) -> float:
    found, wanted = official_normalise(got).split(), official_normalise(gold).split()
    if not found or not wanted:  # evaluate-v2.0.py: an answer of nothing is right where nothing was asked for
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


WORDS = st.lists(
    st.sampled_from(["the", "a", "An", "fox", "Fox's", "U.S.", "-", "river", "«é»", "\t", "1,000"]), max_size=6
)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
@settings(max_examples=200)
def test_squad_scores_equal_the_official_scripts(got, golds):
    answer, accepted = " ".join(got), [" ".join(gold) for gold in golds]
    expected_em = max(float(official_normalise(answer) == official_normalise(gold)) for gold in accepted)
    assert best_over(squad_exact_match, answer, accepted) == expected_em
    expected_f1 = max(official_f1(answer, gold) for gold in accepted)
    assert best_over(token_f1, answer, accepted) == pytest.approx(expected_f1, rel=1e-12)


# ROUGE


def test_rouge_by_hand():
    answers = ["the fox saw fish"]
    example = [Example("x", "the fish saw the fox")]
    # unigrams: the, fox, saw, fish of 4 and 5; longest common subsequence: "the fox" or "fish", "the … saw" = 2
    assert values("rouge1", answers, example)[0] == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    assert values("rougeL", answers, example)[0] == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))


def test_lines_are_the_sentences_of_rouge_lsum_and_without_them_it_is_rouge_l():
    flat = Example("x", "five ships on tuesday seven on monday")
    lines = Example("y", "five ships on tuesday\nseven on monday")
    answer = "seven on monday\nfive ships on tuesday"
    assert values("rougeLsum", [answer.replace("\n", " ")], [flat]) == values("rougeL", [answer], [flat])
    assert values("rougeLsum", [answer], [lines]) == 1.0  # in any order, line by line
    assert values("rougeL", [answer], [lines]) < 1.0


def test_the_stemmer_is_off_unless_asked_for_and_named():
    example, answer = [Example("x", "ships sailing")], ["ship sails"]
    assert values("rouge1", answer, example) == 0
    assert values("rouge1", answer, example, MetricSettings(rouge_stemmer=True)) == 1
    assert "no stemmer" in ANSWER_METRICS["rouge1"].made_by(example, PLAIN)
    assert "Porter" in ANSWER_METRICS["rouge1"].made_by(example, MetricSettings(rouge_stemmer=True))


# coverage


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("A kid dances in the room.", 1.0),
        ("KIDS were dancing; three rooms!", 1.0),
        ("The kidnapper left the ballroom.", 0.0),
        ("A room.", 1 / 3),
        ("", 0.0),
    ],
)
def test_coverage_counts_a_word_in_any_inflection_and_never_inside_another(answer, share):
    assert covered_share(answer, ("kid", "room", "dance")) == pytest.approx(share)


@pytest.mark.parametrize(
    ("keyword", "form"),
    [
        ("sit", "sitting"),
        ("stand", "stood"),
        ("foot", "feet"),
        ("ride", "rode"),
        ("carry", "carries"),
        ("swim", "swam"),
        ("man", "men"),
    ],
)
def test_irregular_and_doubled_forms_are_found(keyword, form):
    assert covered_share(f"they {form} there", (keyword,)) == 1


def test_examples_without_words_to_use_have_no_coverage():
    mixed = (*EXAMPLES[:2], *(replace(e, keywords=()) for e in EXAMPLES[2:]))
    estimate = scored([*TEXTS], "coverage", examples=mixed)[0]["coverage"]
    assert (estimate.value, estimate.n) == (1.0, 2)
    bare = [replace(e, keywords=()) for e in EXAMPLES]
    assert scored([*TEXTS], "coverage", examples=bare) == ({}, {})


def test_common_gens_own_references_are_covered(shared: Path):
    instructions = InstructionConfig(0, task_root=shared / "tasks")
    corpus = load_corpus("flan:common_gen", split="dev", limit=300, instructions=instructions)
    assert corpus.metrics == {"common_gen": ("rouge1", "rougeL", "coverage")}
    assert all(e.keywords for e in corpus.examples)
    shares = values("coverage", [e.target for e in corpus.examples], corpus.examples)
    assert shares.mean() > 0.99  # the sentences were collected to hold every concept; 0.999 over all rows
    assert values("coverage", [e.target for e in corpus.examples[::-1]], corpus.examples).mean() < 0.2
    assert len(Documents.of_prompts(corpus.examples).names) < len(corpus.examples)


# BLEU


def test_bleu_of_summed_statistics_is_sacrebleus_corpus_score():
    rng = np.random.default_rng(0)
    words = ["el", "la", "zorro", "río", "niebla", "barco", "siete", "lunes", "a", "casa"]
    text = lambda: " ".join(rng.choice(words, rng.integers(1, 9)))  # noqa: E731
    examples = [Example(str(i), text(), f"p{i}", references=tuple(text() for _ in range(1 + i % 2))) for i in range(30)]
    answers = [text() for _ in examples]
    streams: list[Any] = [
        [e.references[0] for e in examples],
        [e.references[1] if len(e.references) > 1 else None for e in examples],
    ]
    expected = BLEU().corpus_score(answers, streams)
    found, made_by = scored(answers, "bleu", examples=examples)
    assert found["bleu"].value == pytest.approx(expected.score, rel=1e-12)
    assert found["bleu"].n == 30
    assert "tok:13a" in made_by["bleu"]
    assert "nrefs:var" in made_by["bleu"]
    assert "version:" in made_by["bleu"]


def test_bleu_by_hand():
    # 4 of 4 words, 2 of 3 pairs, 1 of 2 triples, no four in a row (smoothed to 1/2 of 1); equal lengths
    found = values("bleu", ["on the bridge , fog"], [Example("x", "on the bridge a fog")])
    expected = 100 * math.exp(np.mean(np.log([4 / 5, 2 / 4, 1 / 3, 1 / (2 * 2)])))
    assert bleu_of_sums(found.sum(axis=0)) == pytest.approx(expected, rel=1e-9)


# BERTScore


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights whose words are letters."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny-t5-like-name"  # a path with "t5" is no T5
    save_encoder(folder)
    return folder


def naive_f1(folder: Path, got: str, expected: str, layer: int) -> float:
    """The formula of the paper in float64 on the hidden states after `layer` layers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    states = []
    for text in (got, expected):
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        states.append((found / found.norm(dim=1, keepdim=True)).numpy())
    # [CLS] and [SEP] may be matched, but are not averaged over
    similarity = states[0] @ states[1].T
    precision, recall = similarity.max(axis=1)[1:-1].mean(), similarity.max(axis=0)[1:-1].mean()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [1, 3])
def test_bertscore_equals_the_formula_on_the_hidden_states(encoder, layer):
    answers, settings = ["the fox went home", "ships.", "", "zz"], MetricSettings(False, str(encoder), layer, "cpu")
    found = values("bertscore", answers, settings=settings)
    for number, answer in enumerate(answers):
        expected = max(naive_f1(encoder, answer, r, layer) for r in EXAMPLES[number].references) if answer else 0.0
        assert found[number] == pytest.approx(expected, abs=2e-6)  # float32 on the library's side


def test_bertscore_of_a_reference_itself_is_one_and_names_its_encoder(encoder):
    settings = MetricSettings(False, str(encoder), 2, "cpu")
    estimates, made_by = scored([*TEXTS], "bertscore", settings=settings)
    assert estimates["bertscore"].value == pytest.approx(1.0, abs=1e-6)
    assert "tiny-t5-like-name_L2_no-idf" in made_by["bertscore"]
    assert str(encoder) not in made_by["bertscore"]


def test_bertscore_equals_the_librarys_own_command(encoder, tmp_path):
    import bert_score

    plain = tmp_path / "tiny"  # the library takes a path that holds "t5" for a T5, and fails without a longest length
    shutil.copytree(encoder, plain)
    settings = json.loads((plain / "tokenizer_config.json").read_text()) | {"model_max_length": 64}
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    answers = ["the fox went home", "five ships", "they went", "it rains"]
    expected = bert_score.score(
        answers,
        [list(e.references) for e in EXAMPLES],
        model_type=str(plain),
        num_layers=3,
        idf=False,
        device="cpu",
        use_fast_tokenizer=True,
    )[2]
    found = values("bertscore", answers, settings=MetricSettings(False, str(encoder), 3, "cpu"))
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


def test_an_encoder_that_cannot_serve_is_refused_with_what_to_try(encoder, tmp_path):
    with pytest.raises(DataError, match="recommends no layer") as error:
        values("bertscore", [*TEXTS], settings=MetricSettings(False, str(encoder), None, "cpu"))
    assert "--bertscore-layer" in error.value.details["try"]
    with pytest.raises(DataError, match="no such layer") as error:
        values("bertscore", [*TEXTS], settings=MetricSettings(False, str(encoder), 9, "cpu"))
    assert error.value.details["expected"] == "1..3"
    with pytest.raises(DataError, match="cannot load the encoder"):
        values("bertscore", [*TEXTS], settings=MetricSettings(False, str(tmp_path / "none"), 1, "cpu"))
    with pytest.raises(DataError, match="needs an encoder"):
        metrics_by_task(EXAMPLES, {}, ["bertscore"], PLAIN)


# which metrics a text gets


def test_a_tasks_file_names_its_metrics_and_an_option_overrides_it():
    named = {"story": ("rougeL", "bertscore"), "log": ("squad_f1", "accuracy")}
    assert metrics_by_task(EXAMPLES, named, None, PLAIN) == {"rougeL": ["story"], "squad_f1": ["log"]}
    with_encoder = metrics_by_task(EXAMPLES, named, None, MetricSettings(bertscore_model="x", bertscore_layer=1))
    assert with_encoder["bertscore"] == ["story"]
    assert metrics_by_task(EXAMPLES, named, ["bleu"], PLAIN) == {"bleu": ["log", "story"]}
    with pytest.raises(DataError, match="unknown metric") as error:
        metrics_by_task(EXAMPLES, {"log": ("rougl",)}, None, PLAIN)
    assert str(error.value.details["did you mean"]).startswith("rouge")


def test_every_metric_that_a_task_file_names_exists():
    for name in task_names():
        assert set(load_task(name).metrics) <= {*ANSWER_METRICS, *CHOICES_METRICS}


def test_a_metric_of_one_task_leaves_the_others_out_and_keeps_its_own_error():
    answers = ["the fox looked at fish", "five ships on Tuesday", "they went home", "it rains"]
    chosen = metrics_by_task(EXAMPLES, {"story": ("rougeL",)}, None, PLAIN)
    result = generation_of(EXAMPLES, answers, np.zeros(4), 8, 0, chosen, PLAIN)
    own = values("rougeL", [answers[0], answers[2]], [EXAMPLES[0], EXAMPLES[2]])
    for key in ("rougeL", "rougeL/story", "rougeL_mean_of_tasks"):
        assert result.estimates[key].value == pytest.approx(own.mean())
        assert result.estimates[key].n == 2
        assert result.estimates[key].stderr == pytest.approx(own.std(ddof=1) / math.sqrt(2))
        assert standard_error(result.estimates[key].influence) == pytest.approx(result.estimates[key].stderr)
        assert len(result.estimates[key].influence) == 4  # of all documents, so that two models can be paired
    assert "rougeL/log" not in result.estimates
