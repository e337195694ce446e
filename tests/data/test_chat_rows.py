"""Conversations from a file to rows, to a cache, and to a student's batch, each compared with a model's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import CHATS, LAYOUTS, PLAIN, examples_of

import kd
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import DataError
from kd.common.progress import final
from kd.data.chat_rows import chat_template, first_turns, tokenize_conversations
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.token_notes import TokenNotes
from kd.models.tokenizer import load_tokenizer, token_bytes


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Conversations and a template for the embedded teacher, as files."""
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    data, template = tmp_path / "chat.jsonl", tmp_path / "plain.jinja"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(PLAIN)
    return data, template


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return kd.load_teacher("demo")


def rows_of(corpus: Corpus, template: Path, **options: Any) -> tuple[list[Any], LeftOut]:
    """The rows of the conversations, and what was left out."""
    config = BlockConfig(options.pop("seq_len", 256), overlong=options.pop("overlong", "error"))
    settings, left_out = ChatSettings(chat_template=str(template), **options), LeftOut()
    chat = chat_template(load_tokenizer("demo"), settings)
    return list(tokenize_conversations(corpus, chat, settings, config, left_out)), left_out


def test_rows_spell_the_rendering_and_the_turns(files) -> None:
    data, template = files
    tokenizer = load_tokenizer("demo")
    pieces = token_bytes(tokenizer)
    rows, left_out = rows_of(load_corpus(str(data)), template)
    assert not left_out.counts
    for row, chat in zip(rows, CHATS, strict=True):
        text = b"".join(pieces[i] for i in row.input_ids).decode()
        whole = "\n".join(f"[{role}] {said}" + ("<|endoftext|>" if role == "assistant" else "") for role, said in chat)
        assert text == whole
        answers = [said for role, said in chat if role == "assistant"]
        assert row.example.target == "".join(f" {said}" for said in answers)
        assert row.ended == (True,) * len(answers)
        assert text.startswith(row.example.prompt)
        for (first, stop), answer in zip(row.gaps.turns(len(row.target_ids)), answers, strict=True):
            assert b"".join(pieces[i] for i in row.target_ids[first:stop]).decode() == f" {answer}<|endoftext|>"
        assert row.byte_end[-1] == len(row.example.target.encode())


def test_a_conversation_of_one_turn_is_the_pair_of_its_rendering(files, tmp_path) -> None:
    """To the last bit: ids, byte ends and every stored value."""
    _, template = files
    chat = tmp_path / "one.jsonl"
    messages = [{"role": "user", "content": "Who lived there?"}, {"role": "assistant", "content": "A small fox."}]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    pair = tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "[user] Who lived there?\n[assistant]", "target": " A small fox."}) + "\n")
    common = {"teacher": "demo", "top_k": 16, "reuse": False}
    one = build({**common, "spec": str(chat), "out": tmp_path / "one", "chat_template": template})
    two = build({**common, "spec": str(pair), "out": tmp_path / "two", "separator": "", "bos": False})
    (ours,), (theirs,) = examples_of(one), examples_of(two)
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    for name in ("gold_ids", "token_ids", "logprobs", "log_z", "gold_logprob", "gold_rank", "byte_end"):
        assert np.array_equal(getattr(ours.targets, name), getattr(theirs.targets, name)), name


def build(settings: dict[str, Any]) -> kd.Reader:
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.cache_builder.build.from_settings import build_of
    from kd.common.settings import make

    build_of(make(BuildSettings, settings))
    return kd.open_cache(settings["out"])


@pytest.fixture
def cache(files, tmp_path) -> kd.Reader:
    data, template = files
    settings = {"teacher": "demo", "spec": str(data), "out": tmp_path / "cache", "chat_template": template}
    return build(settings | {"top_k": 32, "reuse": False, "logprob_codec": "float32"})


def test_cached_rows_are_the_models_own_distributions(cache, teacher) -> None:
    model, _ = teacher
    for example in examples_of(cache):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        places = example.gaps.positions(len(example.context_ids), len(example.targets))
        assert ids[0, places + 1].tolist() == example.targets.gold_ids.tolist()
        top = logprobs[places].topk(8)
        assert top.indices.tolist() == example.targets.token_ids[:, :8].tolist()
        # float32 through a cut output layer and float16 normalisers
        assert np.abs(example.targets.logprobs[:, :8] - top.values.numpy()).max() < 1e-3


