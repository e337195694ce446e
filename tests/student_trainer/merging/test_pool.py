"""Pool files: three layouts, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.student_trainer.merging.pool import read_pool
from kd.student_trainer.run_folder import write_classifier_run

LISTED = """
type: HF_GPT2ForSequenceClassification
models:
  - name: _pretrained_
    path: gpt2
  - name: cola
    path: tanganke/gpt2_cola
  - name: mnli
    path: tanganke/gpt2_mnli
"""
TARGETED = """
_target_: fusion_bench.modelpool.GPT2ForSequenceClassificationPool
_model_loader: transformers.GPT2Model.from_pretrained
models:
  _pretrained_:
    _target_: ${..._model_loader}
    pretrained_model_name_or_path: gpt2
  cola:
    _target_: ${..._model_loader}
    pretrained_model_name_or_path: tanganke/gpt2_cola
  mnli:
    _target_: ${..._model_loader}
    pretrained_model_name_or_path: tanganke/gpt2_mnli
train_datasets:
  mnli:
    _target_: ${..._dataset_loader}
    split: train
tokenizer:
  pretrained_model_name_or_path: gpt2
"""
OURS = """
base: gpt2
models:
  cola: tanganke/gpt2_cola
  mnli: {path: tanganke/gpt2_mnli}
"""


@pytest.mark.parametrize("text", [LISTED, TARGETED, OURS])
def test_three_layouts_name_the_same_pool(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.yaml").write_text(text)
    pool = read_pool(tmp_path / "pool.yaml")
    assert pool.need_base("a test").path == "gpt2"
    assert {m.name: m.path for m in pool.models} == {"cola": "tanganke/gpt2_cola", "mnli": "tanganke/gpt2_mnli"}


def test_a_folder_beside_the_file_comes_before_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "runs" / "cola").mkdir(parents=True)
    (tmp_path / "pool.yaml").write_text("models: {cola: runs/cola, sst2: runs/sst2}")
    pool = read_pool(tmp_path / "pool.yaml")
    assert [m.path for m in pool.models] == [str(tmp_path / "runs" / "cola"), "runs/sst2"]
    with pytest.raises(DataError, match="ties starts from a base"):
        pool.need_base("ties")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {}", "not a pool of models"),
        ("- cola", "the pool is not a mapping"),
        ("models: [cola]", "no names"),
        ("models: {cola: 3}", "not a path"),
        ("models: {cola: {data: x}}", "no path"),
        ("models: {cola: {path: x, weight: 2}}", "unknown key"),
        ("modles: {}\nmodels: {cola: x}", "unknown key"),
        ("models: {_pretrained_: gpt2}", "besides the base"),
        ("base: a\nmodels: {_pretrained_: b, cola: c}", "the same name"),
        ("models: [{name: a, path: x}, {name: a, path: y}]", "the same name"),
        ("models: {cola: x", "cannot read"),
    ],
)
def test_faulty_pools_are_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_pool(tmp_path / "pool.yaml")
    assert "pool.yaml" in str(caught.value)


def save_classifier(folder: Path, task: str, model: str = "gpt2") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_classifier_run(folder, {"task": task, "settings": {"model": model, "revision": None}})


def test_a_folder_of_classifiers_is_a_pool(tmp_path: Path) -> None:
    for name, task in (("b-rte", "rte"), ("a-cola", "cola")):
        save_classifier(tmp_path / name, task)
    (tmp_path / "notes").mkdir()
    pool = read_pool(tmp_path)
    assert [(m.name, m.path) for m in pool.models] == [
        ("cola", str(tmp_path / "a-cola")),
        ("rte", str(tmp_path / "b-rte")),
    ]
    assert pool.base is not None
    assert pool.base.path == "gpt2"


def test_a_folder_that_is_no_pool_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no classifiers"):
        read_pool(tmp_path)
    save_classifier(tmp_path / "one", "rte")
    save_classifier(tmp_path / "two", "rte")
    with pytest.raises(DataError, match="same name"):
        read_pool(tmp_path)
    save_classifier(tmp_path / "other" / "one", "rte")
    save_classifier(tmp_path / "other" / "two", "cola", model="distilgpt2")
    with pytest.raises(DataError, match="began with different models") as caught:
        read_pool(tmp_path / "other")
    assert "two from distilgpt2" in str(caught.value)
