"""Students of cached conversations: laws of the loss, and turns aligned between tokenizers and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import CHATML, CHATS, LLAMA3, PLAIN, REASONING, Layout, examples_of

import kd
from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import DataError
from kd.common.settings import make
from kd.data.demo.mini_chat import mini_conversations
from kd.models.chat.chat_template import ChatTemplate
from kd.models.tokenizer import load_tokenizer, token_bytes
from kd.student_trainer.batches.alignment import Side
from kd.student_trainer.batches.student_chat import StudentChat, common_sides


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "plain.jinja"
    file.write_text(PLAIN)
    return file


@pytest.fixture(scope="module")
def chat_cache(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    """The embedded teacher's distributions over three conversations."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"teacher": "demo", "spec": str(folder / "chat.jsonl"), "out": folder / "cache"}
    settings |= {"chat_template": str(template), "profile": "full", "logprob_codec": "float32", "reuse": False}
    build_of(make(BuildSettings, settings))
    return folder / "cache"


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return kd.load_teacher("demo")


def student_tokenizer(shared: Path, layout: Layout) -> Any:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(layout.control)})
    named = {"bos_token": layout.bos, "eos_token": layout.eos}
    tokenizer.add_special_tokens({name: token for name, token in named.items() if token is not None})
    tokenizer.chat_template = layout.source
    return tokenizer


def small_student(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2)
        ).eval()


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
def test_a_student_that_is_the_teacher_has_no_divergence(loss: str, chat_cache: Path, teacher) -> None:
    model, tokenizer = teacher
    dataset = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3)
    batch = dataset[0]
    parts = dataset.loss(model(**dataset.inputs(batch)), batch)
    assert abs(float(parts.kd)) < 1e-5  # the tail is stored in float16


def test_only_tokens_of_the_assistant_are_scored_and_others_have_no_gradient(chat_cache: Path, teacher) -> None:
    model, tokenizer = teacher
    pieces = token_bytes(tokenizer)
    for loss in ("kl", "ce", "uld"):
        dataset = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3)
        batch = dataset[0]
        inputs = dataset.inputs(batch)
        output = model(**inputs)
        output.logits.retain_grad()
        logits = output.logits
        dataset.loss(output, batch).loss.backward()
        width = inputs["input_ids"].shape[1]
        scored = np.zeros(inputs["input_ids"].numel(), dtype=bool)
        scored[batch["positions"]] = True
        moved = (logits.grad.abs().sum(-1) > 0).numpy().reshape(-1)
        assert not (moved & ~scored).any()
        predicted = batch["positions"] + 1
        assert inputs["input_ids"].reshape(-1)[predicted].tolist() == batch["gold_ids"].tolist()
        text = b"".join(pieces[i] for i in batch["gold_ids"].tolist()).decode()
        answers = [f" {said}<|endoftext|>" for chat in CHATS for role, said in chat if role == "assistant"]
        assert sorted(text.replace("<|endoftext|>", "<|endoftext|>\n").splitlines()) == sorted(answers)
        assert int(inputs["input_ids"].shape[0]) * width > len(predicted)
        model.zero_grad()


@pytest.mark.parametrize("loss", ["uld", "alm", "hybrid"])
def test_the_teachers_own_template_gives_the_cached_tokens(
    loss: str, chat_cache: Path, template: Path, teacher
) -> None:
    model, tokenizer = teacher
    cached = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3)
    rendered = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3, chat_template=str(template))
    one, other = cached[0], rendered[0]
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    parts = cached.loss(model(**cached.inputs(one)), one)
    assert abs(float(parts.kd)) < 5e-3  # probabilities beyond the top k are compared as the mass of rank bands
    cache = kd.open_cache(chat_cache)
    chat = StudentChat(cache, tokenizer, window=None, template=None)
    for example, talk in zip(examples_of(cache), CHATS, strict=True):
        spaces = sum(role == "assistant" for role, _ in talk)
        aligned = chat.aligned(example, mode="bytes", eos=True).bytes_aligned
        assert len(example.target.encode()) - aligned == spaces, "the space before each answer counts as no text"