def test_the_manifest_names_template_and_score_and_other_ones_make_another_cache(cache, files, tmp_path) -> None:
    data, template = files
    identity = cache.manifest.identity
    assert cache.manifest.format_version == 3
    assert identity["corpus"]["kind"] == "conversations"
    assert identity["chat"]["score"] == "assistant"
    fingerprints = {cache.manifest.fingerprint}
    template.write_text(PLAIN.replace("m.content }}", "m.content }} "))
    for number, more in enumerate(({}, {"score": "last"}, {"system": "Be kind."}, {"template_kwargs": {"a": 1}})):
        settings = {"teacher": "demo", "spec": str(data), "out": tmp_path / f"{number}", "chat_template": template}
        fingerprints.add(build(settings | more | {"top_k": 8}).manifest.fingerprint)
    assert len(fingerprints) == 5


def test_verify_slice_and_damage(cache, tmp_path) -> None:
    assert final(verify(cache.root)) == ()
    assert final(verify(final(slice_cache(cache.root, tmp_path / "slice", top_k=4)))) == ()
    slice_of = kd.open_cache(tmp_path / "slice")
    for whole, part in zip(examples_of(cache), examples_of(slice_of), strict=True):
        assert part.gaps == whole.gaps
        assert part.input_ids.tolist() == whole.input_ids.tolist()
        assert np.array_equal(part.targets.token_ids, whole.targets.token_ids[:, :4])


def test_too_long_conversations_are_cut_at_turns(files) -> None:
    data, template = files
    corpus = load_corpus(str(data))
    whole, _ = rows_of(corpus, template)
    longest = max(len(row.input_ids) for row in whole)
    with pytest.raises(DataError, match=r"longer than the limit(.|\n)*1 of 3, first chat.jsonl:1"):
        rows_of(corpus, template, seq_len=longest - 1)
    kept, left_out = rows_of(corpus, template, seq_len=longest - 1, overlong="drop")
    assert (len(kept), left_out.count("too_long")) == (2, 1)
    cut, left_out = rows_of(corpus, template, seq_len=longest - 1, overlong="truncate")
    assert left_out.count("shortened") == 1
    assert len(cut[1].ended) == 2
    assert cut[1].example.target == " Red. Green."
    assert whole[1].input_ids[: len(cut[1].input_ids)].tolist() == cut[1].input_ids.tolist()
    assert first_turns(whole[1], 5) is None


def test_a_template_that_rewrites_turns_makes_an_example_of_each_rendering(shared, files) -> None:
    data, _ = files
    layout = LAYOUTS["reasoning"]
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(layout.control), "eos_token": layout.eos})
    tokenizer.chat_template = layout.source
    settings = ChatSettings()
    chat = chat_template(tokenizer, settings)
    corpus = load_corpus(str(data), limit=1)
    rows = list(tokenize_conversations(corpus, chat, settings, BlockConfig(256), LeftOut()))
    assert [row.example.id for row in rows] == ["chat.jsonl:0#0", "chat.jsonl:0#1"]
    assert [row.example.target for row in rows] == [
        "<think>\n\n</think>\n\nFour.",
        "<think>\n\n</think>\n\nFive, I think.",
    ]


def test_what_cannot_be_scored_names_the_conversation(files, tmp_path) -> None:
    data, template = files
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"refuses the conversation\n  where  conversation chat.jsonl:0"):
        rows_of(load_corpus(str(data)), template)
    with pytest.raises(DataError, match="cannot read the chat template"):
        rows_of(load_corpus(str(data)), tmp_path / "nowhere.jinja")
    template.write_text("{{ strftime_now('%d %b %Y') }}" + PLAIN)
    with pytest.raises(DataError, match="date of the day"):
        rows_of(load_corpus(str(data)), template)
    with pytest.raises(DataError, match="no chat template"):
        chat_template(load_tokenizer("demo"), ChatSettings())


