"""Checkpoints that hold more than a text model: the text model is read, and says what the whole would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import WRAPPED, wrapped_model

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_model import build_cache
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import TeacherError
from kd.common.settings import make
from kd.models.families.positions import max_positions
from kd.models.heads import split_head
from kd.models.identity import model_identity
from kd.models.loading import load_model, parameter_count
from kd.models.model_config import load_config
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective

IDS = np.array([5, 6, 7, 8, 9, 10, 11, 3, 4, 20, 21])
WHOLE = ("qwen3_vl",)
"""Wrappers for whose text model transformers has no class."""


def saved(name: str, folder: Path, vocabulary: int = 60) -> tuple[Any, ModelRequest]:
    model = wrapped_model(name, vocabulary)
    model.save_pretrained(folder)
    return model, ModelRequest(str(folder), device="cpu", dtype="float32")


def own_logprobs(model: Any, ids: np.ndarray) -> torch.Tensor:
    """`[T, V]` float64 by the whole model's own forward pass over text."""
    model = model.double() if model.config.model_type != "qwen3_5_moe" else model
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().log_softmax(dim=-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted({*WRAPPED} - {"paligemma"}))
def test_top_log_probabilities_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    whole, request = saved(name, tmp_path)
    config = load_config(request)
    assert config.vocab_size == 60
    assert max_positions(config) == 64
    model = load_model(request)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == parameter_count(request)
    assert model_identity(request)["model_class"] == type(model).__name__
    if name not in WHOLE:
        assert not any("vis" in key for key in model.state_dict())
        assert parameters < sum(p.numel() for p in whole.parameters())
    expected = own_logprobs(whole, IDS)[3:-1].topk(8, dim=1)
    head = split_head(model.double() if whole.dtype == torch.float64 else model)
    found = head.logits(head.scored_hidden([IDS[:4]], [IDS[4:]])).double().log_softmax(dim=-1).topk(8, dim=1)
    assert torch.equal(found.indices, expected.indices)
    assert (found.values - expected.values).abs().max() < 1e-5  # the output layer is float32


def test_a_text_model_that_reads_its_whole_prompt_at_once_is_refused(tmp_path: Path) -> None:
    """PaliGemma's text model sees all of a text, what it is to predict too."""
    _, request = saved("paligemma", tmp_path)
    with pytest.raises(TeacherError, match="reads the tokens that it is to predict"):
        split_head(load_model(request))


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3", "qwen3_5", "qwen3_vl"])
def test_a_student_step_has_the_gradient_of_the_whole_model(name: str, tmp_path: Path) -> None:
    whole, request = saved(name, tmp_path)
    model = load_model(request).double()
    attach_loss(model, Objective("ce", "none", 0.0, 1.0), 60, chunk=4)
    ids = torch.from_numpy(IDS)[None]
    total = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        positions=torch.arange(3, len(IDS) - 1),
        gold_ids=ids[0, 4:],
    )["loss"]
    total.backward()
    whole = whole.double()
    logits = whole(input_ids=ids).logits[0, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 4:], reduction="sum")
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = {p.grad.shape.numel(): 0.0 for p in whole.parameters() if p.grad is not None}
    ours = dict(theirs)
    for found, of in ((theirs, whole), (ours, model)):
        for parameter in of.parameters():
            if parameter.grad is not None:
                found[parameter.numel()] += float(parameter.grad.pow(2).sum())
    assert ours == pytest.approx(theirs, rel=1e-5)  # norms compute in float32


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model.model."])
def test_older_names_of_the_text_model_s_weights_are_read(before: str, tmp_path: Path) -> None:
    whole, request = saved("llava", tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    stem = (
        "language_model.model."
        if any(n.startswith("language_model.model.") for n in names)
        else "model.language_model."
    )
    head = before.removesuffix("model.") + "lm_head.weight"
    renamed = {n.replace(stem, before) if n.startswith(stem) else n: t for n, t in names.items()}
    renamed = {head if n.endswith("lm_head.weight") else n: t.contiguous() for n, t in renamed.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    expected = own_logprobs(whole, IDS)
    with torch.no_grad():
        found = load_model(request).double()(input_ids=torch.from_numpy(IDS)[None]).logits[0].log_softmax(dim=-1)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_missing_weight_is_an_error_and_not_a_random_number(name: str, tmp_path: Path) -> None:
    _, request = saved(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight") and "vision" not in n)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match="lacks weights"):
        load_model(request)


def test_a_wrapped_teacher_builds_by_name_and_from_memory(tmp_path: Path, tokenizer_dir: Path, text_file: Path) -> None:
    whole, _ = saved("gemma3", tmp_path / "model", vocabulary=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tokenizer_dir / name).read_bytes())
    settings = {"teacher": str(tmp_path / "model"), "spec": str(text_file), "device": "cpu", "top_k": 8, "limit": 3}
    more = {"seq_len": 32, "logprob_codec": "float32", "reuse": False, "out": str(tmp_path / "named")}
    build_of(make(BuildSettings, settings | more))
    named = CacheReader(tmp_path / "named")
    text = [e.target for e in named.read(range(2))]
    memory = build_cache(
        whole.float(), load_tokenizer(str(tokenizer_dir)), text, out=tmp_path / "memory", top_k=8, seq_len=32
    )
    assert len(memory) >= 2
    for example in named.read(range(len(named))):
        expected = own_logprobs(whole, example.input_ids)[len(example.context_ids) - 1 : -1].topk(8, dim=1)
        assert example.targets.logprobs is not None
        np.testing.assert_allclose(example.targets.logprobs, expected.values.numpy(), rtol=0, atol=1e-4)
        whole = whole.float()