def groups_by_hand(chat: StudentChat, cache: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """The texts of both sides of every group, spelled from the tokens."""
    teacher, student = (token_bytes(load_tokenizer("demo")), token_bytes(tokenizer))
    spelled = []
    for example in examples_of(cache):
        pairs = chat.aligned(example, mode="bytes", eos=True)
        for (a, b), (c, d) in zip(pairs.teacher, pairs.student, strict=True):
            left = b"".join(teacher[i] for i in example.targets.gold_ids[a:b])
            right = b"".join(student[i] for i in chat[example.index].target_ids[c:d])
            spelled.append((left.decode(), right.decode()))
    return spelled


@pytest.mark.parametrize("layout", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_groups_of_another_tokenizer_and_template_spell_the_same_text(layout: Layout, shared, chat_cache: Path) -> None:
    tokenizer = student_tokenizer(shared, layout)
    cache = kd.open_cache(chat_cache)
    chat = StudentChat(cache, tokenizer, window=None, template=ChatTemplate.of(tokenizer))
    assert (chat.unmatched, chat.truncated) == (0, 0)
    groups = groups_by_hand(chat, cache, tokenizer)
    ends = [(left, right) for left, right in groups if left == "<|endoftext|>"]
    answers = [said for talk in CHATS for role, said in talk if role == "assistant"]
    assert ends == [("<|endoftext|>", layout.control[-1])] * len(answers)
    texts = [(left, right) for left, right in groups if left != "<|endoftext|>"]
    assert all(left.strip() == right.strip() for left, right in texts)
    assert "".join(right for _, right in texts) == "".join(answers)


def test_reasoning_that_only_the_student_writes_is_not_compared(shared, chat_cache: Path) -> None:
    tokenizer = student_tokenizer(shared, REASONING)
    cache = kd.open_cache(chat_cache)
    chat = StudentChat(cache, tokenizer, window=None, template=ChatTemplate.of(tokenizer))
    groups = groups_by_hand(chat, cache, tokenizer)
    assert not any("<" in right.replace("<|im_end|>", "") for _, right in groups), "no <think>"
    assert ("<|endoftext|>", "<|im_end|>") in groups
    # earlier turns stand in another rendering, without the reasoning that a model writes
    assert chat.unmatched == sum(sum(role == "assistant" for role, _ in talk) - 1 for talk in CHATS)


def test_a_window_cuts_whole_turns(shared, chat_cache: Path) -> None:
    tokenizer = student_tokenizer(shared, CHATML)
    cache = kd.open_cache(chat_cache)
    template = ChatTemplate.of(tokenizer)
    whole = StudentChat(cache, tokenizer, window=None, template=template)
    longest = max(len(whole[i].input_ids) for i in range(len(cache)))
    cut = StudentChat(cache, tokenizer, window=longest - 1, template=template)
    assert cut.truncated == 1
    assert len(groups_by_hand(cut, cache, tokenizer)) < len(groups_by_hand(whole, cache, tokenizer))
    tiny = StudentChat(cache, tokenizer, window=3, template=template)
    assert tiny.truncated == len(cache)
    assert groups_by_hand(tiny, cache, tokenizer) == []
    assert tiny.lengths()[1].tolist() == [0] * len(cache)


def test_losses_of_another_template_train(shared, chat_cache: Path) -> None:
    tokenizer = student_tokenizer(shared, CHATML)
    model = small_student(tokenizer)
    for loss in ("uld", "alm", "hybrid", "ce"):
        plain = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3)
        prompts = kd.CacheDataset(chat_cache, model, tokenizer, loss=loss, batch_size=3, prompt_loss=True)
        batch, more = plain[0], prompts[0]
        parts = plain.loss(model(**plain.inputs(batch)), batch)
        assert parts.loss.requires_grad
        assert torch.isfinite(parts.loss)
        if loss != "ce":  # the same groups, found among more scored tokens
            with_prompts = prompts.loss(model(**prompts.inputs(more)), more)
            assert float(with_prompts.kd) == pytest.approx(float(parts.kd), rel=1e-5)
        assert len(more["gold_ids"]) == int(prompts.inputs(more)["attention_mask"].sum()) - 3


def test_a_call_that_the_students_template_does_not_write_is_no_empty_answer(shared, tmp_path: Path) -> None:
    """ChatML without tools renders such a turn as its end token alone, which is neither compared nor learned."""
    settings = {"teacher": "demo", "spec": "mini-chat", "limit": 2, "chat_template": "plain", "profile": "uld"}
    build_of(make(BuildSettings, {**settings, "out": tmp_path / "cache"}))
    reader, tokenizer = kd.open_cache(tmp_path / "cache"), student_tokenizer(shared, CHATML)
    chat = StudentChat(reader, tokenizer, window=None, template=ChatTemplate.of(tokenizer))
    assert (chat.turns, chat.unmatched) == (8, 2)
    for number, talk in enumerate(mini_conversations("train", 2)):
        said = [message.content for message in talk.messages if message.role == "assistant" and message.content]
        assert tokenizer.decode(chat[number].target_ids) == "".join(f"{text}<|im_end|>" for text in said)


def test_a_student_without_a_template_is_refused(shared, chat_cache: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "smollm2"))
    with pytest.raises(DataError, match="no chat template"):
        kd.CacheDataset(chat_cache, small_student(tokenizer), tokenizer, loss="uld")


def test_texts_without_a_common_part_have_no_sides() -> None:
    side = Side(np.array([3, 5]))
    assert common_sides(b"Four.", side, b"Five.", side) is None
    one, other = common_sides(b" Four.", Side(np.array([5, 6])), b"Well, Four.", Side(np.array([5, 10, 11])))  # type: ignore[misc]
    assert (one.byte_end.tolist(), one.start) == ([4, 5], 0)
    assert (other.byte_end.tolist(), other.start) == ([-1, 4, 5], -6)


