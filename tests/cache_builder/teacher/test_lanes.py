"""Work on several threads: torch's own threads are shared among them and given back."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial

import pytest
import torch

from kd.cache_builder.teacher.lanes import TOKENS_IN_FLIGHT, Lanes, lane_count

THREADS = 3


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
