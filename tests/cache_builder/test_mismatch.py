"""What does not belong together is refused before any step: with the difference, and what to try."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.records.manifest import load_manifest
from kd.common.errors import CacheMismatchError, DataError
from kd.common.settings import make
from kd.data.data_settings import InstructionConfig
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train


@pytest.fixture(scope="module")
def built(tmp_path_factory, build_request, run_build, model_dir) -> tuple[Path, Path]:
    """A cache, and the teacher's own folder, which tests may change."""
    folder = tmp_path_factory.mktemp("mismatch")
    shutil.copytree(model_dir, folder / "teacher")
    run_build(build_request(folder / "c", model=folder / "teacher"))
    return folder / "c", folder / "teacher"


def refused(action, *words: str) -> None:
    """The error has each of the words, and says what to try."""
    with pytest.raises((CacheMismatchError, DataError)) as caught:
        action()
    text = str(caught.value)
    for word in (*words, r"\n  try  "):
        assert re.search(word, text), text


def again(request) -> None:
    next(build(plan_build(request)))


def test_changed_weights_under_the_same_name(tmp_path, built, build_request, save_model):
    cache, teacher = built
    shutil.copytree(cache, tmp_path / "c")
    shutil.copytree(teacher, tmp_path / "teacher")
    again(build_request(tmp_path / "c", model=tmp_path / "teacher"))
    save_model(tmp_path / "teacher", seed=5)
    refused(
        lambda: again(build_request(tmp_path / "c", model=tmp_path / "teacher")),
        "made from something else",
        r"differs teacher\.weights\S*\s+asked for \w+…\w+, the cache has \w+…\w+",
        "another --out",
    )


def test_other_text(tmp_path, built, build_request, text_file):
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text().replace("a", "e", 1))
    refused(
        lambda: again(build_request(built[0], model=built[1], text=other)), r"differs corpus\.text_digest\s+asked for"
    )


def test_another_k(built, build_request):
    refused(
        lambda: again(build_request(built[0], model=built[1], top_k=4)),
        r"differs targets\.top_k\s+asked for 4, the cache has 8",
    )


def test_another_tokenizer_of_the_teacher(tmp_path, built, build_request):
    cache, teacher = built
    shutil.copytree(teacher, tmp_path / "teacher")
    document = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary[a], vocabulary[b] = j, i
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(document))
    Tokenizer.from_file(str(tmp_path / "teacher" / "tokenizer.json"))
    refused(
        lambda: again(build_request(cache, model=tmp_path / "teacher")), r"differs tokenizer\.fingerprint\s+asked for"
    )


def test_another_length_of_blocks(built, build_request):
    refused(
        lambda: again(build_request(built[0], model=built[1], seq_len=16)),
        r"differs blocks\.seq_len\s+asked for 16, the cache has 32",
    )


def test_another_template(tmp_path, build_request, run_build):
    (tmp_path / "boolq").mkdir()
    rows = [{"question": f"is {n} a number", "passage": f"{n} is a number.", "answer": True} for n in range(4)]
    (tmp_path / "boolq" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def request(template: int):
        corpus = load_corpus("flan:boolq", instructions=InstructionConfig(template, task_root=tmp_path))
        return dataclasses.replace(
            build_request(tmp_path / "c"), corpus=corpus, blocks=BlockConfig(seq_len=64, overlong="truncate")
        )

    run_build(request(0))
    refused(lambda: again(request(1)), r"differs corpus\.text_digest\s+asked for")


def test_another_format_version(tmp_path, build_request):
    golden = Path(__file__).parents[1] / "golden" / "v1"
    shutil.copytree(golden, tmp_path / "c")
    refused(
        lambda: again(build_request(tmp_path / "c", top_k=4)),
        "older format",
        r"format version 1",
        "expected +2",
        "another --out",
    )
    document = json.loads((tmp_path / "c" / "manifest.json").read_text())
    from hostile import sign_manifest

    sign_manifest(tmp_path / "c", document | {"format_version": 4})
    refused(lambda: load_manifest(tmp_path / "c"), "another format version", r"found +4", "a kd release that reads it")


def settings(cache: Path, student: Path, tmp_path: Path, **more) -> TrainConfig:
    values = {"cache": cache, "student": student, "out": tmp_path / "run", "max_steps": 1, "device": "cpu"}
    return make(TrainConfig, values | more)


def test_a_student_with_another_tokenizer(tmp_path, built, student_of):
    student = student_of()
    document = json.loads((student / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary[a], vocabulary[b] = j, i
    (student / "tokenizer.json").write_text(json.dumps(document))
    refused(
        lambda: train(settings(built[0], student, tmp_path)),
        "tokenizer is not the teacher's",
        r"differs +2 of 400 ids",
        r"first +id 398: teacher '.*', model '.*'",
        "--loss text-kl, for any tokenizer",
    )
    assert not (tmp_path / "run").exists()


def test_a_student_whose_window_is_too_short(tmp_path, built, student_of):
    refused(
        lambda: train(settings(built[0], student_of(positions=16), tmp_path)),
        "longer than the student's window",
        r"found +32 tokens",
        r"expected +at most 16",
        "--seq-len 16",
    )
    assert not (tmp_path / "run").exists()


def test_more_tokens_per_row_than_there_are(tmp_path, built, student_of):
    from kd.common.errors import CacheError

    with pytest.raises(CacheError, match="does not hold that many tokens") as caught:
        train(settings(built[0], student_of(), tmp_path, top_k=9))
    assert "1..8" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def student_of(tmp_path, save_student):
    def make(positions: int = 64) -> Path:
        return save_student(tmp_path / f"student{positions}", n_positions=positions, n_embd=16, n_layer=1)

    return make
