"""A context read once gives what separate passes give, for every architecture, and says so before it is believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    T5Config,
)

from kd.common.errors import DataError
from kd.common.progress import final
from kd.evaluation.scoring import shared_context
from kd.evaluation.scoring.scored_text import ScoredText, gold_nll
from kd.evaluation.scoring.shared_context import group_by_context, shared_nll, shares_context
from kd.models.heads import split_head
from kd.models.model_config import is_encoder_decoder

V = 97
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V, "initializer_range": 0.3}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "gpt-neo, local attention": GPTNeoConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        window_size=8,
        max_position_embeddings=40,
        attention_types=[[["global", "local"], 1]],
        initializer_range=0.3,
    ),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=40),
    "llama, shared keys": LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64, max_position_embeddings=40),
    "mistral, sliding window": MistralConfig(**SMALL, num_key_value_heads=1, intermediate_size=64, sliding_window=8),
    "t5": T5Config(
        vocab_size=V,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        initializer_factor=1.0,
    ),
    "bart": BartConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=40,
        decoder_start_token_id=2,
        init_std=0.3,
    ),
}


def make(config, dtype=torch.float32):
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.from_config(config, dtype=torch.float32).to(dtype).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


def texts() -> list[ScoredText]:
    """Seven contexts of 1 to 30 tokens, one to five continuations of 1 to 9 each, some equal, in a mixed order."""
    rng = np.random.default_rng(0)
    found = []
    for context in range(7):
        ids = rng.integers(3, V, size=[1, 4, 30, 12, 12, 20, 7][context]).astype(np.int32)
        found += [
            ScoredText(f"{context}/{i}", ids, rng.integers(3, V, size=rng.integers(1, 10)).astype(np.int32))
            for i in range(context % 5 + 1)
        ]
    found += [found[3], ScoredText("one token", found[3].context_ids, found[3].target_ids[:1])]
    return [found[i] for i in rng.permutation(len(found))]


def run(steps) -> np.ndarray:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@torch.no_grad()
def plain(model64, text: ScoredText) -> list[float]:
    """One text by itself through the model's own forward, float64."""
    context, target = (torch.tensor(ids.astype(np.int64)) for ids in (text.context_ids, text.target_ids))
    if is_encoder_decoder(model64.config):
        start = torch.tensor([model64.config.decoder_start_token_id])
        logits = model64(input_ids=context[None], decoder_input_ids=torch.cat([start, target[:-1]])[None]).logits[0]
    else:
        logits = model64(torch.cat([context, target])[None]).logits[0, len(context) - 1 : -1]
    return (-logits.log_softmax(-1)[torch.arange(len(target)), target]).tolist()


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_every_architecture_gives_the_plain_float64_numbers(config, tokens_per_batch):
    model, model64 = make(config), make(config, torch.float64)
    assert shares_context(split_head(model))
    expected = np.concatenate([plain(model64, t) for t in texts()])
    got = run(shared_nll(model, texts(), tokens_per_batch=tokens_per_batch))
    assert np.abs(got - expected).max() < 5e-5  # float32 logits of about 20
    apart = run(gold_nll(model, texts(), vocabulary_size=V))
    assert np.abs(got - apart).max() < 5e-5


def test_every_context_token_is_read_once(monkeypatch):
    model = make(CONFIGS["gpt2"])
    read = []

    def watch(_, positional, named, __):
        read.append((positional[0] if positional else named["input_ids"]).shape)

    model.base_model.register_forward_hook(watch, with_kwargs=True)
    context = np.arange(3, 23, dtype=np.int32)
    options = [ScoredText("q", context, np.arange(3, 3 + n, dtype=np.int32)) for n in (4, 3, 1)]
    monkeypatch.setattr(shared_context, "shares_context", lambda _: True)
    run(shared_nll(model, options))
    assert [tuple(shape) for shape in read[-3:]] == [(1, 20), (1, 3), (1, 2)]  # a last token predicts nothing


def test_equal_texts_get_equal_numbers():
    model = make(CONFIGS["gpt2"])
    some = texts()
    nll = np.split(run(shared_nll(model, some)), np.cumsum([len(t.target_ids) for t in some])[:-1])
    same = [i for i, t in enumerate(some) if t.id == next(x.id for x in some if sum(y is x for y in some) > 1)]
    assert len(same) == 2
    assert nll[same[0]].tolist() == nll[same[1]].tolist()


def test_groups_keep_every_text_once():
    some = texts()
    branches, places = group_by_context(some)
    assert sorted(i for ways in places for numbers in ways for i in numbers) == list(range(len(some)))
    for branch, ways in zip(branches, places, strict=True):
        lengths = [len(ids) for ids in branch.continuations]
        assert lengths == sorted(lengths, reverse=True)
        for ids, numbers in zip(branch.continuations, ways, strict=True):
            for i in numbers:
                assert some[i].context_ids.tolist() == branch.context_ids.tolist()
                assert some[i].target_ids.tolist() == ids.tolist()
    assert len({b.context_ids.tobytes() for b in branches}) == len(branches) == 7


def test_a_recurrent_model_is_scored_by_separate_passes():
    config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    model = make(config)
    assert not shares_context(split_head(model))
    expected = run(gold_nll(model, texts(), vocabulary_size=V))
    assert run(shared_nll(model, texts())).tolist() == expected.tolist()


def test_a_cache_that_gives_other_numbers_is_found_out(monkeypatch):
    model = make(CONFIGS["gpt2"])
    branch = shared_context._branch
    monkeypatch.setattr(shared_context, "_branch", lambda cache, *rest: cache)  # options see each other
    assert not shares_context(split_head(model))
    monkeypatch.setattr(shared_context, "_branch", branch)
    assert shares_context(split_head(model))


def test_logits_that_are_not_finite_name_their_example():
    model = make(CONFIGS["gpt2"])
    context = np.array([3, 4, 5], dtype=np.int32)
    good, bad = np.array([6, 7], dtype=np.int32), np.array([8, 96, 9], dtype=np.int32)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[96] = torch.nan
    with pytest.raises(DataError, match="not finite") as error:
        final(shared_nll(model, [ScoredText("a", context, good), ScoredText("b", context, bad)]))
    assert error.value.details["where"] == "example b"
    assert (
        "token 1" in error.value.details["found"]
    )  # before 96 already: attention gives it no weight, and 0 · NaN is NaN
