"""Several batches at once give what one after another gives, bit for bit; a model that could not stand it gets one lane."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import OutOfMemory, Poisoned, make_rows
from tiny_models import LAYOUTS, tiny_model, with_kinds
from transformers import LlamaConfig, LlamaForCausalLM

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import TeacherError
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest

V = 300
THREADS = 3
ROWS = [
    row for seed in range(3) for row in make_rows([(1, 7), (3, 20), (1, 1), (5, 5), (2, 40), (1, 20), (10, 2)], seed, V)
]
PROFILES = ("kl", "full", "sampled")


@pytest.fixture(scope="module")
def heads(model_dir: Path, t5_dir: Path) -> dict[str, LanguageModelHead]:
    return {
        n: split_head(load_model(ModelRequest(str(d), device="cpu")))
        for n, d in {"gpt2": model_dir, "t5": t5_dir}.items()
    }


def teacher_of(head: LanguageModelHead, profile: str = "full", **options: int) -> Teacher:
    config = TargetConfig.of_profile(profile) if profile == "sampled" else TargetConfig.of_profile(profile, top_k=8)
    boundary = torch.arange(0, V, 3) if profile == "full" else None
    return Teacher(head, Sparsifier(config, V, boundary), **{"tokens_per_batch": 64, "head_chunk": 16} | options)


def score(teacher: Teacher, rows: list = ROWS) -> dict[str, np.ndarray]:
    *_, (_, last) = collect(rows, teacher.run(rows, 0))
    return {name: value for name, value in vars(last).items() if value is not None}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("layout", ["gpt2", "t5"])
def test_the_number_of_threads_changes_no_bit_and_no_batch(heads, threads, layout: str, profile: str):
    found, batches = [], []
    for count in (1, 2, THREADS):
        threads(count)
        teacher = teacher_of(heads[layout], profile)
        found.append(score(teacher))
        batches.append([batch for batch, _ in teacher.run(ROWS, 0)])
        assert len(teacher.execution.sparsifiers) == count
        assert torch.get_num_threads() == count
        assert teacher.tokens == 2 * sum(len(r.input_ids) for r in ROWS)
    assert len(batches[0]) > THREADS
    for other in (1, 2):
        assert_equal(found[0], found[other])
        assert batches[0] == batches[other]


def test_batches_of_their_own_size_do_not_depend_on_the_threads(heads, threads):
    rows = make_rows([(1, 300)] * 7, 0, V)
    batches = []
    for count in (1, 2, THREADS):
        threads(count)
        batches.append([batch for batch, _ in teacher_of(heads["t5"], tokens_per_batch=0).run(rows, 0)])
    assert len(batches[0]) == 3  # 1,024 tokens
    assert batches[0] == batches[1] == batches[2]


def test_of_several_bad_examples_the_first_in_the_order_of_batches_is_named(heads, threads):
    rows = make_rows([(1, 30), (1, 31), (1, 32), (1, 33)], 0, V - 1)
    for row, token in zip(rows, (5, V - 1, V - 1, 5), strict=True):
        row.context_ids[:] = token
    head = heads["gpt2"]
    named = []
    for count in (1, THREADS):
        threads(count)
        poisoned = LanguageModelHead(AsModule(Poisoned(head.backbone, V - 1)), head.weight, head.bias)
        teacher = teacher_of(poisoned, tokens_per_batch=1)
        with pytest.raises(TeacherError, match="not finite") as caught:
            score(teacher, rows)
        named.append(caught.value.details["where"])
        assert len(teacher.execution.sparsifiers) == count
        assert torch.get_num_threads() == count
    assert named == ["example e2"] * 2  # the longer one: longest first


class AsModule(torch.nn.Module):
    """A stand-in for a backbone, which keeps what it counts outside itself."""

    def __init__(self, backbone: Callable) -> None:
        super().__init__()
        self.call = backbone

    def forward(self, **inputs):
        return self.call(**inputs)


class Room:
    """A backbone with room for so many tokens in all lanes together."""

    def __init__(self, backbone: Callable, tokens: int) -> None:
        self.backbone, self.tokens = backbone, tokens
        self.lock, self.used, self.failures = threading.Lock(), 0, 0

    def __call__(self, input_ids, **options):
        with self.lock:
            self.used += input_ids.numel()
            full = self.used > self.tokens
            self.failures += full
        try:
            if full:
                raise torch.OutOfMemoryError("can't allocate memory")
            time.sleep(0.02)  # so that lanes meet
            return self.backbone(input_ids=input_ids, **options)
        finally:
            with self.lock:
                self.used -= input_ids.numel()


def test_what_does_not_fit_beside_another_batch_is_scored_alone_before_any_batch_is_cut(heads, threads):
    head, found, batches = heads["gpt2"], [], []
    for count in (1, THREADS):
        threads(count)
        room = Room(head.backbone, 70)
        teacher = teacher_of(LanguageModelHead(AsModule(room), head.weight, head.bias))
        found.append(score(teacher))
        batches.append(sorted(batch for batch, _ in teacher.run(ROWS, 0)))
        assert (room.failures > 0) == (count > 1)
        assert len(teacher.execution.sparsifiers) == count
    assert batches[0] == batches[1]
    assert_equal(*found)


def test_out_of_memory_in_a_lane_halves_the_batch_and_gives_the_same_targets(heads, threads):
    head, found, batches = heads["gpt2"], [], []
    for count in (1, THREADS):
        threads(count)
        small = OutOfMemory(head.backbone, 60)
        teacher = teacher_of(LanguageModelHead(AsModule(small), head.weight, head.bias), tokens_per_batch=200)
        found.append(score(teacher))
        batches.append(sorted(i for batch, _ in teacher.run(ROWS, 0) for i in batch))
        assert small.failures > 0
        assert len(teacher.execution.sparsifiers) == count
    assert batches == [list(range(len(ROWS)))] * 2
    for name, value in found[0].items():  # those in flight were not cut
        np.testing.assert_allclose(value, found[1][name], atol=1e-4, err_msg=name)


def test_an_example_that_fits_nowhere_names_itself(heads, threads):
    threads(THREADS)
    head = heads["gpt2"]
    teacher = teacher_of(LanguageModelHead(AsModule(OutOfMemory(head.backbone, 41)), head.weight, head.bias))
    with pytest.raises(TeacherError, match="not enough memory") as caught:
        score(teacher)
    assert caught.value.details["where"] == "e4"
    assert torch.get_num_threads() == THREADS


def test_a_pass_that_is_given_up_gives_torch_its_threads_back(heads, threads):
    threads(THREADS)
    steps = teacher_of(heads["gpt2"]).run(ROWS, 0)
    next(steps)
    assert torch.get_num_threads() == 1
    steps.close()
    assert torch.get_num_threads() == THREADS
    assert not [t for t in threading.enumerate() if t.name.startswith("kd-lane")]


@pytest.mark.parametrize(("layout", "kind"), with_kinds(LAYOUTS))
def test_every_layout_gets_its_lanes_and_the_bits_of_one_thread(threads, layout: str, kind: str):
    rows, found = make_rows([(3, 9), (1, 14), (2, 4)] * 4, 0, 60), []
    for count in (1, THREADS):
        threads(count)
        head = split_head(tiny_model(layout, kind, 60, window=8).eval())
        teacher = Teacher(head, Sparsifier(TargetConfig(top_k=8), 60), tokens_per_batch=20, head_chunk=16)
        found.append(score(teacher, rows))
        assert teacher.execution.lanes(rows).count == count
    assert_equal(*found)


# models that several threads must not share


def llama(rope: dict | None) -> LanguageModelHead:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    if rope is not None:
        config.rope_parameters = {"rope_theta": 10_000.0} | rope
    torch.manual_seed(0)
    return split_head(LlamaForCausalLM(config).eval())


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("rope", "lanes"), [(None, THREADS), ({"rope_type": "linear", "factor": 2.0}, THREADS), (DYNAMIC, 1), (LONG, 1)]
)
def test_rotary_embeddings_that_grow_with_the_text_get_one_lane(threads, rope, lanes: int):
    threads(THREADS)
    teacher = teacher_of(llama(rope))
    found = score(teacher)
    assert teacher.execution.lanes(ROWS).count == lanes
    if lanes > 1:
        threads(1)
        assert_equal(found, score(teacher_of(llama(rope))))


def test_short_texts_do_not_speak_for_long_ones(threads):
    """Dynamic embeddings change beyond 16 positions, in the second shard."""
    threads(THREADS)
    teacher = teacher_of(llama(DYNAMIC))
    short = [r for r in ROWS if len(r.input_ids) < 16]
    score(teacher, short)
    assert teacher.execution.lanes(short).count == THREADS
    assert teacher.execution.lanes(ROWS).count == 1
    assert teacher.execution.lanes(short).count == 1


@pytest.mark.parametrize("longest_first", [True, False])
def test_what_grows_is_seen_although_a_shorter_text_resets_it(threads, longest_first: bool):
    """A model that has grown and was reset before: what it is reset to is an object that it has had."""
    threads(THREADS)
    head = llama(DYNAMIC)
    long, short = make_rows(
        [(30, 10), (1, 12)], 0, V
    )  # the longest has the wider context, the short one the wider target
    for row in (long, short):
        head.scored_hidden([row.context_ids], [row.target_ids])
    rows = [long, short] if longest_first else [short, long]
    assert teacher_of(head).execution.lanes(rows).count == 1


@pytest.mark.parametrize(("rope", "count"), [(LONG, 4), (None, 48)])
def test_batches_do_not_depend_on_the_threads_of_a_lane(threads, rope, count: int):
    """A model of one lane, which has all the threads; and more threads than there may be lanes."""
    rows, batches = make_rows([(1, 300)] * 9, 0, V), []
    for n in (1, count):
        threads(n)
        teacher = teacher_of(llama(rope), tokens_per_batch=0)
        batches.append([batch for batch, _ in teacher.run(rows, 0)])
    assert teacher.execution.lanes(rows).count == (1 if rope is not None else 16)
    assert batches[0] == batches[1]
    assert max(map(len, batches[0])) == 1


def test_an_example_longer_than_all_lanes_together_is_scored_like_any_other(heads, threads):
    rows, found = make_rows([(4200, 60), (1, 7), (1, 9)], 0, V), []
    for count in (1, 4):
        threads(count)
        teacher = teacher_of(heads["t5"], tokens_per_batch=0)
        assert teacher.execution.lanes(rows).count == 1
        found.append(score(teacher, rows))
    np.testing.assert_array_equal(found[0]["gold_rank"], found[1]["gold_rank"])
    np.testing.assert_allclose(found[0]["log_z"], found[1]["log_z"], atol=1e-4)  # sums of four threads


def test_what_is_tried_with_all_rows_holds_from_the_first_shard_on(threads):
    """A build that goes on at the second shard makes the batches that one from the start makes."""
    threads(THREADS)
    teacher = teacher_of(llama(DYNAMIC))
    teacher.prepare(ROWS)
    assert teacher.execution.lanes([r for r in ROWS if len(r.input_ids) < 16]).count == 1


def test_a_build_tries_the_model_with_rows_of_every_extreme_length(threads, build_request, tmp_path: Path, monkeypatch):
    """What `prepare` learns of them it would learn of all rows: longest context, target and sum, and the shortest row."""

    def extremes(rows) -> tuple[int, ...]:
        sizes = [(r.read_only, len(r.target_ids), r.read_only + len(r.target_ids)) for r in rows]
        return (*map(max, zip(*sizes, strict=True)), min(together for _, _, together in sizes))

    threads(THREADS)
    prepared = []
    monkeypatch.setattr(Teacher, "prepare", lambda self, rows: prepared.append(list(rows)))
    plan = plan_build(build_request(tmp_path / "cache"))
    for _ in build(plan):
        pass
    assert extremes(prepared[0]) == extremes(plan.rows)
    assert len(prepared[0]) <= 4 < len(plan.rows)
    assert len(plan.manifest.shards) > 1


@pytest.mark.parametrize("profile", ["kl", "uld"])
def test_a_cache_is_the_same_to_the_byte_with_any_number_of_threads(threads, build_request, tmp_path, profile: str):
    found = []
    for count in (1, 2, THREADS):
        threads(count)
        out = tmp_path / str(count)
        for _ in build(plan_build(build_request(out, profile=profile, tokens_per_batch=None))):
            pass
        found.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(found[0]) > 10
    assert found[0] == found[1] == found[2]


def test_hooks_get_one_lane(threads, model_dir: Path):
    threads(THREADS)
    head = split_head(load_model(ModelRequest(str(model_dir), device="cpu")))
    head.backbone.h[1].mlp.register_forward_hook(lambda module, inputs, output: None)
    teacher = teacher_of(head)
    assert teacher.execution.lanes(ROWS).count == 1
