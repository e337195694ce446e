"""Packed examples do not see each other, in any layout and attention; models that cannot keep them apart are refused."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LAYOUTS, tiny_model, with_kinds
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
)

from kd.common.errors import DataError
from kd.models.batching.packing import lay_out
from kd.models.heads import split_head
from kd.models.packable import require_packable

V = 50
EVERY = with_kinds(LAYOUTS)
# layers that compute in float32 whatever the model's dtype: RMS norms, rotary positions, GPT-Neo's scores
ROUNDING = {"gpt2": 1e-12, "gpt_neox": 1e-6, "llama": 1e-6, "mistral": 1e-6, "gpt_neo": 1e-6, "t5": 1e-6}


def model_of(name: str, kind: str = "eager") -> Any:
    """A tiny model that is to score."""
    model = tiny_model(name, kind, V, window=3).eval()
    with torch.no_grad():  # predictions that depend on what is looked at
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def batch_of(sequences: list[list[int]], examples: list[np.ndarray], *, two_sides: bool) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(value) for name, value in lay_out(examples, sequences).items()}
    if two_sides:  # the decoder reads the same backwards
        other = lay_out([e[::-1] for e in examples], sequences)
        found |= {f"decoder_{n}": torch.from_numpy(other[n]) for n in ("input_ids", "segment_ids")}
    return found


def states(model: Any, batch: dict[str, torch.Tensor], examples: list[np.ndarray]) -> list[torch.Tensor]:
    """Hidden states of each example."""
    flat = split_head(model).batch_hidden(batch).flatten(0, 1)
    return [flat[s : s + len(e)] for s, e in zip(batch["starts"].tolist(), examples, strict=True)]


def examples_of(*sizes: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, n) for n in sizes]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_packed_example_is_what_it_is_alone(name: str, kind: str) -> None:
    model, examples = model_of(name, kind), examples_of(7, 1, 9, 4, 5)
    parts = split_head(model)
    packed = states(model, batch_of([[0, 1, 2], [3, 4]], examples, two_sides=name == "t5"), examples)
    for found, example in zip(packed, examples, strict=True):
        ids = torch.from_numpy(example)[None]
        alone = parts.decode(ids, None, ids.flip(1)) if name == "t5" else parts.hidden(ids, None)  # type: ignore[attr-defined]
        assert relative_error(found, alone[0]) < ROUNDING[name]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_other_neighbours_change_nothing(name: str, kind: str) -> None:
    model, two_sides = model_of(name, kind), name == "t5"
    one, other = examples_of(5, 6, 4), examples_of(5, 6, 4, seed=1)
    other[1] = one[1]
    a, b = (states(model, batch_of([[0, 1, 2]], e, two_sides=two_sides), e) for e in (one, other))
    assert torch.equal(a[1], b[1])
    assert not torch.allclose(a[0], b[0])


def test_a_kernel_that_finds_segments_in_one_row_alone_is_given_one_row() -> None:
    """transformers' flash attention packs batches of one by their positions, and ignores them in larger ones."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    def one_row_mask(batch_size: int, *rest: Any, **more: Any) -> Any:
        if batch_size > 1:
            more["mask_function"] = causal_mask_function
        return sdpa_mask(batch_size, *rest, **more)

    AttentionInterface.register("one_row", sdpa_attention_forward)
    AttentionMaskInterface.register("one_row", one_row_mask)
    examples = examples_of(7, 1, 9, 4, 5)
    model = model_of("llama", "one_row")
    require_packable(model)
    packed = states(model, batch_of([[0, 1, 2], [3, 4]], examples, two_sides=False), examples)
    for found, example in zip(packed, examples, strict=True):
        alone = split_head(model).hidden(torch.from_numpy(example)[None], None)
        assert relative_error(found, alone[0]) < ROUNDING["llama"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_keep_examples_apart_are_taken(name: str) -> None:
    model = model_of(name).float().train()
    require_packable(model)
    assert model.training


def test_positions_that_cannot_be_passed_are_refused_by_the_class_s_name() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=1, n_head=2))
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=V,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
        )
    )
    for model in (bloom, bart):
        with pytest.raises(DataError, match="need positions of their own") as caught:
            require_packable(model)
        assert caught.value.details["where"] == type(model).__name__


def test_a_model_whose_tokens_leak_past_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recurrent layer would: the state before a token is carried on."""
    model = model_of("gpt2").float()
    own = type(model.transformer).forward

    @wraps(own)  # with its signature
    def leaking(self: Any, *rest: Any, **more: Any) -> Any:
        output = own(self, *rest, **more)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.cumsum(dim=1) / 10
        return output

    monkeypatch.setattr(type(model.transformer), "forward", leaking)
    with pytest.raises(DataError, match="do not score as they do alone") as caught:
        require_packable(model)
    assert caught.value.details["where"] == "GPT2LMHeadModel"
