"""An encoder-decoder's two texts have the special tokens that transformers' own tokenizers and models give them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, family_folder
from transformers import ProphetNetConfig, T5Config

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of, plan_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.progress import final
from kd.common.settings import make
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import fit_pair, tokenize_pair
from kd.data.tokenizing.text_tokens import TextTokens
from kd.evaluation.measures.choices import evaluate_choices
from kd.evaluation.measures.generation import evaluate_generation
from kd.evaluation.measures.perplexity import evaluate_perplexity
from kd.evaluation.scoring.scored_text import ScoredText, gold_nll
from kd.models.families.encoder_layout import EncoderLayout, encoder_layout
from kd.models.loading import load_model
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer

SOURCE, TARGET = "a cat and a hat", "the bananas"
Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`family_dir(name)`: a random model of the family, with a final bias where it has one, and its tokenizer."""
    return cache(lambda name: family_folder(name, tmp_path_factory.mktemp(name)))


def request_of(folder: Path, name: str) -> ModelRequest:
    return ModelRequest(str(folder), device="cpu", dtype="float32", **FAMILIES[name][2])  # type: ignore[arg-type]


def laid_out(request: ModelRequest) -> tuple[Any, BlockConfig]:
    """Tokenizer and settings of a model's pairs."""
    tokenizer = load_request_tokenizer(request)
    layout = encoder_layout(load_config(request), tokenizer)
    return tokenizer, BlockConfig(encoder=True, layout=layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_labels_that_transformers_would_train_on(family_dir: Folder, name: str) -> None:
    request = request_of(family_dir(name), name)
    tokenizer, blocks = laid_out(request)
    model = load_model(request).double()
    row = tokenize_pair(Example("0", TARGET, SOURCE), TextTokens(tokenizer), blocks)
    source = tokenizer(SOURCE, return_tensors="pt")["input_ids"]
    labels = tokenizer(text_target=TARGET, return_tensors="pt")["input_ids"]
    if name == "blenderbot":  # its tokenizer has no template; the end must be learnt all the same
        source, labels = (torch.cat([ids, torch.tensor([[2]])], dim=1) for ids in (source, labels))
    assert row.context_ids.tolist() == source[0].tolist()
    assert row.byte_end[-1] == len(TARGET)
    assert row.byte_end[0] <= 3  # the first scored token is text
    with torch.no_grad():
        logits = model(input_ids=source, labels=labels).logits[0].log_softmax(dim=-1)
    first = labels[0].tolist().index(row.target_ids[0])  # behind what is forced
    expected = -logits[first : first + len(row.target_ids)].gather(1, torch.tensor(row.target_ids).long()[:, None])[
        :, 0
    ]
    assert labels[0, first : first + len(row.target_ids)].tolist() == row.target_ids.tolist()
    found = final(scored(model, row, blocks.forced, len(tokenizer)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)  # the output layer is float32


def scored(model: Any, row: Any, forced: tuple[int, ...], size: int) -> Any:
    """The progress of `gold_nll`, and its result as the last record."""
    from kd.common.progress import Progress

    texts = [ScoredText("0", row.context_ids, row.target_ids)]
    values = yield from gold_nll(model, texts, vocabulary_size=size, forced=forced)
    yield Progress(1, 1, values)


def test_what_the_decoder_reads_first_follows_the_family(family_dir: Folder) -> None:
    found = {}
    for name in FAMILIES:
        request = request_of(family_dir(name), name)
        tokenizer, blocks = laid_out(request)
        start = load_config(request).decoder_start_token_id
        assert load_model(request).config.decoder_start_token_id == start
        found[name] = tokenizer.convert_ids_to_tokens([start, *blocks.forced])
    assert found == {
        "bart": ["</s>", "<s>"],
        "led": ["</s>", "<s>"],
        "mvp": ["</s>", "<s>"],
        "blenderbot": ["<s>"],
        "pegasus": ["<pad>"],
        "mbart": ["de_DE"],
        "mbart50": ["</s>", "de_DE"],
        "nllb": ["</s>", "deu_Latn"],
    }


def test_a_prompt_that_is_cut_keeps_its_opening_and_its_end(family_dir: Folder) -> None:
    tokenizer, blocks = laid_out(request_of(family_dir("nllb"), "nllb"))
    row = tokenize_pair(Example("0", TARGET, SOURCE), TextTokens(tokenizer), blocks)
    cut = fit_pair(row, replace(blocks, seq_len=6))
    assert cut is not None
    assert cut.context_ids.tolist() == [row.context_ids[0], *row.context_ids[-5:]]


def test_t5_s_ids_and_fingerprint_know_of_no_layout(family_dir: Folder) -> None:
    tokenizer = load_tokenizer(str(family_dir("bart")))  # whatever its template says
    assert encoder_layout(T5Config(), tokenizer) is None
    assert "layout" not in BlockConfig(encoder=True).identity()
    layout = EncoderLayout((0,), (2,), (0,), (2,))
    blocks = BlockConfig(encoder=True, layout=layout)
    assert BlockConfig.from_identity(json.loads(json.dumps(blocks.identity()))) == blocks


def test_a_family_whose_layout_is_not_known_is_refused_by_name(family_dir: Folder) -> None:
    with pytest.raises(DataError, match="prophetnet"):
        encoder_layout(ProphetNetConfig(), load_tokenizer(str(family_dir("bart"))))


@pytest.mark.parametrize(
    ("name", "languages", "words"),
    [
        ("nllb", {}, "--target-lang CODE"),
        ("nllb", {"source_lang": "fra_Latn", "target_lang": "german"}, "no such language code"),
        ("bart", {"target_lang": "de_DE"}, "writes no language codes"),
        ("mbart", {"source_lang": "fr_XX"}, "--target-lang CODE"),
    ],
)
def test_languages_are_named_and_known(family_dir: Folder, name: str, languages: dict[str, str], words: str) -> None:
    request = ModelRequest(str(family_dir(name)), device="cpu", **languages)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=words):
        encoder_layout(load_config(request), load_request_tokenizer(request))


def test_a_decoder_that_starts_from_another_language_is_refused(family_dir: Folder) -> None:
    request = request_of(family_dir("mbart"), "mbart")
    config = load_config(request)
    config.decoder_start_token_id = 2
    with pytest.raises(DataError, match="starts from another token"):
        encoder_layout(config, load_request_tokenizer(request))


def test_m2m_needs_a_tokenizer_that_writes_languages(family_dir: Folder) -> None:
    config = load_config(request_of(family_dir("nllb"), "nllb"))
    with pytest.raises(DataError, match="needs language codes"):
        encoder_layout(config, load_tokenizer(str(family_dir("bart"))))


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [("a cat", "the bananas"), ("a hat and a cat", "than"), ("the cat", "a")]
    path.write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in rows))
    return path