def test_conversations_that_a_template_refuses_are_skipped_and_counted(files, tmp_path) -> None:
    _, template = files
    template.write_text("{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN)
    good = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    data = tmp_path / "mixed.jsonl"
    rows = [{"messages": good}, {"messages": [{"role": "tool", "content": "x"}, *good]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"refuses the conversation\n  where  conversation mixed.jsonl:1"):
        rows_of(load_corpus(str(data)), template)
    kept, left_out = rows_of(load_corpus(str(data), bad_rows="skip"), template)
    assert [row.example.id for row in kept] == ["mixed.jsonl:0"]
    assert left_out.document()["bad_rows"] == {
        "count": 1,
        "first": "mixed.jsonl:1, the chat template refuses the conversation",
    }


def test_turns_with_weight_0_are_read_and_have_no_rows(files, tmp_path) -> None:
    _, template = files
    rows = []
    for weight in (1, 0):
        said = [("user", "Two?"), ("assistant", "2"), ("user", "Three?"), ("assistant", "3")]
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
        messages[1]["weight"] = weight
        rows.append({"messages": messages})
    data = tmp_path / "weights.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (whole, part), _ = rows_of(load_corpus(str(data)), template)
    assert whole.input_ids.tolist() == part.input_ids.tolist()
    assert (whole.messages, part.messages) == ((1, 3), (3,))
    assert part.example.target == " 3"
    with pytest.raises(DataError, match=r"not to be learned cannot be scored(.|\n)*--score all, and 1 turns"):
        rows_of(load_corpus(str(data)), template, score="all")
    only_first = tmp_path / "first.jsonl"
    rows[1]["messages"][3]["weight"], rows[1]["messages"][1]["weight"] = 0, 1
    only_first.write_text(json.dumps(rows[1]) + "\n")
    (last,), _ = rows_of(load_corpus(str(only_first)), template, score="last")
    assert last.example.target == " 2", "the last of the turns that are learned"


def test_what_a_template_does_with_the_messages_is_noted(files, tmp_path) -> None:
    """Control tokens that became text, reasoning and tools that the template does not write."""
    _, template = files
    messages = [
        {"role": "user", "content": "What is <|endoftext|> and <|endoftext|>?"},
        {"role": "assistant", "content": "A token.", "reasoning_content": "It ends texts."},
    ]
    data = tmp_path / "notes.jsonl"
    data.write_text(json.dumps({"messages": messages, "tools": [{"name": "search"}]}) + "\n")
    chat = chat_template(load_tokenizer("demo"), ChatSettings(chat_template=str(template)))
    notes, corpus = TokenNotes(), load_corpus(str(data))
    list(tokenize_conversations(corpus, chat, ChatSettings(), BlockConfig(256), LeftOut(), notes))
    found = {note: entry["count"] for note, entry in notes.document().items()}
    assert found == {"control_tokens_as_text": 2, "reasoning_not_shown": 1, "tools_not_shown": 1}
    template.write_text("{{ tools }}" + PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}"))
    chat = chat_template(load_tokenizer("demo"), ChatSettings(chat_template=str(template)))
    notes = TokenNotes()
    list(tokenize_conversations(corpus, chat, ChatSettings(), BlockConfig(256), LeftOut(), notes))
    assert notes.document().keys() == {"control_tokens_as_text"}


def test_a_turn_whose_calls_the_template_leaves_out_is_no_empty_turn(files, tmp_path) -> None:
    """The plain template shows no calls; TOOLS does."""
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}
    talk = [
        {"role": "user", "content": "What is the summary?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    talk += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with pytest.raises(DataError, match="does not show the calls of tools") as caught:
        rows_of(load_corpus(str(tmp_path / "calls.jsonl")), files[1])
    assert "calls.jsonl:0" in caught.value.details["where"]
    rows, left_out = rows_of(load_corpus(str(tmp_path / "calls.jsonl"), bad_rows="skip"), files[1])
    assert (rows, left_out.counts["bad_rows"]) == ([], 1)
    (tmp_path / "tools.jinja").write_text(LAYOUTS["tools"].source.replace("<|im_end|>", "{{ eos_token }}"))
    rows, _ = rows_of(load_corpus(str(tmp_path / "calls.jsonl")), tmp_path / "tools.jinja")
    assert '"name": "sum"' in rows[0].example.target
