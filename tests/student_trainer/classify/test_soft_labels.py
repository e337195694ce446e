"""A classifier's answers in a cache, and classifiers that learn from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, BertConfig

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest, GenerationConfig
from kd.cache_builder.share.dataset_card import dataset_card
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.cli import cli
from kd.common.errors import CacheMismatchError, DataError, KdError, TeacherError
from kd.common.progress import final
from kd.common.settings import changed, make
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.glue import PAIR, load_glue
from kd.data.left_out import recorded
from kd.data.sources import load_classes, load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.evaluation.merged.glue_scores import evaluate_classifier, load_heads
from kd.evaluation.merged.merged_settings import ClassifierEvaluation, GlueRowSettings
from kd.models.classifiers import load_classifier, split_classifier
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.classify.classifier_training import train_classifier
from kd.student_trainer.classify.classify_settings import ClassifyConfig
from kd.student_trainer.classify.encoding import PadBatch, encode_rows, pad_rows
from kd.student_trainer.classify.soft_labels import read_classes
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets
from kd.student_trainer.merging.pool import read_pool

TEMPERATURES = (1.0, 2.0, 4.0)


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama"])
def teacher(
    request: Any, layouts: dict[str, Path], make_classifier: Callable[..., Path], tmp_path_factory: Any
) -> Path:
    return make_classifier(tmp_path_factory.mktemp("teacher"), "mnli", layouts[request.param], seed=5)


@pytest.fixture(scope="module")
def sst2_teacher(layouts: dict[str, Path], make_classifier: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return make_classifier(tmp_path_factory.mktemp("sst2"), "sst2", layouts["gpt2"], seed=7)


def classes_request(
    teacher: Path,
    glue_root: Path,
    out: Path,
    task: str = "mnli",
    *,
    split: str = "train",
    limit: int | None = None,
    **rest: Any,
) -> BuildRequest:
    corpus = load_classes(f"glue/{task}", split=split, limit=limit, instructions=InstructionConfig(task_root=glue_root))
    count = len(corpus.examples[0].choices)
    settings: dict[str, Any] = {"blocks": BlockConfig(64), **rest}
    return BuildRequest(
        out,
        ModelRequest(str(teacher), device="cpu"),
        corpus,
        targets=TargetConfig.of_profile("kl", top_k=count, logprob_codec="float32"),
        **settings,
    )


def built(request: BuildRequest) -> CacheReader:
    list(build(plan_build(request)))
    return CacheReader(request.out)


@pytest.fixture
def soft(sst2_teacher: Path, glue_root: Path, tmp_path: Path) -> Path:
    return built(classes_request(sst2_teacher, glue_root, tmp_path / "soft", "sst2")).root


@pytest.fixture
def config(soft: Path, layouts: dict[str, Path], tmp_path: Path) -> ClassifyConfig:
    settings = {
        "model": str(layouts["llama"]),
        "out": str(tmp_path / "run"),
        "cache": str(soft),
        "lr": 5e-3,
        "max_length": 64,
        "device": "cpu",
        "log_every": 5,
    }
    return make(ClassifyConfig, settings)


def test_a_cache_holds_softmax_of_the_models_own_logits_at_every_temperature(
    teacher: Path, glue_root: Path, tmp_path: Path
) -> None:
    reader = built(classes_request(teacher, glue_root, tmp_path / "c", tokens_per_batch=50))
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    encoded = encode_rows(load_tokenizer(str(teacher)), load_glue(str(glue_root / "mnli")).rows, max_length=64)
    with torch.inference_mode():  # one row at a time, by transformers alone
        logits = torch.cat([model(**pad_rows([ids], 0)).logits for ids in encoded.ids]).double().numpy()
    assert [list(e.context_ids) for e in reader.read(range(len(reader)))] == [list(ids) for ids in encoded.ids]
    for temperature in TEMPERATURES:
        scaled = logits / temperature
        expected = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        _, log_probs = read_classes(reader, temperature=temperature)
        assert np.abs(log_probs - expected).max() < 2e-5  # float32 of logits up to 20, batched otherwise
    assert final(verify(reader.root)) == ()
    right = np.mean(logits.argmax(1) == encoded.labels)
    assert reader.manifest.quality["top1"] / reader.manifest.rows == pytest.approx(right)


def test_the_rows_come_back_as_they_were(teacher: Path, glue_root: Path, tmp_path: Path) -> None:
    original = load_glue(str(glue_root / "mnli"))
    rows, log_probs = read_classes(built(classes_request(teacher, glue_root, tmp_path / "c")))
    assert rows.rows == original.rows
    assert rows.digest == original.digest
    assert rows.task == original.task
    assert np.allclose(np.exp(log_probs.astype(np.float64)).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"profile": "adaptive"}])
def test_rows_without_every_class_are_refused(
    teacher: Path, glue_root: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Three classes: the probability of a dropped one would be whatever lay in memory."""
    whole = built(classes_request(teacher, glue_root, tmp_path / "c")).root
    list(slice_cache(whole, tmp_path / "slice", **settings))
    for reader in (CacheReader(tmp_path / "slice"), CacheReader(whole, top_k=2)):
        with pytest.raises(CacheMismatchError, match="do not hold every class"):
            read_classes(reader)


