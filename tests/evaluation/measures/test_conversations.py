"""Conversations in an evaluation: the tokens of the assistant, and no others, are scored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from chat_templates import CHATS, PLAIN, examples_of

import kd
from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.common.errors import DataError
from kd.common.settings import make


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("talks")
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.jinja").write_text(PLAIN)
    return str(folder / "chat.jsonl"), str(folder / "plain.jinja")


@pytest.fixture(scope="module")
def chat_cache(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, template = files
    out = tmp_path_factory.mktemp("cache") / "cache"
    build_of(make(BuildSettings, {"teacher": "demo", "spec": data, "chat_template": template, "out": out}))
    return out


def test_perplexity_is_that_of_the_assistants_tokens(files, chat_cache: Path) -> None:
    """Against the model's own logits, example by example."""
    data, template = files
    report = kd.evaluate("demo", "perplexity", data=data, chat_template=template)
    model, _ = kd.load_teacher("demo")
    total = rows = 0.0
    for example in examples_of(kd.open_cache(chat_cache)):
        ids = torch.from_numpy(example.input_ids).long()[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        for place in example.gaps.positions(len(example.context_ids), len(example.targets)):
            total -= float(logprobs[place, ids[0, place + 1]])
            rows += 1
    figure = report.tasks["perplexity"]["perplexity"]
    assert figure["n"] == rows
    assert figure["value"] == pytest.approx(math.exp(total / rows), rel=1e-5)
    assert report.settings["perplexity"]["chat"]["score"] == "assistant"


def test_a_teacher_agrees_with_its_own_cache_and_with_itself(files, chat_cache: Path) -> None:
    data, template = files
    cached = kd.evaluate("demo", "agreement", cache=str(chat_cache)).tasks["agreement"]
    live = kd.evaluate("demo", "agreement", teacher="demo", data=data, chat_template=template).tasks["agreement"]
    assert cached["kl"]["n"] == live["kl"]["n"]
    assert abs(cached["kl"]["value"]) < 1e-3  # the cache's codec
    assert abs(live["kl"]["value"]) < 1e-12
    assert cached["top1_agreement"]["value"] == live["top1_agreement"]["value"] == 1.0


def test_training_conversations_are_found_again(files, chat_cache: Path, tmp_path: Path) -> None:
    data, template = files
    kd.train(cache=str(chat_cache), student="demo", out=str(tmp_path / "run"), max_steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data).read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="trained on what it would be asked"):
        kd.evaluate(str(tmp_path / "run"), "perplexity", data=str(other), chat_template=template)


def test_tasks_that_do_not_speak_chat_say_so(files) -> None:
    data, _ = files
    with pytest.raises(DataError, match="no chat template"):
        kd.evaluate("demo", "perplexity", data=data)
    for task in ("generation", "choices"):
        with pytest.raises(DataError):
            kd.evaluate("demo", task, data=data)
