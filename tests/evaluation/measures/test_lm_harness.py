"""Tasks of lm-evaluation-harness through kd, against the harness's own command: values, standard errors, shots, groups.

Tasks and rows are local files; nothing is fetched.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from terminal import run_kd

import kd
from kd.common.errors import DataError
from kd.common.extras import MissingPackageError
from kd.evaluation.eval_settings import OWN, EvalSettings
from kd.evaluation.tasks.lm_eval_task import full_names
from kd.evaluation.tasks.task_registry import TASKS

ROWS = [
    {
        "q": f"Is {thing} {word}?",
        "options": ["yes", "no"],
        "right": int(word == "cold"),
        "a": "no" if word == "cold" else "yes",
    }
    for thing in ("fire", "the sun", "an oven", "a lamp", "a star")
    for word in ("hot", "cold")
]
COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "training_split": "train",
    "validation_split": "validation",
    "doc_to_text": "{{q}}",
    "metadata": {"version": 1.0},
}
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "options",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "(yes|no)"}, {"function": "take_first"}]},
        {"name": "loose", "filter": [{"function": "take_first"}]},
    ],
}
TEXT: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{q}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four tasks and a group, whose rows lie beside them."""
    folder = tmp_path_factory.mktemp("harness")
    for split, rows in (("train", ROWS[:6]), ("validation", ROWS)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    kinds = {"warmth": CHOICE, "warmer": CHOICE, "warmth_written": WRITTEN, "warmth_text": TEXT}
    for name, kind in kinds.items():
        config = {"task": name, **COMMON, "dataset_kwargs": {"data_files": files}, **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    gone = {"task": "gone", **COMMON, "dataset_kwargs": {"data_files": {"validation": "/nowhere/rows.jsonl"}}, **CHOICE}
    (folder / "gone.yaml").write_text(yaml.safe_dump(gone))
    group = {"group": "warm", "task": ["warmth", "warmer"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "_warm.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def report(tasks: Path) -> kd.EvalReport:
    names = "lm_eval:warm,warmth,warmth_written,warmth_text"
    return kd.evaluate("demo", names, include_path=tasks, shots=2)


def test_values_and_errors_are_those_of_the_harness_s_own_run(report: kd.EvalReport, tasks: Path) -> None:
    model, tokenizer = kd.load_teacher("demo")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with torch.random.fork_rng():
        found = lm_eval.simple_evaluate(
            lm, tasks=["warm", "warmth_written", "warmth_text"], task_manager=manager, num_fewshot=2, bootstrap_iters=50
        )["results"]
    pairs = [
        ("warm", "acc", "warm", "acc,none"),
        ("warm", "acc/warmer", "warmer", "acc,none"),
        ("warmth", "acc", "warmth", "acc,none"),
        ("warmth", "acc_norm", "warmth", "acc_norm,none"),
        ("warmth_written", "exact_match (strict)", "warmth_written", "exact_match,strict"),
        ("warmth_written", "exact_match (loose)", "warmth_written", "exact_match,loose"),
        ("warmth_text", "word_perplexity", "warmth_text", "word_perplexity,none"),
        ("warmth_text", "bits_per_byte", "warmth_text", "bits_per_byte,none"),
    ]
    for task, name, theirs, key in pairs:
        figure = report.tasks[f"lm_eval:{task}"][name]
        assert figure["value"] == pytest.approx(found[theirs][key], rel=1e-5), (task, name)  # float32, other batches
        stderr = found[theirs][key.replace(",", "_stderr,")]
        if isinstance(stderr, float) and task != "warm":
            assert figure["stderr"] == pytest.approx(stderr, rel=1e-5), (task, name)
    # the harness pools a group's variance without its questions' own means; the error of a mean of two means is theirs in squares
    parts = [report.tasks["lm_eval:warm"][f"acc/{name}"]["stderr"] for name in ("warmth", "warmer")]
    assert report.tasks["lm_eval:warm"]["acc"]["stderr"] == pytest.approx(np.hypot(*parts) / 2, rel=0.06)
    assert report.tasks["lm_eval:warmth_text"]["bits_per_byte"]["stderr"] > 0, "which the harness does not give"


def test_the_report_says_how_it_was_asked_and_what_came(report: kd.EvalReport) -> None:
    settings = report.settings["lm_eval:warmth"]
    assert (settings["shots"], settings["version"], settings["harness"]) == (2, "warmth 1.0", lm_eval.__version__)
    first = report.documents["lm_eval:warmth"]["samples"][0]
    assert first["prompt"].count("?") == 3, "two examples and the question"
    assert first["expected"].strip() == "yes"
    assert first["got"].strip() in ("yes", "no")
    assert report.tasks["lm_eval:warmth"]["acc"] | {"value": 0, "stderr": 0} == {
        "value": 0,
        "stderr": 0,
        "n": 10,
        "over": "question",
        "unit": "share of questions",
        "better": "higher",
        "title": "acc",
    }
    assert len(report.documents["lm_eval:warmth"]["influence"]["acc"]) == 10, "so that two models have a paired error"


def test_the_command_and_yaml_are_the_other_two_doors(tasks: Path, tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    config.write_text(yaml.safe_dump({"tasks": "lm_eval:warmth", "include-path": str(tasks), "limit": 4, "shots": 0}))
    run_kd("eval", "demo", "random:demo-student", "--config", str(config), "--out", str(tmp_path / "evals"))
    done = run_kd("report", str(tmp_path / "evals"), "--out", str(tmp_path / "report"))
    assert "| model | parameters | acc: warmth ↑ |" in done.stdout
    assert "lm-eval: warmth, 0 examples before each" in done.stdout
    assert "Over 4 questions" in done.stdout


def test_generators_and_the_tokenizer_are_left_as_they_were(tasks: Path) -> None:
    model, tokenizer = kd.load_teacher("demo")
    before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state(), tokenizer.padding_side  # noqa: NPY002
    kd.evaluate(model, "lm_eval:warmth_written", tokenizer=tokenizer, include_path=tasks, limit=2)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert tokenizer.padding_side == before[3]


def test_names_behind_one_of_the_harness_are_its_own_too() -> None:
    assert set(OWN) == set(TASKS)
    assert full_names(("perplexity", "lm_eval:arc_easy", "gsm8k", "perplexity", "gsm8k"), OWN) == (
        "perplexity",
        "lm_eval:arc_easy",
        "lm_eval:gsm8k",
        "perplexity",
        "gsm8k",
    )
    assert EvalSettings(("lm_eval:a", "hellaswag", "lm_eval:hellaswag")).tasks == (
        "lm_eval:a",
        "hellaswag",
        "lm_eval:hellaswag",
    )


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("lm_eval:warmht", "has no task 'warmht'"),
        ("lm_eval:gone", "cannot load this task or its rows"),
        ("lm_eval", "needs the name of a task"),
        ("arc_easy", "unknown task"),
        ("harness:arc_easy", "unknown task"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_error(tasks: Path, task: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        kd.evaluate("demo", task, include_path=tasks)
    if task == "lm_eval:warmht":
        assert caught.value.details["did you mean"] == "warmth"


def test_without_the_package_the_error_names_the_extra(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingPackageError, match="lm_eval:warmth needs lm_eval") as caught:
        kd.evaluate("demo", "lm_eval:warmth", include_path=tasks)
    assert "[harness]" in caught.value.details["try"]