def test_an_answer_is_aligned_with_the_answer_and_not_with_the_reasoning() -> None:
    text = b"<think>Yes or no: Yes.</think> Yes"
    sides = common_sides(text, Side(np.array([7, 10, 22, 30, 34])), b"Yes", Side(np.array([3])))
    assert sides is not None
    assert sides[0].byte_end.tolist() == [-24, -21, -9, -1, 3]


def test_what_conversations_do_not_have_is_refused(shared, chat_cache: Path, template: Path, teacher, tmp_path) -> None:
    model, tokenizer = teacher
    with pytest.raises(DataError, match="aligned by bytes"):
        kd.CacheDataset(chat_cache, model, tokenizer, loss="uld", alignment="positional")
    t5, words = kd.load_teacher("demo-t5")
    with pytest.raises(DataError, match="a cache of conversations"):
        kd.CacheDataset(chat_cache, t5, words, loss="ce")
    settings = {"teacher": "demo", "spec": str(chat_cache.parent / "chat.jsonl"), "chat_template": str(template)}
    for score in ("all", "last"):
        out = {"out": tmp_path / score, "score": score, "profile": "full", "logprob_codec": "float32"}
        build_of(make(BuildSettings, settings | out))
    with pytest.raises(DataError, match="every token of this cache"):
        kd.CacheDataset(tmp_path / "all", model, tokenizer, loss="uld", chat_template=str(template))
    with pytest.raises(kd.CacheMismatchError, match=r"chat\.score"):
        kd.open_cache(f"{chat_cache}=0.5,{tmp_path / 'last'}=0.5")


LOUD = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{{ eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_cross_entropy_learns_a_template_that_shares_no_turn_with_the_teachers(
    chat_cache: Path, tmp_path: Path
) -> None:
    """It compares nothing, so there is nothing to refuse; losses that compare refuse it. What is not learned is said."""
    loud = tmp_path / "loud.jinja"
    loud.write_text(LOUD)
    options: dict[str, Any] = {"cache": str(chat_cache), "student": "demo", "max_steps": 1, "chat_template": str(loud)}
    with pytest.raises(DataError, match="no turn of the student's template has the text"):
        kd.train(**options, loss="uld", out=str(tmp_path / "uld"))
    result = kd.train(**options, loss="ce", out=str(tmp_path / "ce"))
    turns = sum(role == "assistant" for talk in CHATS for role, _ in talk)
    assert (result.turns, result.turns_not_learned) == (turns, 0)
    assert load_tokenizer(str(tmp_path / "ce")).chat_template == LOUD
    chat = StudentChat(kd.open_cache(chat_cache), load_tokenizer(str(tmp_path / "ce")), window=None, template=None)
    assert chat.turns == turns


def test_turns_that_a_student_does_not_learn_are_counted(shared, chat_cache: Path) -> None:
    tokenizer = student_tokenizer(shared, REASONING)
    chat = StudentChat(kd.open_cache(chat_cache), tokenizer, window=None, template=ChatTemplate.of(tokenizer))
    rewritten = sum(sum(role == "assistant" for role, _ in talk) - 1 for talk in CHATS)
    assert (chat.turns, chat.unshown, chat.unmatched) == (rewritten + len(CHATS), rewritten, rewritten)


def test_turns_that_follow_each_other_at_once_stay_two(tmp_path: Path, teacher) -> None:
    """A template without headers: the first turn's end token is the last token before the second turn."""
    model, tokenizer = teacher
    template, data = tmp_path / "bare.jinja", tmp_path / "chat.jsonl"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    talk = [
        ("user", "Who?"),
        ("assistant", "A fox."),
        ("assistant", "And a hen."),
        ("user", "?"),
        ("assistant", "Yes."),
    ]
    data.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}) + "\n")
    settings = {"teacher": "demo", "spec": str(data), "out": tmp_path / "c", "chat_template": str(template)}
    build_of(make(BuildSettings, settings | {"profile": "full", "logprob_codec": "float32", "reuse": False}))
    *_, last = verify(tmp_path / "c")
    assert not last.result
    cache = kd.open_cache(tmp_path / "c")
    table = cache.shard(0).examples
    assert (table["messages"][0], table["ended"][0]) == ([1, 2, 4], [True] * 3)
    example = cache[0]
    assert example.gaps.lengths.tolist() == [0, len(tokenizer("?<|endoftext|>").input_ids)]
    assert example.input_ids.tolist() == tokenizer("".join(f"{said}<|endoftext|>" for _, said in talk)).input_ids
    ends = [
        (left, right)
        for left, right in groups_by_hand(StudentChat(cache, tokenizer, window=None, template=None), cache, tokenizer)
    ]
    assert [left for left, right in ends if right == "<|endoftext|>"] == ["<|endoftext|>"] * 3
    for loss in ("kl", "uld"):
        dataset = kd.CacheDataset(tmp_path / "c", model, tokenizer, loss=loss, batch_size=1)
        parts = dataset.loss(model(**dataset.inputs(dataset[0])), dataset[0])
        assert abs(float(parts.kd)) < (1e-5 if loss == "kl" else 5e-3)  # as in the laws above
