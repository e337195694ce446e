"""Conversations that the teacher answers: asked through its template, kept as turns, the same after any interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import CHATS, PLAIN, examples_of

import kd
from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of, plan_of, request_of
from kd.cache_builder.build.generate import generate
from kd.common.errors import CacheMismatchError, DataError
from kd.common.settings import make
from kd.data.conversations.conversation import conversation_from_json

ROWS = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]


@pytest.fixture
def chats(tmp_path: Path):
    """Settings of a build over conversations; further ones over the defaults."""
    (tmp_path / "plain.jinja").write_text(PLAIN)

    def settings(rows: list[Any] = ROWS, out: str = "cache", **more: Any) -> BuildSettings:
        path = tmp_path / "chat.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        how = {"chat_template": str(tmp_path / "plain.jinja"), "target_source": "teacher", "target_len": 9}
        return make(
            BuildSettings, {"teacher": "demo", "spec": str(path), "out": tmp_path / out, "seq_len": 160} | how | more
        )

    return settings


def talks(cache: Path) -> list[tuple[str, list[dict[str, Any]], Any]]:
    """Id, messages and example of every row of a cache."""
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.store.shard_store import read_example_table

    manifest = load_manifest(cache)
    rows = [
        (name, json.loads(text)["messages"])
        for number in range(len(manifest.shards))
        for name, text in zip(
            *(
                read_example_table(open_files(cache), manifest, number, ["id", "conversation"])[c]
                for c in ("id", "conversation")
            ),
            strict=True,
        )
    ]
    return [
        (name, talk, example) for (name, talk), example in zip(rows, examples_of(kd.open_cache(cache)), strict=True)
    ]


def greedy(model: Any, tokenizer: Any, messages: list[dict[str, Any]], most: int) -> tuple[str, bool]:
    """What a plain loop over the whole text answers: the slow twin."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    written: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1, : len(tokenizer)].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(written[:-1]), True
    return tokenizer.decode(written), False