def test_a_text_of_several_lines_stays_one_text(sst2_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    lines = [{"sentence1": "a\nb", "sentence2": "", "label": 0}, {"sentence1": "", "sentence2": "c\n\nd", "label": 1}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    request = classes_request(sst2_teacher, tmp_path / "glue", tmp_path / "c", "rte")
    request = replace(request, teacher=renamed(request.teacher, tmp_path / "t", ("entailment", "not_entailment")))
    rows, _ = read_classes(built(request))
    assert [row.texts for row in rows.rows] == [("a\nb", ""), ("", "c\n\nd")]
    lines[0]["sentence1"] = f"a{PAIR}b"
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(DataError, match="separates pairs"):
        load_classes("glue/rte", instructions=InstructionConfig(task_root=tmp_path / "glue"))


def renamed(request: ModelRequest, folder: Path, words: tuple[str, ...]) -> ModelRequest:
    """The same classifier with other words for its classes."""
    shutil.copytree(request.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(words)), "label2id": {w: i for i, w in enumerate(words)}}
    (folder / "config.json").write_text(json.dumps(config))
    return replace(request, name=str(folder))


def test_a_classifier_that_numbers_its_classes_otherwise_is_refused(
    sst2_teacher: Path, glue_root: Path, tmp_path: Path
) -> None:
    request = classes_request(sst2_teacher, glue_root, tmp_path / "c", "sst2")
    swapped = renamed(request.teacher, tmp_path / "swapped", ("Positive", "Negative"))
    with pytest.raises(DataError, match="another order"):
        list(build(plan_build(replace(request, teacher=swapped))))
    (pool := tmp_path / "pool.yaml").write_text(f"base: {sst2_teacher}\nmodels: {{sst2: {swapped.name}}}\n")
    with pytest.raises(DataError, match="another order"):
        load_heads(read_pool(pool), GlueRowSettings(glue_root, max_length=64))
    settings = make(ClassifierEvaluation, {"data": str(glue_root / "sst2"), "max_length": 64, "device": "cpu"})
    with pytest.raises(DataError, match="another order"):
        list(evaluate_classifier(swapped.name, settings))
    nameless = renamed(request.teacher, tmp_path / "nameless", ("LABEL_0", "LABEL_1"))
    list(build(plan_build(replace(request, teacher=nameless))))  # says nothing about the order: the reference's files


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    sst2_teacher: Path, glue_root: Path, soft: Path, loss: str, temperature: float
) -> None:
    rows, log_probs = read_classes(CacheReader(soft), temperature=temperature)
    tokenizer = load_tokenizer(str(sst2_teacher))
    encoded = encode_rows(tokenizer, rows.rows, max_length=64)
    model = load_classifier(ModelRequest(str(sst2_teacher), device="cpu"), pad_id=encoded.pad_id)
    with torch.inference_mode():
        logits = model(**pad_rows(encoded.ids, encoded.pad_id)).logits
    logits = logits.clone().requires_grad_()
    teacher = torch.from_numpy(log_probs)
    classes = torch.arange(2).expand_as(logits)
    targets = LossTargets(torch.from_numpy(encoded.labels), classes, teacher, torch.zeros(len(rows.rows)))
    total, kd, _ = Objective(loss, "ghost", temperature=temperature)(logits, targets)
    total.sum().backward()
    assert float(kd.detach().abs().max()) < 1e-6  # float32: differences of logarithms that agree to 1e-6
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-5


