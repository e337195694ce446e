"""A model split at its output layer gives the logits of its own forward pass, or is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import WITH_FINAL_BIAS, encoder_decoder, state_space_model, with_bias
from tiny_models import tiny_model
from torch import nn
from transformers import CpmAntConfig, CpmAntForCausalLM

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import TeacherError
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.evaluation.scoring.scored_text import ScoredText, gold_nll
from kd.evaluation.scoring.shared_context import shared_nll
from kd.models import identity
from kd.models.heads import split_head
from kd.models.identity import in_memory_identity
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective

V = 60
PAIRS = [
    (np.arange(4, 13), np.arange(20, 31)),
    (np.arange(5, 9), np.arange(40, 43)),
    (np.arange(4, 13), np.arange(9, 16)),
]


def own_logprobs(model: Any, context: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """`[n, V]` float64 by the model's own forward pass over one example without padding."""
    start = model.config.decoder_start_token_id
    decoder = torch.from_numpy(np.concatenate([[start], target[:-1]]))[None]
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(context)[None], decoder_input_ids=decoder)
    return output.logits[0].log_softmax(dim=-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", WITH_FINAL_BIAS)
def test_a_final_bias_is_in_the_cached_values_and_in_every_score(family: str) -> None:
    model = with_bias(encoder_decoder(family, V))
    rows = [TokenRows(Example(str(i), "p", "t"), c, t, np.arange(len(t))) for i, (c, t) in enumerate(PAIRS)]
    teacher = Teacher(split_head(model), Sparsifier(TargetConfig(top_k=8), V))
    *_, (_, kept) = collect(rows, teacher.run(rows, 0))
    assert kept is not None
    assert kept.relative is not None
    expected = torch.cat([own_logprobs(model, *pair) for pair in PAIRS])
    top = expected.topk(8, dim=1)
    # hidden states are float64, the output layer and what follows it float32: sums of 32 products of size 1
    np.testing.assert_allclose(kept.relative - kept.log_z[:, :1], top.values.numpy(), rtol=0, atol=2e-5)
    assert kept.token_ids is not None
    assert np.array_equal(kept.token_ids, top.indices.numpy())
    texts = [ScoredText(str(i), *pair) for i, pair in enumerate(PAIRS)]
    gold = -expected.gather(1, torch.from_numpy(np.concatenate([t for _, t in PAIRS]))[:, None])[:, 0].numpy()
    for score in (gold_nll, shared_nll):
        np.testing.assert_allclose(returned(score(model, texts, vocabulary_size=V)), gold, rtol=0, atol=2e-5)


def returned(steps: Any) -> Any:
    """What a generator of progress returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("family", WITH_FINAL_BIAS)
def test_a_student_s_gradient_knows_the_final_bias(family: str) -> None:
    model, twin = (with_bias(encoder_decoder(family, V)) for _ in range(2))
    context, target = np.arange(4, 20), PAIRS[0][1]  # two of LED's windows: where it pads, its own gradient is NaN
    start = model.config.decoder_start_token_id
    attach_loss(model, Objective("ce", "none", 0.0, 1.0), V, chunk=4)
    ids, gold = torch.from_numpy(context)[None], torch.from_numpy(target)
    decoder = torch.cat([torch.tensor([start]), gold[:-1]])[None]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": decoder,
        "positions": torch.arange(len(target)),
        "gold_ids": gold,
    }
    total = model(**batch)["loss"]
    total.backward()
    logits = twin(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder).logits[0]
    expected = nn.functional.cross_entropy(logits, gold, reduction="sum")
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    compared = 0
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.grad is not None and theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() <= 1e-9 * theirs.grad.abs().max() + 1e-12, name
            compared += 1
    assert compared > 20


def test_the_identity_tells_caches_with_the_final_bias_from_older_ones() -> None:
    types = {encoder_decoder(family, V).config.model_type for family in WITH_FINAL_BIAS}
    assert types == set(identity.WITH_FINAL_BIAS)
    model = encoder_decoder("Bart", V)
    assert in_memory_identity(model, "digest")["final_logits_bias"] == "added"
    assert "final_logits_bias" not in in_memory_identity(tiny_model("t5", "eager", V, window=8), "digest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_models_whose_states_stay_in_float32_score_in_16_bits_as_they_do_alone(family: str, dtype: torch.dtype) -> None:
    model = state_space_model(family, V).to(dtype)
    head = split_head(model)
    contexts, targets = [np.arange(3, 9), np.arange(5, 20)], [np.arange(20, 25), np.arange(30, 33)]
    found = head.logits(head.scored_hidden(contexts, targets)).log_softmax(dim=-1)
    with torch.no_grad():
        own = [
            model(torch.from_numpy(np.concatenate(pair))[None]).logits[0, len(pair[0]) - 1 : -1].float()
            for pair in zip(contexts, targets, strict=True)
        ]
    # two passes in 16 bits, one of them padded: logits of size 1 to 3 are off by a few of their last bits
    assert (found - torch.cat(own).log_softmax(dim=-1)).abs().max() < 0.05
    assert found.std() > 0.2


def test_a_model_that_reads_padding_is_refused() -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 1}
    config = CpmAntConfig(vocab_size=V, **shape)
    model = CpmAntForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        ids = torch.arange(5, 12)[None]
        alone = model(ids).logits
        padded = model(torch.nn.functional.pad(ids, (0, 4))).logits[:, : ids.shape[1]]
    assert (alone - padded).abs().max() > 0.01
    with pytest.raises(TeacherError, match="reads the padding"):
        split_head(model)


class Shifted:
    """A forward pass that adds one nat to one logit, by a buffer whose name nobody knows."""

    def __init__(self, forward: Any, nats: float) -> None:
        self.own, self.nats = forward, nats

    def __call__(self, **inputs: Any) -> Any:
        output = self.own(**inputs)
        output.logits[..., 7] += self.nats
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["llama", "t5"])
def test_a_bias_of_one_nat_of_an_unknown_name_is_refused(layout: str, dtype: torch.dtype) -> None:
    model = tiny_model(layout, "eager", V, window=8).to(dtype)
    assert split_head(model).weight.dtype == dtype
    model.forward = Shifted(model.forward, 1.0)
    with pytest.raises(TeacherError, match="changes its logits"):
        split_head(model)