def test_the_last_turn_is_the_teachers_own_and_alone_is_scored(chats) -> None:
    settings = chats()
    build_of(settings)
    model, tokenizer = kd.load_teacher("demo")
    tokenizer.chat_template = PLAIN
    stored = talks(settings.out)
    assert [name for name, _, _ in stored] == ["chat.jsonl:0", "chat.jsonl:1", "chat.jsonl:2"]
    for (_, messages, example), asked in zip(stored, ROWS, strict=True):
        text, ended = greedy(model, tokenizer, asked[:-1], 8)
        *earlier, last = messages
        assert [{k: m[k] for k in ("role", "content")} for m in earlier] == asked[:-1]
        content = text.removeprefix(" ")  # which this template writes itself
        assert (last["role"], last["content"], last.get("complete", True)) == ("assistant", content, ended)
        end = tokenizer.eos_token if ended else ""
        scored = tokenizer.decode(example.targets.gold_ids)
        assert scored == f" {content}{end}"  # and no end token after an answer that was cut short
        before = tokenizer.apply_chat_template(asked[:-1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(example.context_ids) == before
    assert kd.open_cache(settings.out).manifest.identity["chat"]["score"] == "last"


def test_an_interrupted_build_has_the_same_answers_and_bytes(chats, tree, monkeypatch) -> None:
    import kd.cache_builder.build.generate as module

    monkeypatch.setattr(module, "BLOCK", 2)
    how = {"sample_temperature": 1.0, "answers_per_prompt": 2}
    whole, broken = chats(out="whole", **how), chats(out="broken", **how)
    build_of(whole)
    steps = generate(request_of(broken))
    next(steps)
    steps.close()
    build_of(broken)
    assert tree(whole.out) == tree(broken.out)


def test_several_answers_have_ids_of_their_own_and_follow_the_seed(chats) -> None:
    how = {"sample_temperature": 1.0, "answers_per_prompt": 3}
    build_of(chats(out="one", **how))
    build_of(chats(out="other", **how, seed=1))
    one, other = (talks(chats(out=out).out) for out in ("one", "other"))
    assert [name for name, _, _ in one] == [f"chat.jsonl:{row}~{n}" for row in range(3) for n in range(3)]
    answers = [talk[-1]["content"] for _, talk, _ in one]
    assert len(set(answers)) > 6
    assert answers != [talk[-1]["content"] for _, talk, _ in other]
    assert kd.open_cache(chats(out="one").out).manifest.identity["corpus"]["targets"]["answers"] == 3


def test_answers_by_a_longer_list_of_settings_do_not_change_older_fingerprints(chats) -> None:
    """What caches of pairs record of their answers is what they recorded before there were several answers."""
    generation = request_of(chats()).generation
    assert generation.identity() == {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    stripped = request_of(chats(reasoning="strip")).generation
    assert stripped.identity() == {"max_new_tokens": 8, "temperature": 0.0, "seed": 0, "reasoning": "strip"}


def test_settings_that_do_not_go_together_are_refused(chats) -> None:
    with pytest.raises(DataError, match="would be the same"):
        chats(answers_per_prompt=2)
    with pytest.raises(DataError, match="writes no answers"):
        chats(target_source="data", reasoning="strip")
    with pytest.raises(DataError, match="longer than the limit"):
        plan_of(chats(seq_len=40))
    assert plan_of(chats(seq_len=64, overlong="drop")).left_out.count("too_long") == 2
    with pytest.raises(DataError, match="nothing to answer"):
        plan_of(chats([[{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes."}]]))


def test_answers_to_another_template_are_not_continued(chats, tmp_path: Path) -> None:
    build_of(chats())
    (tmp_path / "other.jinja").write_text(PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"))
    with pytest.raises(CacheMismatchError, match="answers to something else"):
        build_of(chats(chat_template=str(tmp_path / "other.jinja")))


def test_a_student_with_its_own_template_is_not_taught_to_stop_where_an_answer_was_cut(chats, tmp_path: Path) -> None:
    from kd.models.chat.chat_template import ChatTemplate
    from kd.student_trainer.batches.student_chat import StudentChat

    settings = chats(profile="uld")
    build_of(settings)
    _, tokenizer = kd.load_teacher("demo")
    reader = kd.open_cache(settings.out)
    other = ChatTemplate(
        tokenizer, PLAIN.replace("[{{ m.role }}]", "<{{ m.role }}>").replace("[assistant]", "<assistant>")
    )
    chat = StudentChat(reader, tokenizer, window=None, template=other)
    for number, (_, messages, example) in enumerate(talks(settings.out)):
        ends = tokenizer.eos_token_id in chat[number].target_ids.tolist()
        assert ends == messages[-1].get("complete", True)
        assert np.array_equal(chat[number].target_ids, example.targets.gold_ids)


def test_a_stored_conversation_keeps_what_was_cut_short() -> None:
    text = '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","complete":false}]}'
    talk = conversation_from_json("x", text)
    assert not talk.messages[1].complete
    assert "complete" not in talk.for_template()[1]
    assert talk.to_json() == text


def test_prompts_without_answers_are_answered_as_those_with(chats, tmp_path: Path) -> None:
    """From a file and from memory: the same answers as where the data has an answer that is replaced."""
    asked = [row[:-1] for row in ROWS]
    build_of(chats())
    build_of(chats(asked, "prompts"))
    expected = [talk for _, talk, _ in talks(tmp_path / "cache")]
    assert [talk for _, talk, _ in talks(tmp_path / "prompts")] == expected
    model, tokenizer = kd.load_teacher("demo")
    options: dict[str, Any] = {
        "target_source": "teacher",
        "target_len": 9,
        "seq_len": 160,
        "chat_template": str(tmp_path / "plain.jinja"),
    }
    kd.build_cache(model, tokenizer, [{"messages": row} for row in asked], out=tmp_path / "memory", **options)
    assert [talk for _, talk, _ in talks(tmp_path / "memory")] == expected
    with pytest.raises(DataError, match="no turn of the assistant"):
        build_of(chats(asked[-1:], "none", target_source="data"))


def test_conversations_that_cannot_be_asked_are_skipped_and_counted(chats, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN
    rows = [*ROWS, [{"role": "tool", "content": "x"}], [{"role": "system", "content": "Be brief."}]]
    settings = chats(rows, bad_rows="skip")
    (tmp_path / "plain.jinja").write_text(refusing)
    build_of(settings)
    cache = kd.open_cache(tmp_path / "cache")
    assert len(cache) == len(ROWS)
    assert cache.manifest.provenance["left_out"]["bad_rows"] == {
        "count": 2,
        "first": f"chat.jsonl:{len(ROWS)}, the chat template refuses the conversation",
    }
    with pytest.raises(DataError, match=f"conversation chat.jsonl:{len(ROWS)}"):
        build_of(
            make(
                BuildSettings,
                {
                    "teacher": "demo",
                    "spec": str(tmp_path / "chat.jsonl"),
                    "out": tmp_path / "other",
                    "target_source": "teacher",
                    "target_len": 9,
                    "seq_len": 160,
                    "chat_template": str(tmp_path / "plain.jinja"),
                },
            )
        )