def built(folder: Path, spec: Path, out: Path, **settings: Any) -> CacheReader:
    values = {"teacher": str(folder), "spec": str(spec), "out": str(out), "device": "cpu", "top_k": 8, "reuse": False}
    build_of(make(BuildSettings, values | {"logprob_codec": "float32"} | settings))
    return CacheReader(out)


@pytest.mark.parametrize("name", ["bart", "mbart", "nllb"])
def test_a_cache_holds_the_values_of_the_model_s_own_forward(
    family_dir: Folder, name: str, pairs_file: Path, tmp_path: Path
) -> None:
    languages = FAMILIES[name][2]
    reader = built(family_dir(name), pairs_file, tmp_path / "cache", **languages)
    request = request_of(family_dir(name), name)
    model, tokenizer = load_model(request).double(), load_request_tokenizer(request)
    assert len(reader) == 3
    for example in reader.read(range(3)):
        source = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        labels = tokenizer(text_target=example.target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = model(input_ids=source, labels=labels).logits[0].log_softmax(dim=-1)
        first = len(reader.manifest.blocks.forced)
        top = own[first : first + len(example.targets)].topk(8, dim=1)
        assert example.targets.token_ids is not None
        assert example.targets.logprobs is not None
        assert np.array_equal(example.targets.token_ids, top.indices.numpy())
        np.testing.assert_allclose(example.targets.logprobs, top.values.numpy(), rtol=0, atol=3e-5)
    assert reader.manifest.blocks.layout == encoder_layout(load_config(request), tokenizer)
    if languages:
        plan = plan_of(
            make(
                BuildSettings,
                {
                    "teacher": str(family_dir(name)),
                    "spec": str(pairs_file),
                    "out": str(tmp_path / "other"),
                    "device": "cpu",
                    "top_k": 8,
                    "logprob_codec": "float32",
                    "source_lang": languages["source_lang"],
                    "target_lang": languages["source_lang"],
                },
            )
        )
        assert plan.manifest.fingerprint != reader.manifest.fingerprint


@pytest.mark.parametrize("name", ["mbart50", "nllb", "mbart", "bart"])
def test_scores_and_answers_begin_as_the_family_does(family_dir: Folder, name: str) -> None:
    request = request_of(family_dir(name), name)
    model, tokenizer = load_model(request), load_request_tokenizer(request)
    layout = encoder_layout(model.config, tokenizer)
    assert layout is not None
    examples = (
        Example("0", TARGET, SOURCE, choices=("the bananas", "than", "a")),
        Example("1", "than", "a cat", choices=("a", "than")),
    )
    corpus = Corpus("here", "", "pairs", examples, {})

    def own_nats(example: Example, target: str, *, ended: bool) -> float:
        source = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=source, labels=labels).logits[0].log_softmax(dim=-1)
        inner = labels[0, len(layout.target_before) : labels[0].tolist().index(2) + ended]
        at = torch.arange(len(inner)) + len(layout.target_before)
        return float(log_p[at, inner].sum())

    perplexity = final(evaluate_perplexity(model, tokenizer, corpus))
    nats = -sum(own_nats(e, e.target, ended=True) for e in examples)
    assert perplexity.nll_per_token.value * perplexity.tokens == pytest.approx(nats, rel=1e-5)
    choices = final(evaluate_choices(model, tokenizer, corpus))
    for example, found in zip(examples, choices.option_nats, strict=True):
        expected = [own_nats(example, option, ended=False) for option in example.choices]
        assert found == pytest.approx(expected, rel=1e-5)
    answers = final(evaluate_generation(model, tokenizer, corpus, max_new_tokens=6)).answers
    for example, answer in zip(examples, answers, strict=True):
        source = tokenizer(example.prompt, return_tensors="pt")
        forced = layout.target_before[0] if layout.target_before else None
        written = model.generate(
            **source,
            max_new_tokens=6 + len(layout.target_before),
            num_beams=1,
            do_sample=False,
            forced_bos_token_id=forced,
            decoder_start_token_id=model.config.decoder_start_token_id,
            forced_eos_token_id=None,
        )
        assert answer == tokenizer.decode(written[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
