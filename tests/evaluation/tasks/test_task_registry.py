"""`run_tasks` end to end on the tiny models, and what a report keeps on disk."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import evaluated, run_tasks

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import CacheMismatchError, DataError
from kd.common.progress import final
from kd.data.corpus import Corpus
from kd.data.data_settings import InstructionConfig
from kd.data.named_sources import SOURCES
from kd.data.rows.example import Example
from kd.data.sources import load_corpus
from kd.evaluation.measures.agreement import evaluate_agreement
from kd.evaluation.measures.perplexity import evaluate_perplexity
from kd.evaluation.results import EvalReport, load_report
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.evaluation.statistics.estimates import standard_error
from kd.evaluation.tasks.agreement_task import KEPT
from kd.evaluation.tasks.choices_task import RANKED
from kd.evaluation.tasks.generation_task import further_metrics
from kd.evaluation.tasks.task_registry import TASKS


@pytest.fixture(scope="module")
def report(student_dirs: list[Path], prose_file: Path, exact_cache: Path) -> EvalReport:
    steps = run_tasks(
        str(student_dirs[0]),
        ["perplexity", "agreement"],
        data=str(prose_file),
        cache=exact_cache,
        seq_len=24,
        device="cpu",
    )
    return final(steps)


def test_a_report_holds_what_the_tasks_found(report, student, tokenizer, prose, exact_cache):
    perplexity = final(evaluate_perplexity(student, tokenizer, prose, reading=ReadingOptions(seq_len=24)))
    agreement = final(evaluate_agreement(student, CacheReader(exact_cache)))
    found = report.tasks
    for metric, estimate in [("perplexity", perplexity.perplexity), ("bits_per_byte", perplexity.bits_per_byte)]:
        assert found["perplexity"][metric]["value"] == estimate.value
        assert found["perplexity"][metric]["stderr"] == estimate.stderr
        assert found["perplexity"][metric]["n"] == estimate.n
    assert found["agreement"]["kl_kept"]["value"] == agreement.kl.value
    assert found["agreement"]["top1_agreement"]["value"] == agreement.top1_agreement.value


def test_a_report_names_model_text_cache_and_versions(report, student, student_dirs, prose, exact_cache):
    assert report.parameters == sum(p.numel() for p in student.parameters())
    assert report.model == str(student_dirs[0])
    assert len(report.identity["weights"]["model.safetensors"]) == 64
    assert report.data["text_digest"] == prose.digest
    assert report.cache["fingerprint"] == CacheReader(exact_cache).manifest.fingerprint
    assert set(report.versions) == {"python", "kd-logit-cache", "torch", "transformers"}


QUIZ = tuple(
    Example(
        f"q/{i}",
        target,
        prompt,
        task,
        choices=("the fox", "a bridge", "bells"),
        answer=answer,
        references=(target, "?"),
    )
    for i, (prompt, target, task, answer) in enumerate(
        [
            ("Who went down?", "the fox", "who", 0),
            ("Where did they meet?", "a bridge", "where", 1),
            ("What did they talk about?", "bells", "what", 2),
            ("Who came home?", "the fox", "who", 0),
            ("What did he count?", "bells", "what", 2),
            ("Where was the fog?", "a bridge", "where", 1),
        ]
    )
)


@pytest.fixture
def quiz(monkeypatch) -> str:
    """A source whose examples have choices."""
    monkeypatch.setitem(SOURCES, "quiz", lambda spec, split: Corpus(spec, split, "pairs", QUIZ, {}))
    return "quiz"


@pytest.mark.parametrize("model", ["model_dir", "t5_dir"])
def test_choices_and_generation_of_either_architecture_make_a_report(model, quiz, request, tmp_path):
    folder = str(request.getfixturevalue(model))
    report = evaluated(folder, ["choices", "generation", "perplexity"], data=quiz, device="cpu")
    for task in ("choices", "generation"):
        declared = set(RANKED) if task == "choices" else set(TASKS[task].metrics) - set(further_metrics())
        found = set(report.tasks[task])
        assert declared <= found
        assert {m.partition("/")[0] for m in found - declared} <= declared
        assert {m.partition("/")[2] for m in found - declared} == {"who", "where", "what"}
        assert len(report.documents[task]["samples"]) == len(QUIZ)
        assert set(report.documents[task]["samples"][0]) == {"prompt", "expected", "got"}
    assert report.tasks["choices"]["accuracy/who"]["title"] == "accuracy: who"
    assert report.tasks["choices"]["accuracy/who"]["n"] == 2
    report.save(tmp_path)
    assert load_report(tmp_path) == report


def test_settings_are_what_was_asked_and_tell_other_choices_from_the_same_text(model_dir, t5_dir, quiz, monkeypatch):
    def settings(folder):
        return evaluated(str(folder), ["choices", "generation"], data=quiz, device="cpu").settings

    before = settings(model_dir)
    assert settings(t5_dir) == before  # other tokenizers and windows do not make it another question
    other = tuple(replace(e, choices=(*e.choices, "ships"), references=("!",)) for e in QUIZ)
    monkeypatch.setitem(SOURCES, "quiz", lambda spec, split: Corpus(spec, split, "pairs", other, {}))
    after = settings(model_dir)
    for task, digest in (("choices", "choices_digest"), ("generation", "references_digest")):
        assert after[task]["text_digest"] == before[task]["text_digest"]
        assert after[task][digest] != before[task][digest]


@pytest.fixture
def anli_root(tmp_path: Path) -> Path:
    """Rows whose labels have two wordings."""
    (tmp_path / "anli_r1").mkdir()
    rows = [{"premise": e.prompt, "hypothesis": e.target, "label": i % 3} for i, e in enumerate(QUIZ)]
    (tmp_path / "anli_r1" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("model", ["model_dir", "t5_dir"])
def test_both_wordings_are_scored_and_named(model, anli_root, request):
    folder = str(request.getfixturevalue(model))

    def run(labels: Any) -> Any:
        instructions = InstructionConfig(0, labels=labels, task_root=anli_root)
        return evaluated(
            folder,
            ["choices"],
            data="flan:anli_r1",
            split="test",
            instructions=instructions,
            separator=" ",
            seq_len=60 if model == "model_dir" else None,
            device="cpu",
        )

    both, single = run("both"), {wording: run(wording) for wording in ("original", "flan")}
    assert both.settings["choices"]["labels"] == "both"
    assert len(both.tasks["choices"]) == sum(len(r.tasks["choices"]) for r in single.values())
    for wording, report in single.items():
        assert report.settings["choices"]["labels"] == wording
        for name, figure in report.tasks["choices"].items():
            base, slash, part = name.partition("/")
            found = both.tasks["choices"][f"{base}_{wording}{slash}{part}"]
            assert found | {"title": ""} == figure | {"title": ""}
            assert f"{wording} labels" in found["title"]


def test_two_wordings_need_a_source_that_has_them(model_dir, quiz, anli_root):
    both = InstructionConfig(labels="both", task_root=anli_root)
    with pytest.raises(DataError, match="no templates"):
        list(run_tasks(str(model_dir), ["choices"], data=quiz, instructions=both, device="cpu"))
    with pytest.raises(DataError, match="only one wording"):
        load_corpus("flan:anli_r1", split="test", instructions=both)


@pytest.mark.parametrize(
    ("task", "way"), [("choices", {"encoding": "togehter"}), ("hellaswag", {"protocol": "harnes"})]
)
def test_an_unknown_way_to_ask_is_refused_before_weights_are_loaded(quiz, task, way):
    with pytest.raises(DataError, match=f"unknown {next(iter(way))}") as error:
        list(run_tasks("no/such/model", [task], data=quiz, **way))
    assert error.value.details["did you mean"] in ("together", "harness")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["rougeX"]}, "unknown metric"),
        ({"metrics": ["bertscore"]}, "needs an encoder"),
        ({"bertscore_model": "no/such/encoder"}, "recommends no layer"),
        ({"sample_temperature": -1.0}, "temperature of sampling"),
    ],
)
def test_what_answers_cannot_be_scored_with_is_refused_before_weights_are_loaded(
    quiz, model_dir, tmp_path, options, message
):
    for file in model_dir.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=message):  # there are no weights in that folder to load
        list(run_tasks(str(tmp_path), ["generation"], data=quiz, device="cpu", **options))


def test_scores_and_their_settings_say_which_metrics_seed_and_decoding(model_dir, quiz):
    report = evaluated(
        str(model_dir),
        ["generation"],
        data=quiz,
        device="cpu",
        metrics=["rougeL", "bleu"],
        sample_temperature=0.5,
        seed=7,
    )
    used = report.settings["generation"]
    assert used["decoding"] == "sampled at temperature 0.5, seed 7"
    assert used["bleu"].startswith("sacrebleu nrefs:2|case:mixed")
    assert "rouge-score" in used["rougeL"]
    assert set(report.tasks["generation"]["bleu"]) >= {"value", "stderr", "n", "over", "unit", "better", "title"}
    assert report.tasks["generation"]["bleu/who"]["title"] == "BLEU: who"


def test_hellaswag_takes_its_rows_and_leaves_the_text_to_the_others(model_dir, prose_file, tmp_path):
    (tmp_path / "hellaswag").mkdir()
    row = {"activity_label": "Fog", "ctx": "It rained.", "endings": ["It stopped.", "the fox"], "label": 0}
    (tmp_path / "hellaswag" / "dev.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    root = InstructionConfig(task_root=tmp_path)
    report = evaluated(
        str(model_dir), ["perplexity", "hellaswag"], data=str(prose_file), limit=2, instructions=root, device="cpu"
    )
    assert report.tasks["hellaswag"]["acc_nanogpt"]["n"] == 2
    assert report.settings["hellaswag"]["source"] == "local dev.jsonl"
    with pytest.raises(DataError, match="no files of the task"):
        list(
            run_tasks(
                str(model_dir), ["hellaswag"], instructions=InstructionConfig(task_root=tmp_path / "x"), device="cpu"
            )
        )


def test_the_command_scores_and_the_report_shows_both_tasks(model_dir, t5_dir, quiz, tmp_path):
    from click.testing import CliRunner

    from kd import cli as module

    cli = copy.deepcopy(module.cli)  # a command that has run keeps its help option, and with it another help text
    common = ["--tasks", "choices,generation", "--data", quiz, "--device", "cpu", "--stop", "\\n"]
    for name, folder, extra in (
        ("gpt2", model_dir, []),
        ("t5", t5_dir, []),
        ("space", model_dir, ["--separator", " "]),
    ):
        out = ["--out", str(tmp_path / name)]
        done = CliRunner().invoke(cli, ["eval", str(folder), *common, *extra, *out], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "exact_match_mean_of_tasks  " in done.output
    assert load_report(tmp_path / "gpt2").settings["generation"]["stop"] == "\n"
    assert load_report(tmp_path / "space").settings["choices"]["separator"] == " "
    done = CliRunner().invoke(
        cli, ["report", str(tmp_path / "gpt2"), str(tmp_path / "t5"), "--out", str(tmp_path / "report")]
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report/report.md").read_text("utf-8")
    assert "## choices: quiz (train)" in text
    assert "## generation: quiz (train)" in text
    assert "| accuracy ↑ | accuracy, mean of tasks ↑ | accuracy by sum ↑ |" in text
    assert "| unfinished |" in text
    assert (
        'Over 6 examples, 6 documents, bos True, encoding "training", examples skipped 0, prompts cut 0, separator "\\\\n".'
        in text
    )


def test_every_task_gives_every_metric_it_promises(report):
    assert {name: set(metrics) for name, metrics in report.tasks.items()} == {
        "perplexity": set(TASKS["perplexity"].metrics),
        "agreement": set(TASKS["agreement"].metrics) - set(KEPT),  # those over all tokens need the teacher at hand
    }


def test_a_report_of_a_release_with_one_name_for_both_divergences_is_read_as_what_it_measured(report, tmp_path):
    old_name = {new: old for old, new in KEPT.items()}

    def named_as_before(figures):
        return {old_name.get(metric, metric): value for metric, value in figures.items()}

    kept = report.documents["agreement"]
    before = replace(
        report,
        tasks=report.tasks | {"agreement": named_as_before(report.tasks["agreement"])},
        documents=report.documents | {"agreement": kept | {"influence": named_as_before(kept["influence"])}},
    )
    before.save(tmp_path / "cached")
    assert load_report(tmp_path / "cached") == report
    live = {"agreement": {k: v for k, v in report.settings["agreement"].items() if k != "cache_fingerprint"}}
    replace(before, settings=report.settings | live).save(tmp_path / "live")
    assert set(load_report(tmp_path / "live").tasks["agreement"]) >= {"kl", "jsd"}


def test_a_saved_report_is_read_back_equal_and_saved_to_the_same_bytes(report, tmp_path):
    path = report.save(tmp_path / "a")
    loaded = load_report(tmp_path / "a")
    assert loaded == report
    again = loaded.save(tmp_path / "b")
    assert path.read_bytes() == again.read_bytes()
    assert (tmp_path / "a/documents.json").read_bytes() == (tmp_path / "b/documents.json").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["documents.json", "eval.json"]


def test_saved_influences_give_the_saved_error(report):
    for task, metrics in report.tasks.items():
        for metric, figure in metrics.items():
            error = standard_error(np.array(report.documents[task]["influence"][metric]))
            assert error == pytest.approx(figure["stderr"], rel=1e-4, abs=1e-9)  # influences are kept to six digits


def test_a_perplexity_that_overflows_is_null_and_not_invalid_json(report, student, tokenizer, prose, tmp_path):
    import torch

    wild = copy.deepcopy(student)
    with torch.no_grad():
        wild.transformer.ln_f.weight.mul_(1e4)
    wild.save_pretrained(tmp_path / "wild")
    tokenizer.save_pretrained(tmp_path / "wild")
    steps = run_tasks(str(tmp_path / "wild"), ["perplexity"], data=prose.spec, seq_len=24, device="cpu")
    found = final(steps)
    assert found.tasks["perplexity"]["nll_per_token"]["value"] > 1000
    document = json.loads(found.save(tmp_path / "out").read_text("utf-8"))
    assert document["tasks"]["perplexity"]["perplexity"]["value"] is None


def test_an_unknown_task_suggests_the_nearest(prose_file):
    with pytest.raises(DataError, match="unknown task") as error:
        next(run_tasks("nowhere", ["perplexty"], data=str(prose_file)))
    assert error.value.details["did you mean"] == "perplexity"


@pytest.mark.parametrize(("task", "option"), [("perplexity", "--data"), ("agreement", "--cache")])
def test_a_task_without_what_it_needs_says_which_option(task, option):
    with pytest.raises(DataError, match=f"the task {task} needs") as error:
        next(run_tasks("nowhere", [task]))
    assert option in error.value.details["try"]


def test_another_tokenizer_than_the_caches_is_refused_before_weights_are_loaded(tmp_path, exact_cache, tokenizer_dir):
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    document["model"]["vocab"]["x"], document["model"]["vocab"]["y"] = (document["model"]["vocab"][c] for c in "yx")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CacheMismatchError):  # there are no weights in that folder to load
        next(run_tasks(str(tmp_path), ["agreement"], cache=exact_cache))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": "kd-eval", "format_version": 99}', '{"format": "kd-eval"}']
)
def test_a_file_that_is_not_an_evaluation_is_refused_by_name(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError) as error:
        load_report(tmp_path)
    assert "eval.json" in str(error.value.details["where"])


def test_importing_the_registry_loads_no_heavy_library():
    code = (
        "import sys, kd.evaluation.evaluator, kd.evaluation.report.writing; print([m for m in ('torch', 'transformers', "
        "'zarr', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