def weights(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model.safetensors")


def same(a: str, b: str, *, atol: float) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(np.abs(first[n] - second[n]).max() <= atol for n in first)


def test_cross_entropy_from_a_cache_is_training_from_the_labels(config: ClassifyConfig, glue_root: Path) -> None:
    train_classifier(changed(config, loss="ce", max_steps=6))
    plain = changed(config, cache=None, data=str(glue_root / "sst2"), out=config.out + "-plain", max_steps=6)
    train_classifier(plain)
    assert same(config.out, plain.out, atol=1e-6)  # the same numbers, summed by another function
    records = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert all(r["kd"] is None and r["ce"] == pytest.approx(r["loss"], rel=1e-3) for r in records)


def test_a_step_is_that_of_the_formula_in_float64(config: ClassifyConfig, soft: Path) -> None:
    """One SGD-like look at the gradient norm of the first step: kd at T=2, weighted, with its T^2."""
    config = changed(config, temperature=2.0, alpha=0.7, ce_weight=0.2, max_steps=1, batch_size=48)
    train_classifier(config)
    record = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[0])
    rows, log_p = read_classes(CacheReader(soft), temperature=2.0)
    request = ModelRequest(config.model, device="cpu", seed=config.seed)
    encoded = encode_rows(load_tokenizer(config.model), rows.rows, max_length=64)
    model = load_classifier(request, rows.task.labels, pad_id=encoded.pad_id).double()
    logits = model(**pad_rows(encoded.ids, encoded.pad_id)).logits  # this layout has no dropout
    p = torch.from_numpy(log_p).double()
    kd = (p.exp() * (p - (logits / 2).log_softmax(1))).sum(1).mean()
    ce = torch.nn.functional.cross_entropy(logits, torch.from_numpy(encoded.labels))
    loss = 0.7 * 4 * kd + 0.2 * ce
    loss.backward()
    norm = torch.sqrt(sum((w.grad**2).sum() for w in model.parameters() if w.grad is not None))
    for name, expected in (("kd", kd), ("ce", ce), ("loss", loss), ("grad_norm", norm)):
        assert record[name] == pytest.approx(float(expected.detach()), rel=2e-5), name  # float32 against float64


def test_accumulated_batches_are_one_batch(config: ClassifyConfig) -> None:
    train_classifier(changed(config, max_steps=4, batch_size=8))
    parts = changed(config, max_steps=4, batch_size=2, accumulate=4, out=config.out + "-parts")
    train_classifier(parts)
    assert same(config.out, parts.out, atol=2e-5)  # float32 sums in another order, through Adam's square root


def test_a_student_of_another_layout_learns_its_teachers_answers(config: ClassifyConfig, soft: Path) -> None:
    result = train_classifier(changed(config, epochs=30))
    rows, log_p = read_classes(CacheReader(soft))
    encoded = encode_rows(load_tokenizer(config.model), rows.rows, max_length=64)
    student = AutoModelForSequenceClassification.from_pretrained(config.out).eval()
    with torch.inference_mode():
        log_q = student(**pad_rows(encoded.ids, encoded.pad_id)).logits.log_softmax(1).numpy()
    p = np.exp(log_p)
    first = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[0])
    assert (p * (log_p - log_q)).sum(1).mean() < 0.2 * first["kd"]
    run = json.loads((Path(config.out) / "classify.json").read_text())
    assert run["rows"]["fingerprint"] == CacheReader(soft).manifest.fingerprint
    assert run["rows"]["digest"] == rows.digest
    assert result.rows == 48


def test_batches_carry_the_teacher(soft: Path) -> None:
    rows, log_probs = read_classes(CacheReader(soft), limit=3)
    encoded = replace(encode_rows(load_tokenizer("demo"), rows.rows), teacher=log_probs)
    batch = PadBatch(0)([encoded.take([2, 0])[i] for i in range(2)])
    assert np.array_equal(batch["teacher"].numpy(), log_probs[[2, 0]])


