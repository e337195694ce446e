"""`kd.evaluate`: the figures of `kd eval`, of a model by name and of one in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from kd.common.errors import DataError, TeacherError
from kd.common.progress import final
from kd.common.settings import make
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluate import evaluate
from kd.evaluation.evaluator import evaluate_model
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer


@pytest.fixture
def settings(text_file: Path, kl_cache: Path) -> dict[str, object]:
    return {"data": str(text_file), "cache": kl_cache, "seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="session")
def kl_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("caches") / "kl"
    run_build(build_request(out))
    return out


def test_by_name_it_is_the_evaluation_of_the_command_line(model_dir: Path, settings: dict[str, object]) -> None:
    found = evaluate(model_dir, ["perplexity", "agreement"], **settings)
    told = settings | {"tasks": "perplexity,agreement", "cache": str(settings["cache"])}
    expected = final(evaluate_model(str(model_dir), make(EvalSettings, told)))
    assert found.to_dict() == expected.to_dict()


def test_a_model_in_memory_has_the_figures_of_its_folder_and_is_left_as_it_was(
    model_dir: Path, settings: dict[str, object]
) -> None:
    expected = evaluate(model_dir, "perplexity,agreement", **settings)
    model = load_model(ModelRequest(str(model_dir), device="cpu")).train()
    state = torch.get_rng_state()
    found = evaluate(model, "perplexity,agreement", tokenizer=load_tokenizer(str(model_dir)), **settings)
    assert found.tasks == expected.tasks
    assert found.settings == expected.settings
    assert found.documents == expected.documents
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_that_was_changed_in_place_is_another_model(model_dir: Path, settings: dict[str, object]) -> None:
    model, tokenizer = load_model(ModelRequest(str(model_dir), device="cpu")), load_tokenizer(str(model_dir))
    before = evaluate(model, "perplexity", tokenizer=tokenizer, **settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    after = evaluate(model, "perplexity", tokenizer=tokenizer, **settings)
    assert before.identity != after.identity
    assert before.tasks != after.tasks


def test_a_model_in_memory_needs_its_tokenizer(model_dir: Path, settings: dict[str, object]) -> None:
    with pytest.raises(DataError, match="needs its tokenizer"):
        evaluate(load_model(ModelRequest(str(model_dir), device="cpu")), "perplexity", **settings)


ON_THE_DISK = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk", "transformer.ln_f": "disk"}


def test_a_model_that_lies_partly_on_the_disk_has_the_same_figures(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "The fox went", "target": t, "choices": ["home.", "down to the river."]} for t in ("home.", "")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": 0}) + "\n" for row in rows))
    (tmp_path / "map.yaml").write_text("".join(f"{m}: {d}\n" for m, d in (ON_THE_DISK | {"lm_head": "cpu"}).items()))
    told = {"data": str(tmp_path / "rows.jsonl"), "seq_len": 32, "max_new_tokens": 3}
    tasks = "perplexity,choices,generation"
    whole = evaluate(model_dir, tasks, device="cpu", **told)
    spread = evaluate(model_dir, tasks, device_map=str(tmp_path / "map.yaml"), **told)
    assert spread.to_dict() == whole.to_dict()


def test_an_adapter_is_scored_as_the_model_that_it_was_merged_into(model_dir: Path, settings, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        load_model(ModelRequest(str(model_dir), device="cpu")),
        peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    wrapped.save_pretrained(tmp_path / "adapter")
    shutil.copytree(model_dir, tmp_path / "merged")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = evaluate(tmp_path / "merged", "perplexity", **settings)
    found = evaluate(model_dir, "perplexity", adapter=str(tmp_path / "adapter"), **settings)
    assert found.tasks == expected.tasks
    assert found.tasks != evaluate(model_dir, "perplexity", **settings).tasks
    assert set(found.identity["adapter"]) == {"config", "weights"}
    live = {"data": settings["data"], "seq_len": 32, "device": "cpu", "teacher": str(model_dir)}
    follows = evaluate(tmp_path / "merged", "agreement", teacher_adapter=str(tmp_path / "adapter"), **live)
    assert follows.tasks["agreement"]["kl"]["value"] < 1e-9, "a model follows itself"
    with pytest.raises(DataError, match="this is an adapter") as caught:
        evaluate(tmp_path / "adapter", "perplexity", **settings)
    assert "kd eval" in caught.value.details["try"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, "does nothing without a device map"),
        ({"adapter_revision": "main"}, "there is no adapter"),
        ({"teacher_adapter": "no/such"}, "no teacher for this adapter"),
        ({"adapter": "x", "load_in_8bit": True}, "plain weights alone"),
        ({"device_map": "auto"}, "exclude each other"),
    ],
)
def test_what_cannot_be_loaded_together_is_refused(model_dir: Path, settings, more, words: str) -> None:
    with pytest.raises((DataError, TeacherError), match=words):
        evaluate(model_dir, "perplexity,agreement", **settings | more)


@pytest.mark.parametrize(
    "more", [{"device_map": "auto"}, {"adapter": "x"}, {"load_in_8bit": True}, {"dtype": "float16"}]
)
def test_a_model_in_memory_is_not_told_how_it_is_loaded(model_dir: Path, settings, more) -> None:
    model = load_model(ModelRequest(str(model_dir), device="cpu"))
    with pytest.raises(DataError, match="do not apply to a model in memory"):
        evaluate(model, "perplexity", tokenizer=load_tokenizer(str(model_dir)), **settings | more)
