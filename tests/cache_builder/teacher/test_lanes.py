"""Several batches at once give what one after another gives, bit for bit; a model that could not stand it gets one lane."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_ins import OutOfMemory, Poisoned, make_rows
from tiny_models import LAYOUTS, tiny_model, with_kinds
from transformers import LlamaConfig, LlamaForCausalLM

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.lanes import TOKENS_IN_FLIGHT, Lanes, lane_count
from kd.cache_builder.teacher.module_traces import leaves_no_trace
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import TeacherError
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import ModelRequest, load_model

V = 300
THREADS = 3
ROWS = [
    row for seed in range(3) for row in make_rows([(1, 7), (3, 20), (1, 1), (5, 5), (2, 40), (1, 20), (10, 2)], seed, V)
]
PROFILES = ("kl", "full", "sampled")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


# lanes alone


@pytest.mark.parametrize(
    ("threads_", "tokens", "expected"),
    [(1, 512, 1), (2, 512, 2), (16, 512, 16), (64, 512, 16), (16, 2048, 4), (2, 2048, 2), (8, 100_000, 1)],
)
def test_lanes_are_as_many_as_threads_and_tokens_in_flight_allow(threads_: int, tokens: int, expected: int):
    assert lane_count(threads_, tokens) == expected
    assert expected == 1 or expected * tokens <= TOKENS_IN_FLIGHT


def test_every_lane_works_at_the_same_time_with_its_own_memory_and_its_share_of_the_threads(threads):
    threads(7)
    together, seen = threading.Barrier(3, timeout=30), []

    def work(own: str) -> str:
        together.wait()  # breaks unless three are here at once
        seen.append((own, torch.get_num_threads(), threading.current_thread().name[:7]))
        return own

    with Lanes(["a", "b", "c"]) as lanes:
        results = [lanes.start(work) for _ in range(3)]
        assert {result() for result in results} == {"a", "b", "c"}
        assert torch.get_num_threads() == 2
    assert sorted(seen) == [("a", 2, "kd-lane"), ("b", 2, "kd-lane"), ("c", 2, "kd-lane")]
    assert torch.get_num_threads() == 7


def test_one_lane_is_the_caller_with_all_its_threads(threads):
    threads(THREADS)
    with Lanes(["a"]) as lanes:
        found = lanes.start(lambda own: (own, torch.get_num_threads(), threading.current_thread()))()
        assert found == ("a", THREADS, threading.current_thread())
        with pytest.raises(ZeroDivisionError):
            lanes.start(lambda own: 1 // 0)  # here and now
        assert lanes.start(lambda own: own)() == "a"


def divided(number: int, own: str) -> int:
    return 1 // number


def test_an_error_is_raised_where_the_result_is_asked_for_and_the_lane_works_on(threads):
    threads(2)
    with Lanes(["a", "b"]) as lanes:
        results = [lanes.start(partial(divided, n)) for n in (0, 0, 0, 1)]
        for result in results[:3]:
            with pytest.raises(ZeroDivisionError):
                result()
        assert results[3]() == 1


def test_leaving_waits_for_what_runs_and_drops_what_does_not(threads):
    threads(2)
    running, go_on, done = threading.Semaphore(0), threading.Event(), []

    def work(own: str) -> None:
        running.release()
        go_on.wait(30)
        done.append(own)

    def leave() -> None:
        with Lanes(["a", "b"]) as lanes:
            for _ in range(20):
                lanes.start(work)
            assert running.acquire(timeout=30)
            assert running.acquire(timeout=30)
            threading.Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert sorted(done) == ["a", "b"]
    assert torch.get_num_threads() == 2


def test_passes_that_overlap_give_back_what_the_first_one_found(threads):
    threads(8)
    one, other = Lanes(["a", "b"]), Lanes(["a", "b"])
    one.__enter__()
    assert torch.get_num_threads() == 4
    other.__enter__()
    assert torch.get_num_threads() == 2
    one.__exit__()
    assert other.start(lambda own: torch.get_num_threads())() == 2
    other.__exit__()
    assert torch.get_num_threads() == 8


def test_what_a_failed_lane_held_is_free_before_anybody_asks(threads):
    threads(2)
    held: list[weakref.ref] = []
    failed = threading.Event()

    class Large:
        pass

    def work(own: str) -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise MemoryError

    with Lanes(["a", "b"]) as lanes:
        result = lanes.start(work)
        lanes.start(lambda own: failed.set())
        assert failed.wait(30)
        for _ in range(100):
            if held and held[0]() is None:
                break
            time.sleep(0.01)
        assert held[0]() is None
        with pytest.raises(MemoryError):
            result()


# the pass


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


def test_a_build_tries_the_model_with_all_its_rows(threads, build_request, tmp_path: Path, monkeypatch):
    threads(THREADS)
    prepared = []
    monkeypatch.setattr(Teacher, "prepare", lambda self, rows: prepared.append(list(rows)))
    plan = plan_build(build_request(tmp_path / "cache"))
    for _ in build(plan):
        pass
    assert prepared[0] == plan.rows
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


class Writes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(3))
        self.inner = torch.nn.Linear(2, 2)
        setattr(self.inner.weight, "quant_state", SimpleNamespace(scale=1))  # noqa: B010
        self.config = SimpleNamespace(scale=1, rope={"layer": {"type": "x"}})
        self.count, self.cache, self.seen, self.last = 0, {"inner": {}}, [], deque()


@pytest.mark.parametrize(
    ("write", "clean"),
    [
        (lambda m: m.inner(torch.ones(1, 2)), True),
        (lambda m: setattr(m, "count", m.count + 1), False),
        (lambda m: setattr(m, "count", m.count), False),
        (lambda m: setattr(m.config, "scale", 2), False),
        (lambda m: m.config.rope["layer"].update(type="y"), False),
        (lambda m: setattr(m.inner.weight.quant_state, "scale", 2), False),
        (lambda m: m.cache["inner"].update(key=1), False),
        (lambda m: m.last.append(1), False),
        (lambda m: m.cache.update(key=1), False),
        (lambda m: m.seen.append(1), False),
        (lambda m: setattr(m, "late", 1), False),
        (lambda m: m.buffer.copy_(m.buffer), False),
        (lambda m: m.register_buffer("buffer", torch.zeros(3)), False),
        (lambda m: m.inner.weight.mul_(1.0), False),
        (lambda m: setattr(m.inner, "weight", torch.nn.Parameter(torch.zeros(2, 2))), False),
        (lambda m: m.add_module("inner", torch.nn.Linear(2, 2)), False),
        (lambda m: vars(m.inner).update(forward=len), False),
    ],
)
def test_what_a_module_was_left_with_is_seen(write: Callable, clean: bool):
    module = Writes()
    with torch.inference_mode():
        assert leaves_no_trace([module], lambda: write(module)) is clean


def test_what_cannot_be_looked_into_is_not_trusted():
    ran = []
    assert not leaves_no_trace([object()], lambda: ran.append(1))
    patched = torch.nn.Linear(2, 2)
    setattr(patched, "forward", patched.forward)  # noqa: B010, as accelerate puts its own in the place of it
    assert not leaves_no_trace([patched], lambda: ran.append(1))
    assert not ran


def test_a_hook_on_all_modules_is_not_trusted():
    module = torch.nn.Linear(2, 2)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not leaves_no_trace([module], lambda: None)
    finally:
        handle.remove()
    assert leaves_no_trace([module], lambda: None)


def test_setting_attributes_is_watched_only_meanwhile_and_only_of_these_modules():
    plain, other = torch.nn.Module.__setattr__, torch.nn.Linear(2, 2)
    assert leaves_no_trace([torch.nn.Linear(2, 2)], lambda: setattr(other, "mark", 1))
    assert other.mark == 1
    with pytest.raises(ZeroDivisionError):
        leaves_no_trace([other], lambda: 1 // 0)
    assert torch.nn.Module.__setattr__ is plain
