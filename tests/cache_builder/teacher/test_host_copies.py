"""What is on its way from a GPU is read when it is there: a stand-in for torch.cuda copies nothing before it must."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher import host_copies
from kd.cache_builder.teacher.host_copies import HostCopies, Laps
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.common.errors import TeacherError
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.top_k import top_k_by_topk

V = 400
CONFIG = TargetConfig(profile="full", top_k=8, samples=5, tail_bands=4)
GPU = torch.device("cuda")


class Gpu:
    """What `host_copies` asks of torch.cuda, all of it late: copies are made when an event behind them is waited for.

    `log` holds what happened in order; reading too early gives garbage, a source given back too early fails.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.queue: list[Callable[[], None]] = []
        self.seconds = 0.0

    def current_stream(self, device):
        return "compute"

    @contextmanager
    def stream(self, stream):
        yield

    def make_stream(self, device):
        gpu = self

        class Stream:
            def wait_stream(self, other):
                gpu.log.append(f"wait for {other}")

        return Stream()

    def make_event(self, enable_timing=False):
        gpu = self

        class Event:
            def record(self, stream):
                gpu.seconds += 1.0
                self.place, self.seconds = len(gpu.queue), gpu.seconds

            def synchronize(self):
                gpu.log.append("read")
                todo, gpu.queue[: self.place] = gpu.queue[: self.place], [lambda: None] * self.place
                for job in todo:
                    job()

            def elapsed_time(self, later):
                return 1000 * (later.seconds - self.seconds)

        return Event()

    def pinned_like(self, tensor):
        late = torch.full(tensor.shape, 77, dtype=tensor.dtype).as_subclass(Late)
        late.gpu = self
        return late