def test_train_and_dev_merge_but_classes_of_other_words_do_not(
    sst2_teacher: Path, glue_root: Path, tmp_path: Path, soft: Path
) -> None:
    dev = built(classes_request(sst2_teacher, glue_root, tmp_path / "dev", "sst2", split="dev")).root
    list(merge_caches([soft, dev], tmp_path / "both"))
    rows, _ = read_classes(CacheReader(tmp_path / "both"))
    assert [row.id for row in rows.rows] == [f"train/{i}" for i in range(48)] + [f"dev/{i}" for i in range(20)]
    assert read_classes(CacheReader(tmp_path / "both"), limit=50)[0].rows == rows.rows[:50]
    request = classes_request(sst2_teacher, glue_root, tmp_path / "cola", "cola")
    cola = built(
        replace(request, teacher=renamed(request.teacher, tmp_path / "t", ("unacceptable", "acceptable")))
    ).root
    with pytest.raises(CacheMismatchError, match="labels"):
        list(merge_caches([soft, cola], tmp_path / "no"))


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_texts_longer_than_the_window(sst2_teacher: Path, glue_root: Path, tmp_path: Path, policy: str) -> None:
    encoded = encode_rows(load_tokenizer(str(sst2_teacher)), load_glue(str(glue_root / "sst2")).rows)
    lengths = np.array([len(ids) for ids in encoded.ids])
    limit = int(np.median(lengths))
    over = int((lengths > limit).sum())
    assert 0 < over < 48
    request = classes_request(sst2_teacher, glue_root, tmp_path / "c", "sst2", blocks=BlockConfig(limit))
    with pytest.raises(DataError, match="longer than the limits"):
        plan_build(request)
    reader = built(replace(request, blocks=BlockConfig(limit, overlong=policy)))
    left_out = recorded(reader.manifest.provenance)
    cut = encode_rows(load_tokenizer(str(sst2_teacher)), load_glue(str(glue_root / "sst2")).rows, max_length=limit)
    kept = [list(ids) for ids, length in zip(cut.ids, lengths, strict=True) if policy == "truncate" or length <= limit]
    assert [list(e.context_ids) for e in reader.read(range(len(reader)))] == kept
    assert left_out is not None
    assert left_out.counts == {"too_long" if policy == "drop" else "shortened": over}


def test_what_does_not_belong_together_is_refused(
    sst2_teacher: Path, glue_root: Path, tmp_path: Path, soft: Path, build_request: Any, config: ClassifyConfig
) -> None:
    request = classes_request(sst2_teacher, glue_root, tmp_path / "c", "sst2")
    with pytest.raises(DataError, match="another number of classes"):
        plan_build(classes_request(sst2_teacher, glue_root, tmp_path / "c", "mnli"))
    with pytest.raises(DataError, match="keeps all of them"):
        plan_build(replace(request, targets=TargetConfig.of_profile("kl", top_k=1)))
    with pytest.raises(DataError, match="keeps all of them"):
        plan_build(replace(request, targets=TargetConfig.of_profile("uld", top_k=2)))
    with pytest.raises(DataError, match="in 4 bits"):
        plan_build(replace(request, teacher=replace(request.teacher, load_in_4bit=True)))
    with pytest.raises(DataError, match="writes no text"):
        plan_build(replace(request, generation=GenerationConfig()))
    with pytest.raises(DataError, match="only score a classification data set"):
        plan_build(replace(request, corpus=load_corpus("demo", limit=1)))
    tokens = build_request(tmp_path / "tokens")
    with pytest.raises(DataError, match="only a classifier can score"):
        plan_build(replace(tokens, corpus=request.corpus))
    list(build(plan_build(tokens)))
    with pytest.raises(CacheMismatchError, match="over tokens"):
        train_classifier(changed(config, cache=str(tmp_path / "tokens")))
    with pytest.raises(CacheMismatchError, match="another task"):
        train_classifier(changed(config, task="mnli"))
    with pytest.raises(DataError, match="unknown loss"):
        train_classifier(changed(config, loss="uld"))
    with pytest.raises(DataError, match="that temperature"):
        train_classifier(changed(config, temperature=3.0))
    with pytest.raises(DataError, match="its own rows"):
        changed(config, data="glue/sst2")
    with pytest.raises(DataError, match="no teacher"):
        changed(config, cache=None, task="sst2", alpha=0.5)
    with pytest.raises(TeacherError, match="predicts no tokens"):
        load_model(request.teacher)
    with pytest.raises(DataError, match="in 4 bits"):
        load_classifier(replace(request.teacher, load_in_4bit=True), pad_id=0)
    with pytest.raises(DataError, match="takes no templates and no --columns"):
        load_classes("glue/sst2", columns={"text": "sentence"})
    assert not (tmp_path / "c").exists()


