"""`kd.evaluate`: the figures of `kd eval`, of a model by name and of one in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd.common.errors import DataError
from kd.common.progress import final
from kd.common.settings import make
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.evaluate import evaluate
from kd.evaluation.evaluator import evaluate_model
from kd.models.loading import ModelRequest, load_model
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
