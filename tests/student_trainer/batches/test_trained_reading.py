"""A student is scored in the reading it was trained in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from kd.cache_builder.store.readers.reader import CacheReader
from kd.data.tokenizing.block_config import BlockConfig
from kd.evaluation.evaluate import evaluate
from kd.student_trainer.batches.trained_reading import READING, TrainedReading, reading_of_run
from kd.student_trainer.run_folder import read_run, write_run


@pytest.fixture(scope="module")
def odd_cache(tmp_path_factory, build_request, run_build, pairs_file: Path) -> Path:
    """Pairs with another separator than the usual, and without BOS."""
    out = tmp_path_factory.mktemp("odd") / "cache"
    request = build_request(out, text=pairs_file, seq_len=64)
    run_build(replace(request, blocks=BlockConfig(seq_len=64, separator=" ANSWER: ", bos=False)))
    return out


def loss_on_cached_rows(run: Path, cache: Path) -> float:
    """Mean cross-entropy of the cached rows, one example at a time: what training minimises."""
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    reader, losses = CacheReader(cache), []
    for number in range(len(reader)):
        example = reader[number]
        ids = torch.from_numpy(example.input_ids).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        rows = len(example.targets.gold_ids)
        losses.append(F.cross_entropy(logits[-rows - 1 : -1, :400], ids[-rows:], reduction="none").numpy())
    return float(np.concatenate(losses).mean())


@pytest.mark.parametrize("settings", [{"loss": "kl"}, {"loss": "ce", "prompt_loss": True}])
def test_the_score_of_a_run_on_its_own_text_is_its_training_loss(run, odd_cache, pairs_file, settings) -> None:
    out = run(cache=str(odd_cache), max_steps=4, **settings).out
    assert reading_of_run(str(out)) == TrainedReading(bos=False, separator=" ANSWER: ")
    scored = {"data": str(pairs_file), "allow_contaminated": True, "device": "cpu"}
    report = evaluate(str(out), "perplexity", **scored)
    expected = loss_on_cached_rows(out, odd_cache)
    # float32 sums in another order
    assert report.tasks["perplexity"]["nll_per_token"]["value"] == pytest.approx(expected, abs=1e-5)
    assert report.settings["perplexity"]["separator"] == " ANSWER: "
    other = evaluate(str(out), "perplexity", bos=True, separator="\n", **scored)
    assert other.settings["perplexity"]["separator"] == "\n"
    assert abs(other.tasks["perplexity"]["nll_per_token"]["value"] - expected) > 1e-3


def test_a_separator_of_the_runs_own_and_tokens_of_its_own_count(run, odd_cache) -> None:
    out = run(cache=str(odd_cache), loss="ce", separator=" => ", max_steps=1).out
    assert reading_of_run(str(out)) == TrainedReading(bos=True, separator=" => ")


def test_a_run_of_an_earlier_release_is_read_as_its_cache_says(run, odd_cache, tmp_path: Path) -> None:
    out = run(cache=str(odd_cache), max_steps=1).out
    document = read_run(out)
    said = document.pop(READING)
    write_run(out, document)
    assert reading_of_run(str(out)) == TrainedReading(**said)
    document["settings"]["cache"] = str(tmp_path / "gone")
    write_run(out, document)
    assert reading_of_run(str(out)) is None
    assert reading_of_run(str(tmp_path)) is None
    assert reading_of_run("openai-community/gpt2") is None