@pytest.fixture
def encoder(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A classifier of BERT's layout by its configuration and tokenizer; there are no weights."""
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "encoder")
    shutil.copytree(tokenizer_dir, tmp_path / "encoder", dirs_exist_ok=True)
    return tmp_path / "encoder"


def test_an_encoder_is_refused_by_the_plan_from_its_configuration_alone(
    encoder: Path, glue_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="head is not a single linear layer") as caught:
        plan_build(classes_request(encoder, glue_root, tmp_path / "c", "sst2"))
    details = caught.value.details
    assert (details["where"], details["found"]) == (str(encoder), "BertForSequenceClassification")
    assert "GPT-2" in details["expected"]
    assert "kd classify train" in details["try"]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("more", "message"), [([], "head is not a single linear layer"), (["--targets", "teacher"], "predicts no tokens")]
)
def test_a_refused_teacher_leaves_no_folder(
    encoder: Path, glue_root: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(KdError, match=message):
        run_cli(
            "cache",
            "build",
            "--teacher",
            str(encoder),
            "--data",
            "glue/sst2",
            "--task-root",
            str(glue_root),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "c"),
            *more,
        )
    assert not (tmp_path / "c").exists()


def test_a_language_students_training_refuses_classes(soft: Path, tmp_path: Path) -> None:
    from kd.common.settings import make
    from kd.student_trainer.configuration.train_config import TrainConfig
    from kd.student_trainer.training import train

    for loss in ("kl", "ce"):
        values = {"cache": soft, "student": "random:demo-student", "out": tmp_path / "run", "loss": loss}
        with pytest.raises(CacheMismatchError, match="over classes"):
            train(make(TrainConfig, values | {"device": "cpu"}))


def test_a_head_that_bends_its_logits_is_refused(sst2_teacher: Path) -> None:
    model = load_classifier(ModelRequest(str(sst2_teacher), device="cpu"), pad_id=0)
    split_classifier(model, 0)
    model.score.register_forward_hook(lambda module, inputs, output: torch.tanh(output))
    with pytest.raises(TeacherError, match="changes its logits"):
        split_classifier(model, 0)


def test_padding_is_not_read_wherever_it_stands(sst2_teacher: Path) -> None:
    """As transformers does it: the last token that is not the pad token, of a text of padding the first."""
    model = load_classifier(ModelRequest(str(sst2_teacher), device="cpu"), pad_id=3)
    texts = [np.array(ids) for ids in ([5, 6, 3, 3], [3], [3, 7, 3], [9, 8, 7, 6, 5], [3, 3])]
    head = split_classifier(model, 3)
    with torch.inference_mode():
        logits = head.logits(head.scored_hidden(texts, []))
        expected = torch.cat([model(input_ids=torch.from_numpy(text)[None]).logits for text in texts])
    assert torch.allclose(logits, expected, atol=1e-5)


def run_cli(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words), catch_exceptions=False)


def test_the_command_line_from_rows_to_student(
    glue_root: Path, sst2_teacher: Path, layouts: Any, tmp_path: Path
) -> None:
    build_words = [
        "cache",
        "build",
        "--teacher",
        str(sst2_teacher),
        "--data",
        "glue/sst2",
        "--task-root",
        str(glue_root),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "soft"),
    ]
    assert run_cli(*build_words).exit_code == 0
    again = run_cli(*build_words, "--json")
    assert json.loads(again.stdout)["reused"] is True
    info = json.loads(run_cli("cache", "info", str(tmp_path / "soft"), "--json").stdout)
    assert "kd classify train --cache x://y --model" in dataset_card(tmp_path / "soft", "x://y")
    assert (info["kind"], info["vocabulary_size"], info["top_k"], info["logprob_codec"]) == ("classes", 2, 2, "float32")
    done = run_cli(
        "classify",
        "train",
        "--cache",
        str(tmp_path / "soft"),
        "--model",
        str(layouts["gpt_neox"]),
        "--max-length",
        "64",
        "--max-steps",
        "3",
        "--temperature",
        "2",
        "--loss",
        "jsd",
        "--beta",
        "0.3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--json",
    )
    assert json.loads(done.stdout)["task"] == "sst2"
    scored = run_cli(
        "classify", "eval", str(tmp_path / "run"), "--task-root", str(glue_root), "--max-length", "64", "--json"
    )
    assert json.loads(scored.stdout)[str(tmp_path / "run")]["rows"] == 20
