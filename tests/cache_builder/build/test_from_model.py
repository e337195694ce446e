"""A cache from a model object in memory, with the tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kd.cache_builder.build.from_model import OF_NAMED_TEACHERS, build_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.upkeep.verify import verify
from kd.cli import cli
from kd.common.errors import CacheDamageError, CacheMismatchError, DataError, KdError
from kd.common.progress import final
from kd.data.sources import load_corpus
from kd.data.text_rows import RowMaker
from kd.models.pretrained import load_teacher

SMALL: dict[str, Any] = {"seq_len": 32, "top_k": 8, "tokens_per_batch": 128, "shard_rows": 128}
PAIRS = [("The fox", " went home."), ("It rained", " for a day and a night."), ("There were", " seven ships.")]


@pytest.fixture
def model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture
def texts(text_file: Path) -> list[str]:
    return [example.target for example in load_corpus(str(text_file)).examples]


def arrays(reader: CacheReader) -> dict[str, np.ndarray]:
    every = [reader[i].targets for i in range(len(reader))]
    return {
        name: np.concatenate([getattr(t, name) for t in every])
        for name in ("token_ids", "logprobs", "gold_ids", "gold_rank", "log_z")
    }


def test_its_targets_are_those_of_the_same_model_by_name(
    model, tokenizer, texts, build_request, run_build, tmp_path: Path
):
    run_build(build_request(tmp_path / "named"))
    reader = build_cache(model, tokenizer, texts, out=tmp_path / "given", **SMALL)
    expected = arrays(CacheReader(tmp_path / "named"))
    for name, value in arrays(reader).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    teacher = reader.manifest.identity["teacher"]
    assert (teacher["model"], teacher["model_class"]) == ("in memory", "GPT2LMHeadModel")
    assert final(verify(tmp_path / "given")) == ()


@pytest.mark.parametrize("device_map", ["file", "mapping"])
def test_a_model_that_lies_partly_on_the_disk_gives_the_same_bytes(
    device_map: str, model, tokenizer, texts, model_dir: Path, tmp_path: Path, tree
):
    """The digest of its weights is the same too, so that the caches have one fingerprint."""
    placed: Any = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu"}
    placed |= {"transformer.h": "disk", "transformer.ln_f": "disk"}
    if device_map == "file":
        (tmp_path / "map.yaml").write_text("".join(f"{module}: {device}\n" for module, device in placed.items()))
        placed = tmp_path / "map.yaml"
    spread, own = load_teacher(str(model_dir), device_map=placed)
    build_cache(spread, own, texts, out=tmp_path / "spread", **SMALL)
    build_cache(model, tokenizer, texts, out=tmp_path / "whole", reuse=False, **SMALL)
    assert tree(tmp_path / "spread") == tree(tmp_path / "whole")


def test_the_same_call_again_finds_the_cache_complete(model, tokenizer, texts, tmp_path: Path, tree):
    steps: list[Any] = []
    build_cache(model, tokenizer, texts, out=tmp_path / "c", on_progress=steps.append, **SMALL)
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total
    assert steps[-1].note
    before = tree(tmp_path / "c")
    again: list[Any] = []
    build_cache(model, tokenizer, texts, out=tmp_path / "c", on_progress=again.append, **SMALL)
    assert [s.reused for s in again] == [True]
    assert tree(tmp_path / "c") == before


def test_an_interrupted_build_continues_with_the_same_bytes(model, tokenizer, texts, tmp_path: Path, tree):
    build_cache(model, tokenizer, texts, out=tmp_path / "whole", **SMALL)

    def stop(step: Any) -> None:
        if step.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(model, tokenizer, texts, out=tmp_path / "c", on_progress=stop, reuse=False, **SMALL)
    build_cache(model, tokenizer, texts, out=tmp_path / "c", reuse=False, **SMALL)
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


def test_weights_changed_in_place_are_another_teacher(model, tokenizer, texts, tmp_path: Path):
    before = build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL).manifest.fingerprint
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1.0
    with pytest.raises(CacheMismatchError, match=r"teacher\.parameters"):
        build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL)
    assert build_cache(model, tokenizer, texts, out=tmp_path / "d", **SMALL).manifest.fingerprint != before


def test_a_model_with_adapters_is_a_teacher_with_or_without_its_wrapper(model, tokenizer, texts, tmp_path: Path):
    peft = pytest.importorskip("peft")
    plain = arrays(build_cache(model, tokenizer, texts, out=tmp_path / "plain", **SMALL))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    wrapped.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.data += 0.5
    reader = build_cache(wrapped, tokenizer, texts, out=tmp_path / "c", **SMALL)
    assert np.abs(arrays(reader)["log_z"] - plain["log_z"]).mean() > 0.01
    assert build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL).manifest == reader.manifest
    merged = arrays(build_cache(wrapped.merge_and_unload(), tokenizer, texts, out=tmp_path / "merged", **SMALL))
    np.testing.assert_allclose(arrays(reader)["log_z"], merged["log_z"], atol=1e-2)  # half a step of a float16 up to 16


def test_soft_prompts_are_refused(model, tokenizer, tmp_path: Path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(DataError, match="soft prompts"):
        build_cache(wrapped, tokenizer, ["a text"], out=tmp_path / "c")


def test_the_texts_are_tokenised_once_where_an_equal_cache_is_copied(
    model, tokenizer, texts, tmp_path: Path, tree, monkeypatch
):
    build_cache(model, tokenizer, texts, out=tmp_path / "one", **SMALL)
    passes, rows = list[int](), RowMaker.rows
    monkeypatch.setattr(RowMaker, "rows", lambda *a: (passes.append(1), rows(*a))[1])
    steps: list[Any] = []
    build_cache(model, tokenizer, texts, out=tmp_path / "two", on_progress=steps.append, **SMALL | {"shard_rows": None})
    assert (len(passes), steps[-1].copied) == (1, steps[-1].shards_total)
    assert steps[-1].shards_total > 1, "or the layout was not taken over"
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_the_model_is_scored_in_evaluation_mode_and_left_as_it_was(tokenizer, texts, save_student, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(save_student(tmp_path / "m", dropout=0.5))
    model.eval()
    expected = arrays(build_cache(model, tokenizer, texts, out=tmp_path / "eval", **SMALL))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    found = arrays(build_cache(model, tokenizer, texts, out=tmp_path / "train", reuse=False, **SMALL))
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", ["pairs", "mappings", "data set", "other columns"])
def test_every_kind_of_texts_makes_the_same_rows(model, tokenizer, tmp_path: Path, kind: str):
    mappings = [{"prompt": prompt, "target": target} for prompt, target in PAIRS]
    given: Any = {
        "pairs": PAIRS,
        "mappings": mappings,
        "data set": Dataset.from_list(mappings),
        "other columns": Dataset.from_list([{"q": prompt, "a": target, "n": 1} for prompt, target in PAIRS]),
    }[kind]
    columns = {"prompt": "q", "target": "a"} if kind == "other columns" else None
    reader = build_cache(model, tokenizer, given, out=tmp_path / "c", columns=columns, **SMALL)
    assert [(reader[i].prompt, reader[i].target) for i in range(len(reader))] == PAIRS
    assert [reader[i].id for i in range(len(reader))] == ["texts:0", "texts:1", "texts:2"]
    assert build_cache(model, tokenizer, PAIRS, out=tmp_path / "c", **SMALL).manifest == reader.manifest


def test_an_encoder_decoder_is_a_teacher_too(t5_dir: Path, tmp_path: Path):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_dir)
    tokenizer = AutoTokenizer.from_pretrained(t5_dir)
    reader = build_cache(model, tokenizer, PAIRS, out=tmp_path / "c", profile="uld", top_k=4)
    assert (len(reader), reader.manifest.blocks.encoder, reader.manifest.targets.profile) == (3, True, "uld")


def test_a_bfloat16_model_is_another_teacher_than_its_float32_twin(model, tokenizer, texts, tmp_path: Path):
    wide = build_cache(model, tokenizer, texts, out=tmp_path / "wide", **SMALL)
    narrow = build_cache(model.to(torch.bfloat16), tokenizer, texts, out=tmp_path / "narrow", **SMALL)
    assert narrow.manifest.identity["teacher"]["dtype"] == "bfloat16"
    assert narrow.manifest.fingerprint != wide.manifest.fingerprint
    error = np.abs(arrays(narrow)["log_z"] - arrays(wide)["log_z"]).mean()
    assert 0 < error < 0.5  # 8 bits of a number, and logits up to 60


def test_prompts_are_enough_for_a_teacher_that_answers(model, tokenizer, tmp_path: Path):
    prompts = [{"prompt": prompt} for prompt, _ in PAIRS]
    settings: dict[str, Any] = {
        "target_source": "teacher",
        "target_len": 6,
        "overlong": "truncate",
        "seq_len": 32,
        "top_k": 4,
    }
    reader = build_cache(model, tokenizer, prompts, out=tmp_path / "c", **settings)
    assert [reader[i].prompt for i in range(len(reader))] == [prompt for prompt, _ in PAIRS]
    assert all(reader[i].target for i in range(len(reader)))
    assert build_cache(model, tokenizer, prompts, out=tmp_path / "c", **settings).manifest == reader.manifest
    with torch.no_grad():
        model.transformer.wte.weight += 0.1
    with pytest.raises(CacheMismatchError):
        build_cache(model, tokenizer, prompts, out=tmp_path / "c", **settings)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "no text found"),
        ("one text", "a list of texts"),
        (DatasetDict({"train": Dataset.from_list([{"text": "a"}])}), "a list of texts"),
        (["a", ("b", "c")], "several kinds"),
        ([{"prompt": "a", "target": "b"}, {"prompt": "a"}], "several kinds"),
        ([1], "no known kind"),
        ([("a", "b", "c")], "no known kind"),
        ([{"text": 1}], "not text"),
        ([{"question": "a"}], "columns are missing"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(model, tokenizer, tmp_path: Path, texts: Any, words: str):
    with pytest.raises(DataError, match=words):
        build_cache(model, tokenizer, texts, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_teacher_by_name_builds_what_the_command_builds(model_dir: Path, text_file: Path, tmp_path: Path, tree):
    given: dict[str, Any] = {"seq_len": 32, "top_k": 8, "shard_rows": 128, "device": "cpu"}
    words = [w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", value)]
    kd("cache", "build", "--teacher", model_dir, "--data", text_file, *words, "--out", tmp_path / "typed", "--no-reuse")
    reader = build_cache(model_dir, data=str(text_file), out=tmp_path / "called", reuse=False, **given)
    assert tree(reader.root) == tree(tmp_path / "typed")
    next((reader.root / "examples").iterdir()).unlink()
    kd("cache", "repair", reader.root, "--device", "cpu")
    assert tree(reader.root) == tree(tmp_path / "typed")


def test_a_teacher_by_name_scores_texts_in_memory(model, tokenizer, texts, model_dir: Path, tmp_path: Path):
    expected = arrays(build_cache(model, tokenizer, texts, out=tmp_path / "given", **SMALL))
    reader = build_cache(str(model_dir), texts=iter(texts), out=tmp_path / "named", device="cpu", **SMALL)
    for name, value in arrays(reader).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert set(reader.manifest.identity["teacher"]["weights"]) == {"model.safetensors"}
    assert reader.manifest.provenance["options"] is None, "nothing that a repair could read the texts from"


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((), {}, "there is no text"),
        ((["a text"],), {}, "takes a tokenizer by name"),
        ((None, ["a text"]), {"data": "demo"}, "do not apply to texts"),
        ((None, ["a text"]), {"split": "dev"}, "do not apply to texts"),
        ((None, ["a text"]), {"tensor_parallel": 2}, "torchrun"),
        ((None, ["a text"]), {"device_map": "no-such-file.yaml"}, "device map"),
        ((None, ["a text"]), {"teacher_adapter": "no/such/adapter"}, "adapter cannot be found"),
        ((None, ["a text"]), {"served_model": "x"}, "there is no server"),
    ],
)
def test_what_a_teacher_by_name_is_not_told(model_dir, tmp_path: Path, arguments, settings: dict[str, Any], words: str):
    with pytest.raises(KdError, match=words):
        build_cache(model_dir, *arguments, out=tmp_path / "c", **settings)
    assert not (tmp_path / "c").exists()


def test_a_classifier_by_name_has_no_labels_for_texts(model_dir: Path, tmp_path: Path):
    shutil.copytree(model_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | {"architectures": ["GPT2ForSequenceClassification"]})
    )
    with pytest.raises(DataError, match="no labels"):
        build_cache(tmp_path / "m", texts=["a text"], out=tmp_path / "c")


@pytest.mark.parametrize("name", sorted(OF_NAMED_TEACHERS - {"tokenizer"}))
def test_settings_of_named_teachers_are_refused(model, tokenizer, texts, tmp_path: Path, name: str):
    settings: dict[str, Any] = {name: "x"}
    with pytest.raises(DataError, match="do not apply") as error:
        build_cache(model, tokenizer, texts, out=tmp_path / "c", **settings)
    assert error.value.details["found"] == name


def test_an_unknown_setting_names_the_nearest(model, tokenizer, texts, tmp_path: Path):
    with pytest.raises(DataError, match="topk"):
        build_cache(model, tokenizer, texts, out=tmp_path / "c", topk=4)


def kd(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_the_cache_is_shown_sliced_and_trained_from_like_any_other(model, tokenizer, texts, model_dir, tmp_path: Path):
    build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL)
    assert json.loads(kd("cache", "info", tmp_path / "c", "--json"))["teacher"] == "GPT2LMHeadModel"
    assert json.loads(kd("cache", "verify", tmp_path / "c", "--json"))["sound"]
    kd("cache", "slice", tmp_path / "c", "--top-k", 4, "--out", tmp_path / "slice")
    assert CacheReader(tmp_path / "slice").manifest.targets.top_k == 4
    words = ("--student", model_dir, "--max-steps", 1, "--batch-size", 2, "--device", "cpu")
    kd("train", "--cache", tmp_path / "c", *words, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_repair_says_that_the_model_is_needed_and_the_call_mends_it(model, tokenizer, texts, tmp_path: Path, tree):
    build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL)
    before = tree(tmp_path / "c")
    (tmp_path / "c" / "examples" / "00001.parquet").unlink()
    done = CliRunner().invoke(cli, ["cache", "repair", str(tmp_path / "c")])
    assert isinstance(done.exception, CacheDamageError)
    assert "kd.build_cache" in str(done.exception)
    assert "shards 1" in str(done.exception)
    build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL)
    assert tree(tmp_path / "c") == before


def test_a_cache_of_this_machine_is_copied_for_an_equal_model(model, tokenizer, texts, tmp_path: Path):
    build_cache(model, tokenizer, texts, out=tmp_path / "c", **SMALL)
    steps: list[Any] = []
    build_cache(model, tokenizer, texts, out=tmp_path / "d", on_progress=steps.append, **SMALL)
    assert steps[-1].copied == steps[-1].shards_total
    shutil.rmtree(tmp_path / "c")


@pytest.mark.parametrize("wrong", ["a tokenizer for a name", "the tokenizer for the model", "no tokenizer"])
def test_what_is_no_model_or_no_tokenizer_is_refused_by_name(model, tokenizer, texts, tmp_path: Path, wrong: str):
    given: dict[str, tuple[Any, Any, str]] = {
        "a tokenizer for a name": ("demo", tokenizer, "takes a tokenizer by name"),
        "the tokenizer for the model": (tokenizer, model, "the model cannot"),
        "no tokenizer": (model, None, "the tokenizer cannot"),
    }
    first, second, words = given[wrong]
    with pytest.raises(DataError, match=words):
        build_cache(first, second, texts, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("given", ["generator", "stream", "data set"])
def test_texts_that_come_one_after_another_make_the_cache_of_a_list(
    model, tokenizer, texts, tree, tmp_path: Path, given: str
):
    def one_after_another():
        yield from ({"text": text} for text in texts)

    makers = {
        "generator": one_after_another,
        "stream": lambda: IterableDataset.from_generator(one_after_another),
        "data set": lambda: Dataset.from_list([{"text": text} for text in texts]),
    }
    build_cache(model, tokenizer, texts, out=tmp_path / "list", **SMALL, reuse=False)
    for _ in range(2):  # the second time there is nothing to do
        reader = build_cache(model, tokenizer, makers[given](), out=tmp_path / "given", **SMALL, reuse=False)
    assert tree(tmp_path / "given") == tree(tmp_path / "list")
    with pytest.raises(CacheMismatchError):
        build_cache(model, tokenizer, (text[1:] for text in texts), out=tmp_path / "given", **SMALL)
    assert tree(reader.root) == tree(tmp_path / "list")