class Late(torch.Tensor):
    """Memory of the host that a copy reaches later."""

    gpu: Gpu

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:  # type: ignore[override]
        assert non_blocking, "waits"
        self.gpu.log.append("copy")
        here = weakref.ref(source)

        def job() -> None:
            source = here()
            assert source is not None, "given back before it was copied"
            with torch.inference_mode():  # as it was when the copy was asked for
                torch.Tensor.copy_(self, source)

        self.gpu.queue.append(job)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    for name, value in (
        ("current_stream", gpu.current_stream),
        ("stream", gpu.stream),
        ("Stream", gpu.make_stream),
        ("Event", gpu.make_event),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(host_copies, "pinned_like", gpu.pinned_like)
    return gpu


def test_on_a_cpu_tensors_are_passed_through():
    copies, tensor = HostCopies(torch.device("cpu")), torch.arange(3)
    arrived = copies.start({"a": tensor, "b": None}).wait()
    assert arrived["a"] is tensor
    assert set(arrived) == {"a"}
    assert copies.ahead == 0


def test_a_copy_follows_what_computes_it_and_is_read_after_its_event(gpu: Gpu):
    copies = HostCopies(GPU)
    first = copies.start({"a": torch.arange(3), "b": None, "c": torch.ones(2, 2).T})
    second = copies.start({"a": torch.arange(5)})
    assert gpu.log == ["wait for compute", "copy", "copy", "wait for compute", "copy"]
    assert first._copies["a"].tolist() == [77] * 3  # not there yet
    assert {k: v.tolist() for k, v in first.wait().items()} == {"a": [0, 1, 2], "c": [[1, 1], [1, 1]]}
    assert second._copies["a"].tolist() == [77] * 5
    assert second.wait()["a"].tolist() == [0, 1, 2, 3, 4]
    assert copies.ahead == 1


def test_sources_are_held_until_they_are_copied_and_no_longer(gpu: Gpu):
    source = torch.arange(4)
    alive = weakref.ref(source)
    arrival = HostCopies(GPU).start({"a": source})
    del source
    assert arrival.wait()["a"].tolist() == [0, 1, 2, 3]
    gpu.queue.clear()
    assert alive() is None


def test_laps_are_the_clock_s_on_a_cpu_and_the_events_on_a_gpu(gpu: Gpu):
    laps = Laps(GPU)
    for part in ("forward", "head", "head"):
        laps.mark(part)
    assert list(laps.seconds()) == [("forward", 1.0), ("head", 1.0), ("head", 1.0)]
    laps = Laps(torch.device("cpu"))
    laps.mark("forward")
    [(part, seconds)] = laps.seconds()
    assert part == "forward"
    assert 0 <= seconds < 1


# the teacher pass


@pytest.fixture(scope="module")
def head(model_dir) -> LanguageModelHead:
    return split_head(load_model(ModelRequest(str(model_dir), device="cpu")))


def make_rows(lengths: list[tuple[int, int]]) -> list[TokenRows]:
    rng = np.random.default_rng(0)
    rows = []
    for number, (c, n) in enumerate(lengths):
        context, target = (rng.integers(1, V - 1, size).astype(np.int32) for size in (c, n))
        rows.append(TokenRows(Example(f"e{number}", "x" * n), context, target, np.arange(1, n + 1)))
    return rows


ROWS = make_rows([(1, 7), (3, 20), (1, 1), (5, 5), (2, 40), (1, 20), (10, 2), (1, 7), (4, 33)])


def teacher_of(
    head: LanguageModelHead, device: torch.device | None = None, config: TargetConfig = CONFIG, **options
) -> Teacher:
    teacher = Teacher(
        head, Sparsifier(config, V, torch.arange(0, V, 3)), **{"tokens_per_batch": 64, "head_chunk": 7} | options
    )
    if device is not None:
        teacher.execution.copies = HostCopies(device)
    return teacher


def score(teacher: Teacher, rows: list[TokenRows] = ROWS) -> dict[str, np.ndarray]:
    *_, (_, last) = collect(rows, teacher.run(rows, 0))
    return {name: value for name, value in vars(last).items() if value is not None}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class Backbone:
    """Says when it was asked; answers NaN from one token on, and has no room for more than so many."""

    def __init__(self, backbone, log: list[str], poison: int = -1, room: int = 10**9) -> None:
        self.backbone, self.log, self.poison, self.room = backbone, log, poison, room

    def __call__(self, input_ids, **options):
        self.log.append("launch")
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        result = self.backbone(input_ids=input_ids, **options)
        seen = (input_ids == self.poison).long().cumsum(1) > 0
        result.last_hidden_state = result.last_hidden_state.masked_fill(seen[..., None], math.nan)
        return result


@pytest.mark.parametrize("config", [CONFIG, TargetConfig(top_k=8), TargetConfig.of_profile("sampled", samples=4)])
@pytest.mark.parametrize("head_chunk", [1, 7, 256])
def test_the_pass_gives_what_it_gives_on_a_cpu_and_every_chunk_once(head, gpu, config, head_chunk: int):
    expected = score(teacher_of(head, config=config, head_chunk=head_chunk))
    assert_same(score(teacher_of(head, GPU, config, head_chunk=head_chunk)), expected)
    assert gpu.log.count("read") == gpu.log.count("wait for compute") > 3


def test_a_batch_is_launched_before_the_one_before_it_is_read_and_no_more_than_that(head, gpu):
    watched = LanguageModelHead(Backbone(head.backbone, gpu.log), head.weight, head.bias)
    score(teacher_of(watched, GPU, head_chunk=256))  # one chunk a batch
    steps = [line for line in gpu.log if line in ("launch", "read")]
    batches = steps.count("launch")
    assert batches == 4
    assert steps == ["launch", "launch", *["read", "launch"] * (batches - 2), "read", "read"]


@pytest.mark.parametrize("head_chunk", [3, 256])
@pytest.mark.parametrize("example", range(len(ROWS)))
def test_rows_that_are_not_finite_are_named_right_although_they_are_found_a_batch_later(head, gpu, example, head_chunk):
    rows = [TokenRows(r.example, r.context_ids.copy(), r.target_ids, r.byte_end) for r in ROWS]
    rows[example].context_ids[-1] = V - 1  # nowhere else
    bad = LanguageModelHead(Backbone(head.backbone, gpu.log, poison=V - 1), head.weight, head.bias)
    messages = []
    for device in (None, GPU):
        with pytest.raises(TeacherError, match="not finite") as caught:
            score(teacher_of(bad, device, head_chunk=head_chunk), rows)
        messages.append(caught.value.details)
    assert messages[0]["where"] == f"example e{example}"
    assert messages[0] == messages[1]


@pytest.mark.parametrize("room", [45, 60, 100])
def test_out_of_memory_with_a_batch_on_its_way_halves_and_loses_nothing(head, gpu, room: int):
    small = LanguageModelHead(Backbone(head.backbone, gpu.log, room=room), head.weight, head.bias)
    options: dict[str, Any] = {"tokens_per_batch": 200}
    assert_same(score(teacher_of(small, GPU, **options)), score(teacher_of(small, **options)))


def topk_from_behind(logits: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` as a GPU may do it: among equal logits the highest id first."""
    found = logits.flip(1).sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], logits.shape[1] - 1 - found.indices[:, :k]


@pytest.mark.parametrize(("k", "copies"), [(7, 2), (8, 2), (7, 25)])
def test_equal_logits_are_kept_lowest_id_first_and_only_many_at_the_k_th_place_cost_a_second_look(
    head, gpu, monkeypatch, k: int, copies: int
):
    repeated = torch.cat([head.weight[: V // copies]] * copies)  # every logit so many times
    watched = LanguageModelHead(Backbone(head.backbone, gpu.log), repeated, None)
    config = TargetConfig(top_k=k)
    expected = score(teacher_of(watched, config=config))
    launches = gpu.log.count("launch")
    monkeypatch.setattr(torch.Tensor, "topk", topk_from_behind)
    monkeypatch.setattr(
        "kd.cache_builder.teacher.sparsify.top_k_by_threshold", lambda x, k, _: top_k_by_topk(x, k)
    )  # a GPU
    teacher = teacher_of(watched, GPU, config)
    assert_same(score(teacher), expected)
    again = gpu.log.count("launch") - 2 * launches
    assert again == (0 if copies == 2 else launches)  # each batch once more
    assert teacher.tokens == sum(len(r.input_ids) for r in ROWS)  # counted once
