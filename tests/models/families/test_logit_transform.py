"""What models do to their logits is read from them, proven where it bends, and part of every number: caches, losses, scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from family_rows import ROWS, VOCABULARY
from tiny_models import tiny_model
from torch import Tensor, nn

from kd.common.errors import TeacherError
from kd.evaluation.scoring.scored_text import ScoredText, gold_nll
from kd.evaluation.scoring.shared_context import shared_nll
from kd.models.families.logit_transform import PLAIN, LogitTransform, named_transforms
from kd.models.heads import proven_transform, split_head
from kd.models.identity import in_memory_identity
from kd.student_trainer.head import attach_loss
from kd.student_trainer.loss_functions import chunked_distillation_loss, distillation_loss
from kd.student_trainer.losses.loss_registry import Objective

TRANSFORMED = {
    "gemma2": LogitTransform(cap=30.0),
    "cohere": LogitTransform(0.0625),
    "granite": LogitTransform(0.125),
    "hyperclovax": LogitTransform(0.5),
    "nanochat": LogitTransform(cap=15.0),
    "inkling_text": LogitTransform(1 / 24),
}
BOTH = LogitTransform(0.5, 3.0)
CE = Objective("ce", "none", 0.0, 1.0)
IDS = np.array([5, 6, 7, 8, 9, 10, 11, 3, 4, 20, 21])


def test_a_cap_bounds_logits_keeps_their_order_and_hardly_touches_small_ones() -> None:
    logits = torch.linspace(-40, 40, 101, dtype=torch.float64)[None]
    capped = LogitTransform(cap=30.0).apply_(logits.clone())
    assert bool((capped.abs() < 30).all())
    assert bool((capped.diff() > 0).all())
    small = torch.linspace(-0.1, 0.1, 11, dtype=torch.float64)
    # tanh(x) = x - x^3 / 3 + ...
    torch.testing.assert_close(LogitTransform(cap=30.0)(small), small - small**3 / 2700, rtol=0, atol=1e-11)
    assert torch.equal(LogitTransform(2.0, None)(small), 2 * small)
    torch.testing.assert_close(LogitTransform(0.5, 1e9)(logits), 0.5 * logits, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.25), LogitTransform(cap=3.0), BOTH])
@pytest.mark.parametrize("buffered", [True, False])
def test_values_and_slopes_written_in_place_are_those_of_autograd(transform: LogitTransform, buffered: bool) -> None:
    product = (5 * torch.randn(7, 11, dtype=torch.float64)).requires_grad_()
    above = torch.randn(7, 11, dtype=torch.float64)
    expected = transform(product)
    logits = transform.apply_(product.detach().clone())
    assert torch.equal(logits, expected) or (logits - expected).abs().max() < 1e-14
    slope = transform.slope(logits, torch.empty(9, 11, dtype=torch.float64) if buffered else None)
    assert transform.apply_(product.detach().clone()).equal(logits), "the slope leaves the logits as they are"
    (gradient,) = torch.autograd.grad(expected, product, above)
    torch.testing.assert_close(transform.chain_(above.clone(), slope), gradient, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_transform_of_a_family_is_found(name: str, dtype: torch.dtype) -> None:
    model = ROWS[name].model().to(dtype)
    assert split_head(model).transform == pytest.approx(TRANSFORMED[name])
    assert proven_transform(model) == split_head(model).transform


def test_a_number_that_a_model_ignores_is_not_taken_for_one_it_uses() -> None:
    model = ROWS["mpt_logit_scale"].model()
    assert named_transforms(model)[0] == LogitTransform(0.5)
    assert split_head(model).transform.plain


def test_the_model_s_own_number_counts_where_its_configuration_says_another() -> None:
    model = ROWS["cohere"].model()
    assert proven_transform(model).scale == 0.0625
    model.logit_scale = 0.5
    assert proven_transform(model).scale == 0.5


def test_the_identity_shows_a_number_that_the_configuration_does_not() -> None:
    for name in TRANSFORMED:
        assert "logit_numbers" not in in_memory_identity(ROWS[name].model(), "digest")
    model = ROWS["cohere"].model()
    model.logit_scale = 0.5
    assert in_memory_identity(model, "digest")["logit_numbers"] == {"logit_scale": 0.5}


class Changed:
    """A forward pass that does something to its logits."""

    def __init__(self, forward: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.own, self.change = forward, change

    def __call__(self, **inputs: Any) -> Any:
        output = self.own(**inputs)
        output.logits = self.change(output.logits)
        return output


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another cap": LogitTransform(cap=31.0),
    "another bend": lambda x: x / (1 + (x / 30) ** 2).sqrt(),
    "clipped": lambda x: x.clamp(-30, 30),
    "cap and scale": LogitTransform(1.05, 30.0),
    "scale alone": LogitTransform(1.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_something_else_than_it_says_is_refused(change: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", "eager", VOCABULARY, window=8).to(dtype)
    model.config.final_logit_softcapping = 30.0
    own = model.forward
    model.forward = Changed(own, LogitTransform(cap=30.0))
    assert split_head(model).transform == LogitTransform(cap=30.0)
    model.forward = Changed(own, CHANGES[change])
    with pytest.raises(TeacherError, match="changes its logits"):
        split_head(model)


@pytest.mark.parametrize("name", ["llama", "prophetnet"])
def test_what_lies_before_the_output_layer_is_told_from_what_follows_it(name: str) -> None:
    model = ROWS[name].model()
    if name == "llama":  # states that are changed on their way
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))
    with pytest.raises(TeacherError, match="given something else than the last hidden states"):
        split_head(model)


def chameleon() -> Any:
    import transformers

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    images = {
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "num_embeddings": 4,
        "embed_dim": 8,
        "latent_channels": 8,
    }
    vocabulary = {"<image>": 60, **{f"IMGIMG{'ABCD'[i]}Z": 40 + i for i in range(4)}}
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(**shape, vq_config=images, vocabulary_map=vocabulary)
    model = transformers.ChameleonForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def test_masked_columns_have_no_probability_and_others_the_model_s_own() -> None:
    model = chameleon()
    head = split_head(model)
    with torch.no_grad():
        own = model(input_ids=torch.from_numpy(IDS)[None]).logits[0, 3:-1].log_softmax(dim=-1)
        found = head.logits(head.scored_hidden([IDS[:4]], [IDS[4:]])).double().log_softmax(dim=-1)
    assert bool((found[:, 40:44].exp() == 0).all())
    others = [i for i in range(VOCABULARY) if not 40 <= i < 44]
    assert (found - own)[:, others].abs().max() < 1e-5  # the output layer is float32


def step_against_autograd(model: Any, twin: Any, width: int) -> None:
    attach_loss(model, CE, width, chunk=4)
    ids = torch.from_numpy(IDS)[None]
    gold = ids[0, 4:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": torch.arange(3, len(IDS) - 1)}
    total = model(**batch, gold_ids=gold)["loss"]
    total.backward()
    expected = nn.functional.cross_entropy(twin(input_ids=ids).logits[0, 3:-1, :width], gold, reduction="sum")
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    compared = 0
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.grad is not None and theirs.grad is not None:
            # norms compute in float32
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-8, name
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", [n for n in TRANSFORMED if n != "inkling_text"])
def test_a_student_s_gradient_is_that_of_its_own_logits(name: str) -> None:
    step_against_autograd(ROWS[name].model().double(), ROWS[name].model().double(), VOCABULARY)


def test_dropped_columns_are_in_no_loss_and_get_no_gradient() -> None:
    model, twin = (ROWS["inkling_text"].model().float() for _ in range(2))
    assert split_head(model).weight.shape[0] == 60
    step_against_autograd(model, twin, 60)
    assert not model.get_output_embeddings().weight.grad[60:].any()


def test_a_masked_student_has_the_gradient_of_its_own_logits() -> None:
    step_against_autograd(chameleon(), chameleon(), VOCABULARY)


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_loop_of_one_s_own_gives_the_model_and_gets_its_logits(name: str) -> None:
    model = ROWS[name].model().double()
    ids = torch.from_numpy(IDS)[None]
    batch = {"gold_ids": ids[0, 4:], "positions": torch.arange(3, len(IDS) - 1)}
    whole = distillation_loss(model(input_ids=ids), batch, CE).loss
    chunked = chunked_distillation_loss(model.model(input_ids=ids), model, batch, CE, chunk=3).loss
    assert float(chunked.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)


@pytest.mark.parametrize("name", ["gemma2", "granite", "modernbert-decoder"])
def test_scores_are_those_of_the_model_s_own_logits(name: str) -> None:
    model = ROWS[name].model().double()
    pairs = [(IDS[:4], IDS[4:]), (IDS[:4], IDS[5:7]), (IDS[:6], IDS[1:3])]
    expected = []
    for context, target in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(np.concatenate([context, target]))[None]).logits[0]
        log_p = logits.double().log_softmax(dim=-1)[len(context) - 1 : -1]
        expected.append(-log_p.gather(1, torch.from_numpy(target)[:, None])[:, 0].numpy())
    texts = [ScoredText(str(i), *pair) for i, pair in enumerate(pairs)]
    for score in (gold_nll, shared_nll):
        steps = score(model, texts, vocabulary_size=VOCABULARY)
        found = None
        while found is None:
            try:
                next(steps)
            except StopIteration as end:
                found = end.value
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-5)  # the output layer is float32
