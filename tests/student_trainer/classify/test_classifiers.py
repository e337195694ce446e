"""Classifiers: tokens, padding, pooling, training, LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from kd.common.errors import DataError
from kd.common.settings import changed, make
from kd.data.instruction_tasks.glue import LabelledRow, load_glue
from kd.models.classifiers import load_classifier
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer, pad_token_id
from kd.student_trainer.classify.classifier_training import train_classifier
from kd.student_trainer.classify.classify_settings import ClassifyConfig
from kd.student_trainer.classify.encoding import PadBatch, encode_rows, length_batches, pad_rows
from kd.student_trainer.classify.pooling import pooled_states


@pytest.fixture
def encoded(glue_root: Path, tokenizer: Any) -> Any:
    return encode_rows(tokenizer, load_glue(str(glue_root / "mrpc")).rows, max_length=64)


def test_a_pair_is_its_two_texts_tokens_one_after_the_other(tokenizer: Any) -> None:
    rows = [LabelledRow("0", ("the fox", "the river"), 0)]
    apart = [tokenizer(text)["input_ids"] for text in rows[0].texts]
    assert list(encode_rows(tokenizer, rows).ids[0]) == apart[0] + apart[1]


def test_gpt2s_own_tokenizer_puts_nothing_between_a_pair(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "gpt2"))
    first, second = "It rained.", "It was dry."
    assert list(encode_rows(tokenizer, [LabelledRow("0", (first, second), 0)]).ids[0]) == [
        *tokenizer(first)["input_ids"],
        *tokenizer(second)["input_ids"],
    ]
    assert pad_token_id(tokenizer) == 50256


def test_the_longer_text_of_a_pair_is_cut_first(tokenizer: Any) -> None:
    short, long = "ding", "dong " * 40
    ids = encode_rows(tokenizer, [LabelledRow("0", (short, long), 0)], max_length=12).ids[0]
    whole = tokenizer(short)["input_ids"]
    assert len(ids) == 12
    assert list(ids[: len(whole)]) == whole


def test_an_empty_text_is_one_padding_token(tokenizer: Any) -> None:
    assert encode_rows(tokenizer, [LabelledRow("0", ("",), 1)]).ids == ((pad_token_id(tokenizer),),)


@pytest.mark.parametrize("layout", ["gpt2", "gpt_neox", "llama"])
def test_padding_to_the_longest_row_gives_the_logits_of_padding_to_the_limit(
    layouts: dict[str, Path], encoded: Any, layout: str
) -> None:
    model = load_classifier(ModelRequest(str(layouts[layout]), device="cpu"), ("no", "yes"), pad_id=0)
    ids = encoded.ids[:6]
    with torch.inference_mode():
        short = model(**pad_rows(ids, 0)).logits
        full = model(**pad_rows(ids, 0, length=64)).logits
        alone = torch.cat([model(**pad_rows([row], 0)).logits for row in ids])
    # float32 sums in other block sizes; logits are of order 1
    assert torch.allclose(short, full, atol=1e-5)
    assert torch.allclose(short, alone, atol=1e-5)


@pytest.mark.parametrize("layout", ["gpt2", "gpt_neox", "llama"])
def test_pooled_states_under_the_head_are_the_models_own_logits(
    layouts: dict[str, Path], encoded: Any, layout: str
) -> None:
    model = load_classifier(ModelRequest(str(layouts[layout]), device="cpu"), ("no", "yes"), pad_id=0)
    with torch.inference_mode():
        expected = model(**pad_rows(encoded.ids, 0)).logits
    states = pooled_states(model.base_model, encoded, tokens_per_batch=100)
    assert torch.allclose(states @ model.score.weight.T, expected, atol=1e-5)


def test_batches_by_length_hold_every_row_once_within_the_budget(encoded: Any) -> None:
    batches = list(length_batches(encoded, 60))
    assert sorted(i for numbers, _ in batches for i in numbers) == list(range(len(encoded)))
    assert all(batch["input_ids"].numel() <= 60 or len(numbers) == 1 for numbers, batch in batches)


def test_a_new_head_follows_the_seed_and_takes_the_labels_names(layouts: dict[str, Path]) -> None:
    def head(seed: int) -> torch.Tensor:
        request = ModelRequest(str(layouts["gpt2"]), device="cpu", seed=seed)
        model = load_classifier(request, ("no", "maybe", "yes"), pad_id=0)
        assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
        return model.score.weight.detach()

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))


def test_what_is_no_classifier_or_has_other_classes_or_heads_is_refused(
    layouts: dict[str, Path], gpt2_pool: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="not a classifier"):
        load_classifier(ModelRequest(str(layouts["gpt2"]), device="cpu"), pad_id=0)
    cola = ModelRequest(gpt2_pool.models[0].path, device="cpu")
    with pytest.raises(DataError, match="another number of classes"):
        load_classifier(cola, ("a", "b", "c"), pad_id=0)
    encoder = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(encoder).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="head is not a single linear layer"):
        load_classifier(ModelRequest(str(tmp_path), device="cpu"), pad_id=0)


@pytest.fixture
def config(glue_root: Path, layouts: dict[str, Path], tmp_path: Path) -> ClassifyConfig:
    settings = {
        "model": str(layouts["llama"]),
        "out": str(tmp_path / "run"),
        "data": str(glue_root / "sst2"),
        "epochs": 3,
        "lr": 5e-3,
        "max_length": 64,
        "device": "cpu",
        "log_every": 5,
    }
    return make(ClassifyConfig, settings)


def weights(folder: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(Path(folder) / "model.safetensors")


def test_training_learns_and_what_is_saved_loads_with_transformers(config: ClassifyConfig) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    records: list[Any] = []
    result = train_classifier(config, on_step=records.append)
    assert result.steps == 18  # 48 rows in batches of 8, three times
    assert [r.step for r in records][-1] == 18
    assert result.loss < 0.3 < records[0].loss  # the label is the first word: chance is ln 2
    model = AutoModelForSequenceClassification.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    dev = load_glue(config.rows.data, split="dev").rows
    batch = tokenizer([row.texts[0] for row in dev], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (logits.argmax(dim=-1).numpy() == [row.label for row in dev]).mean() > 0.8
    document = json.loads((Path(config.out) / "classify.json").read_text())
    assert (document["task"], document["rows"]["split"]) == ("sst2", "train")
    assert not list(Path(config.out).glob("*.bin"))


def test_equal_settings_give_equal_weights_and_another_seed_others(config: ClassifyConfig, tmp_path: Path) -> None:
    trained = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = changed(config, out=str(tmp_path / name), seed=seed, max_steps=4)
        train_classifier(run)
        trained.append(weights(run.out))
    assert all(np.array_equal(trained[0][k], trained[1][k]) for k in trained[0])
    assert not np.array_equal(trained[0]["score.weight"], trained[2]["score.weight"])


def test_padding_to_the_limit_trains_the_same_model(config: ClassifyConfig, tmp_path: Path) -> None:
    runs = [
        changed(config, out=str(tmp_path / str(pad)), pad_to_max=pad, max_steps=4, lr=1e-3) for pad in (False, True)
    ]
    losses = [train_classifier(run).loss for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # float32 sums in other block sizes, over four steps


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_lora_trains_a_small_share_and_is_merged_into_the_output(
    config: ClassifyConfig, layouts: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    run = changed(config, model=str(layouts[layout]), out=str(tmp_path / "lora"), lora=2, max_steps=6)
    result = train_classifier(run)
    assert result.trained_parameters < 0.2 * result.parameters
    saved, before = weights(run.out), weights(str(layouts[layout]))
    assert not any("lora" in name for name in saved)
    names = {name.removeprefix("model.").removeprefix("transformer."): value for name, value in before.items()}
    moved = {
        n
        for n, v in saved.items()
        if (key := n.removeprefix("model.").removeprefix("transformer.")) not in names
        or not np.array_equal(v, names[key])
    }
    targets = ("c_attn.weight", "c_proj.weight") if layout == "gpt2" else ("q_proj.weight", "v_proj.weight")
    assert moved
    assert all(name.endswith((*targets, "score.weight")) for name in moved), moved


def test_settings_that_cannot_be_are_refused(config: ClassifyConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="positions"):
        train_classifier(changed(config, max_length=512))
    with pytest.raises(DataError, match="unknown GLUE task"):
        train_classifier(changed(config, task="sst3"))
    with pytest.raises(DataError, match="no task was named"):
        changed(config, data=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    with pytest.raises(DataError, match="not empty"):
        train_classifier(config)


def test_a_batch_of_rows_carries_labels(encoded: Any) -> None:
    batch = PadBatch(0)([encoded[0], encoded[1]])
    assert batch["labels"].tolist() == encoded.labels[:2].tolist()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(encoded.ids[0]), len(encoded.ids[1])]
