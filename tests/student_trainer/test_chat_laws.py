"""Laws of a training from conversations, on tiny models: only the assistant's tokens count, and nothing else changes a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chat_templates import CHATS, examples_of
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import kd
from kd.common.settings import make
from kd.data.conversations.chat_settings import ChatSettings
from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.head import attach_loss, forward_arguments
from kd.student_trainer.losses.by_row import kl_ghost
from kd.student_trainer.prepare import prepare
from kd.student_trainer.run_folder import read_steps
from kd.student_trainer.training import train

LINES = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""A template for the tiny tokenizer, whose only control token is the beginning and the end of a text."""
TALKS = [
    *CHATS,
    [("user", "One?"), ("assistant", "Two.")],
    [("user", "Why?"), ("assistant", "Because."), ("user", "Why?"), ("assistant", "Because I say so.")],
    [
        ("system", "Be long."),
        ("user", "Go on."),
        ("assistant", "The fox met the keeper at the bridge, and told a story."),
    ],
]
ASSISTANT = [said for talk in TALKS for role, said in talk if role == "assistant"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "plain.jinja"
    file.write_text(LINES)
    return file


@pytest.fixture(scope="module")
def teacher_dir(make_student) -> Path:
    return make_student(seed=7, positions=512)


@pytest.fixture(scope="module")
def build_chats(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, teacher_dir: Path, template: Path):
    """`build_chats(talks)`: a cache of these conversations with all that the losses need."""

    def make(talks: list[list[tuple[str, str]]]) -> Path:
        folder = tmp_path_factory.mktemp("chats")
        rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
        (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept = {"profile": "full", "top_k": 400, "tail_bands": 1, "samples": 4, "logprob_codec": "float32"}
        request = build_request(folder / "cache", model=teacher_dir, text=folder / "chat.jsonl", seq_len=512, **kept)
        run_build(replace(request, layout=None, chat=ChatSettings(chat_template=str(template))))
        return folder / "cache"

    return make


@pytest.fixture(scope="module")
def chats(build_chats) -> Path:
    return build_chats(TALKS)


@pytest.fixture(scope="module")
def pupil(make_student) -> Path:
    return make_student(seed=3, positions=512)


def test_a_student_that_is_the_teacher_is_right_on_every_token_of_the_assistant_and_judged_on_no_other(
    chats: Path, teacher_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    tokenizer = load_tokenizer(str(teacher_dir))
    dataset = kd.CacheDataset(chats, model, tokenizer, loss="kl", batch_size=len(TALKS))
    batch = dataset[0]
    logits = model(**dataset.inputs(batch)).logits.detach()
    rows = logits.reshape(-1, logits.shape[-1])
    losses = kl_ghost(rows[batch["positions"]], loss_targets(batch))
    assert losses.abs().max() < 1e-5  # each of them: the normalisers are stored in float16
    expected = sum(len(tokenizer(f"{said}<|endoftext|>").input_ids) for said in ASSISTANT)
    assert len(losses) == expected, "one row for each token of an answer, and one for its end"
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    noise[batch["positions"]] = 0
    elsewhere = dataset.loss((rows + 100 * noise).reshape(logits.shape), batch)
    assert float(elsewhere.kd) == float(dataset.loss(logits, batch).kd), "what is said to the assistant is not judged"


@pytest.mark.parametrize("loss", ["kl", "uld", "ce"])
def test_a_conversation_of_one_turn_trains_as_the_pair_of_its_rendering(
    loss: str, run, build_chats, build_request, run_build, teacher_dir: Path, pupil: Path, tmp_path: Path
) -> None:
    """To the last bit of every weight."""
    talks = [[("user", "Who lived there?"), ("assistant", "A fox.")], [("user", "Why?"), ("assistant", "It was cold.")]]
    pairs = [{"prompt": f"[user]\n{asked[1]}\n[assistant]\n", "target": answer[1]} for asked, answer in talks]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    kept = {"profile": "full", "top_k": 400, "tail_bands": 1, "samples": 4, "logprob_codec": "float32"}
    request = build_request(
        tmp_path / "of-pairs", model=teacher_dir, text=tmp_path / "pairs.jsonl", seq_len=512, **kept
    )
    run_build(replace(request, layout=None, blocks=replace(request.blocks, separator="")))
    settings = {"student": str(pupil), "loss": loss, "max_steps": 2, "batch_size": 2}
    of_chats = run("chats", cache=str(build_chats(talks)), **settings)
    of_pairs = run("pairs", cache=str(tmp_path / "of-pairs"), **settings, **({} if loss == "kl" else {"separator": ""}))
    assert [(r.loss, r.kd, r.ce, r.tokens) for r in of_chats.records] == [
        (r.loss, r.kd, r.ce, r.tokens) for r in of_pairs.records
    ]
    assert all(torch.equal(of_chats.weights[name], of_pairs.weights[name]) for name in of_pairs.weights)


def test_the_order_of_conversations_changes_no_row(chats: Path, build_chats) -> None:
    """The teacher reads them in batches by length, whose padding moves the last bits of float32."""
    other = {e.target: e for e in examples_of(kd.open_cache(build_chats(TALKS[::-1])))}
    for example in examples_of(kd.open_cache(chats)):
        twin = other[example.target]
        assert twin.input_ids.tolist() == example.input_ids.tolist()
        assert twin.gaps == example.gaps
        assert (twin.targets.token_ids[:, 0] == example.targets.token_ids[:, 0]).all()
        assert abs(twin.targets.gold_logprob - example.targets.gold_logprob).max() < 1e-3  # float16


@pytest.mark.parametrize("loss", ["kl", "uld"])
def test_order_accumulation_and_packing_change_no_step(loss: str, run, chats: Path, pupil: Path) -> None:
    """All conversations in one step: in another order, one by one, packed."""
    settings = {"cache": str(chats), "student": str(pupil), "loss": loss, "max_steps": 2}
    whole = run("whole", batch_size=len(TALKS), **settings)
    others = {
        "order": run("order", batch_size=len(TALKS), seed=5, **settings),
        "one by one": run("single", batch_size=1, accumulate=len(TALKS), **settings),
        "packed": run("packed", batch_size=len(TALKS), packing=True, **settings),
    }
    for name, other in others.items():
        for a, b in zip(whole.records, other.records, strict=True):
            assert a.tokens == b.tokens, name
            # the same numbers, summed in another order in float32
            assert (b.loss, b.ce, b.grad_norm) == pytest.approx((a.loss, a.ce, a.grad_norm), rel=1e-4), name
    assert others["packed"].result.padding_share < whole.result.padding_share


@pytest.mark.parametrize(
    "more", [{"lora": 2}, {"gradient_checkpointing": True}, {"prompt_loss": True, "loss": "ce"}], ids=str
)
def test_conversations_go_with_the_other_settings(more: dict[str, Any], run, chats: Path, pupil: Path) -> None:
    settings = {
        "cache": str(chats),
        "student": str(pupil),
        "max_steps": 4,
        "batch_size": len(TALKS),
        "lr": 1e-2,
        **more,
    }
    plain, packed = run("plain", **settings), run("packed", packing=True, **settings)
    assert [r.loss for r in packed.records] == pytest.approx([r.loss for r in plain.records], rel=1e-4)
    assert plain.records[-1].loss < plain.records[0].loss
    assert load_tokenizer(str(plain.out)).chat_template == LINES
    if "prompt_loss" in more:  # every token but the first of each conversation, in each step
        tokens = sum(len(example.input_ids) - 1 for example in examples_of(kd.open_cache(chats)))
        assert plain.records[-1].tokens == 4 * tokens


def test_two_processes_learn_what_one_does(run, chats: Path, pupil: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "cache": str(chats),
        "student": str(pupil),
        "loss": "uld",
        "max_steps": 2,
        "batch_size": 3,
        "lr": 1e-3,
    }
    run_ranks(lambda: train(**settings, out=str(tmp_path / "two"), device="cpu", log_every=1))
    one = run("one", cache=str(chats), student=str(pupil), loss="uld", batch_size=3, accumulate=2, max_steps=2)
    for a, b in zip(one.records, read_steps(tmp_path / "two"), strict=True):
        assert (a.loss, a.ce, a.grad_norm) == pytest.approx((b.loss, b.ce, b.grad_norm), rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "uld"])
def test_a_student_in_parts_learns_from_conversations_what_a_whole_one_does(
    loss: str, chats: Path, pupil: Path, tmp_path: Path
) -> None:
    """FSDP2 on two processes, each with other conversations: gradients are the mean of those of the whole model."""
    config = make(TrainConfig, {"cache": str(chats), "student": str(pupil), "out": str(tmp_path / "out"), "loss": loss})
    prepared = prepare(config)
    batches = []
    for part in ([0, 1, 2], [3, 4, 5]):
        batch = prepared.collator(prepared.reader.read(part))
        batches.append({name: value for name, value in batch.items() if name not in ("units", "aligned_bytes")})

    def student() -> Any:
        model = AutoModelForCausalLM.from_pretrained(pupil)
        attach_loss(model, prepared.objective, prepared.vocabulary_size, chunk=7)
        return model

    def in_parts() -> None:
        dist.init_process_group("gloo")
        model, mesh = student(), init_device_mesh("cpu", (2,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**forward_arguments(batches[dist.get_rank()]))["loss"].backward()
        whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        if dist.get_rank() == 0:
            save_file(whole, tmp_path / "gradients.safetensors")

    run_ranks(in_parts)
    alone = student()
    for batch in batches:
        alone(**forward_arguments(batch))["loss"].backward()
    found = load_file(tmp_path / "gradients.safetensors")
    largest = max(float(p.grad.abs().max()) for p in alone.parameters())
    assert found.keys() == dict(alone.named_parameters()).keys()
    for name, parameter in alone.named_parameters():  # the same products, and a sum of two halves in another order
        assert (found[name] - parameter.grad / 2).abs().max() < 1e-6 * largest, name
