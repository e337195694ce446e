"""A builder that sleeps past its lease and wakes up late changes nothing that another has finished meanwhile.

The first builder stops itself (SIGSTOP) before its n-th operation that writes under the cache's folder. Its claims are made old, a
second builder, whose numbers have other last bits, finishes the cache, and then the first continues.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from crashing import child, operations, sleeper, some_of, woken

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.upkeep.verify import verify
from kd.common.progress import final


def run(request: BuildRequest) -> None:
    for _ in build(plan_build(request)):
        pass


def with_other_last_bits(request: BuildRequest) -> None:
    """Build as another processor would: the same tokens, and log-probabilities that differ a little."""
    exact = codecs.encode

    def encode(raw, config, *, vocabulary_size=None):
        stored, quality = exact(raw, config, vocabulary_size=vocabulary_size)
        return stored | {"gold_logprob": stored["gold_logprob"] + np.float16(2**-6)}, quality

    codecs.encode = encode
    run(request)


def age_claims(out: Path) -> None:
    for path in (out / "commits").glob(".*.claim"):
        os.utime(path, (1.0, 1.0))


def wake_up_late(out: Path, request: BuildRequest, number: int, tree) -> bool:
    """Whether the builder was still asleep when the second had finished. Asserts that the cache stays the second's."""
    pid = sleeper(out, lambda: run(request), number)
    if pid is None:
        return False
    age_claims(out)
    code, text = child(lambda: with_other_last_bits(request))
    finished = tree(out)
    status = woken(pid)
    assert (code, text, status) == (0, "", 0), number
    after = tree(out)
    assert sorted(n for n in finished.keys() | after.keys() if not hidden(n) and finished.get(n) != after.get(n)) == []
    assert final(verify(out)) == (), number
    assert (out / "manifest.json").is_file()
    assert [name for name in after if hidden(name)] == [], number
    return True


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def late_at_operations(tmp_path: Path, build_request, tree, few: int | None) -> int:
    total = operations(lambda: run(build_request(tmp_path / "counted")), tmp_path / "counted")
    late = 0
    for number in some_of(total, few):
        out = tmp_path / f"s{number}"
        late += wake_up_late(out, build_request(out), number, tree)
    return late


def test_a_builder_that_wakes_up_late_changes_nothing(tmp_path, build_request, tree):
    assert late_at_operations(tmp_path, build_request, tree, few=8) >= 6


@pytest.mark.slow
def test_a_builder_that_wakes_up_late_anywhere_changes_nothing(tmp_path, build_request, tree):
    assert late_at_operations(tmp_path, build_request, tree, few=None) >= 100
