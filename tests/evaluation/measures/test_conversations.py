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
from kd.common.progress import final
from kd.common.settings import make
from kd.data.sources import load_corpus
from kd.evaluation.measures.choices import evaluate_choices
from kd.evaluation.scoring.chat_asking import with_chat
from kd.evaluation.scoring.reading_options import ReadingOptions


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
    assert cached["kl_kept"]["n"] == live["kl"]["n"]
    assert abs(cached["kl_kept"]["value"]) < 1e-3  # the cache's codec
    assert abs(live["kl"]["value"]) < 1e-12
    assert cached["top1_agreement"]["value"] == live["top1_agreement"]["value"] == 1.0


def test_training_conversations_are_found_again(files, chat_cache: Path, tmp_path: Path) -> None:
    data, template = files
    kd.train(cache=str(chat_cache), student="demo", out=str(tmp_path / "run"), max_steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data).read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="trained on what it would be asked"):
        kd.evaluate(str(tmp_path / "run"), "perplexity", data=str(other), chat_template=template)


def test_a_model_without_a_template_is_refused(files, tmp_path: Path) -> None:
    data, _ = files
    for task in ("perplexity", "generation"):
        with pytest.raises(DataError, match="no chat template"):
            kd.evaluate("demo", task, data=data)
    (tmp_path / "plain.txt").write_text("A fox lived in the wood. It was small.\n")
    with pytest.raises(DataError, match="no prompts to ask"):
        kd.evaluate("demo", "perplexity", data=str(tmp_path / "plain.txt"), chat=True)
    with pytest.raises(DataError, match="asks through no chat template"):
        kd.evaluate("demo", "hellaswag", chat=True)


def test_every_turn_of_the_assistant_is_asked_after_the_turns_before_it(files) -> None:
    """Against transformers' own rendering and `generate`, turn by turn; a conversation is one document."""
    data, template = files
    report = kd.evaluate("demo", "generation", data=data, chat_template=template, max_new_tokens=6)
    model, tokenizer = kd.load_teacher("demo")
    tokenizer.chat_template = PLAIN
    asked = [chat[:number] for chat in CHATS for number, (role, _) in enumerate(chat) if role == "assistant"]
    samples = report.documents["generation"]["samples"]
    assert len(samples) == len(asked) == report.tasks["generation"]["exact_match"]["n"] == 6
    assert report.documents["generation"]["count"] == len(CHATS)
    for messages, sample in zip(asked, samples, strict=True):
        given = [{"role": role, "content": text} for role, text in messages]
        text = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        for _ in range(6):
            best = model(ids).logits[0, -1].argmax()
            if best == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best[None, None]], dim=1)
        written = tokenizer.decode(ids[0])[len(text) :]
        assert sample["got"] == written
    assert report.settings["generation"]["chat"]["template"] != "the model's own"
    assert report.identity["chat_template"] == report.settings["generation"]["chat"]["template"]


def test_prompts_asked_with_chat_are_those_of_the_same_conversations(tmp_path: Path, files) -> None:
    """A pair with --chat and the conversation of its two turns: the same perplexity and the same answers."""
    _, template = files
    pairs = [("Two plus two?", "Four."), ("Name a colour.", "Red, as a rose."), ("And one more?", "Blue.")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in pairs))
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": t}] for p, t in pairs]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p, _ in pairs))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"messages": talk[:1]}) + "\n" for talk in talks))
    tasks, options = ["perplexity", "generation"], {"chat_template": template, "max_new_tokens": 5}
    by_pair = kd.evaluate("demo", tasks, data=str(tmp_path / "pairs.jsonl"), chat=True, **options)
    by_talk = kd.evaluate("demo", tasks, data=str(tmp_path / "chats.jsonl"), **options)
    assert by_pair.tasks["perplexity"] == by_talk.tasks["perplexity"]
    got = [[s["got"] for s in r.documents["generation"]["samples"]] for r in (by_pair, by_talk)]
    assert got[0] == got[1]
    written = [
        kd.evaluate("demo", "samples", prompts=str(tmp_path / name), **more, **options).documents["samples"]["samples"]
        for name, more in (("prompts.jsonl", {"chat": True}), ("asked.jsonl", {}))
    ]
    assert [s["got"] for s in written[0]] == [s["got"] for s in written[1]] == got[0]


def test_choices_are_answers_of_the_assistant(tmp_path: Path, files) -> None:
    """The training encoding scores a choice as the rendering with it as the assistant's turn has it."""
    _, template = files
    corpus = load_corpus("mini:heldout", limit=14)
    model, tokenizer = kd.load_teacher("demo")
    reading = ReadingOptions(chat=True, chat_template=template)
    result = final(evaluate_choices(model, tokenizer, with_chat(corpus), reading=reading))
    tokenizer.chat_template = PLAIN
    for question, nats in zip(result.questions, result.option_nats, strict=True):
        for option, value in zip(question.example.choices, nats, strict=True):
            talk = [{"role": "user", "content": question.example.prompt}, {"role": "assistant", "content": option}]
            text = tokenizer.apply_chat_template(talk, tokenize=False).removesuffix(tokenizer.eos_token)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == [*question.context_ids, *question.option_ids[question.example.choices.index(option)]]
            logprobs = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
            start = len(question.context_ids)
            assert value == pytest.approx(
                sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))), abs=1e-3
            )
            assert tokenizer.decode(question.context_ids).rstrip().endswith("[assistant]")


def test_a_run_is_asked_with_its_own_template_variables_and_system_text(files, tmp_path: Path) -> None:
    data, _ = files
    source = PLAIN.replace("{% for m", "{{ note | default('') }}{% for m", 1)
    (tmp_path / "noted.jinja").write_text(source)
    how = {"chat_template": str(tmp_path / "noted.jinja"), "template_kwargs": {"note": "Note. "}, "system": "Be kind."}
    cache = tmp_path / "cache"
    build_of(make(BuildSettings, {"teacher": "demo", "spec": data, "out": cache, **how}))
    kd.train(cache=str(cache), student="demo", out=str(tmp_path / "run"), max_steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]})
    )
    by_itself = kd.evaluate(str(tmp_path / "run"), "perplexity", data=str(other))
    spelled = kd.evaluate(str(tmp_path / "run"), "perplexity", data=str(other), **how)
    assert by_itself.tasks == spelled.tasks
    assert by_itself.settings["perplexity"]["chat"]["system"] == "Be kind."
    bare = kd.evaluate(str(tmp_path / "run"), "perplexity", data=str(other), template_kwargs={}, system="")
    assert bare.tasks != by_itself.tasks
