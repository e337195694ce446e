"""Training from a URL, or from a part of a cache, is training from the directory that holds the same."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from servers import FileServer

from kd.cache_builder.share.mirror import mirrors
from kd.cache_builder.share.pull import pull
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import Layout
from kd.common.errors import CacheError, CacheMismatchError
from kd.common.settings import make
from kd.student_trainer.batches import read_ahead
from kd.student_trainer.batches.compatibility import needed_arrays, resolve_objective
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.training import train


@pytest.fixture
def served(kl_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    server = FileServer(kl_cache)
    yield server
    server.close()


def test_a_url_trains_to_the_same_weights_within_a_bound_smaller_than_the_cache(
    run, served: FileServer, kl_cache: Path
):
    reader = CacheReader(kl_cache)
    largest = max(commits.read_commit(kl_cache, reader.manifest, i).bytes for i in reader.shards)
    here = run("here", epochs=2.0, max_steps=None)
    there = run("there", cache=served.url, epochs=2.0, max_steps=None, cache_bytes=2 * largest)
    assert all(torch.equal(here.weights[name], there.weights[name]) for name in here.weights)
    assert [r.loss for r in here.records] == [r.loss for r in there.records]
    (root,) = (path for path in mirrors().iterdir() if path.is_dir())
    kept = [p for p in root.rglob("c.*") if p.is_file()]
    assert 0 < sum(p.stat().st_size for p in kept) <= 2 * largest


def test_a_run_from_a_url_resumes_as_from_the_directory(run, served: FileServer):
    run("here", max_steps=4, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run("there", cache=served.url, max_steps=4, save_every=2, stop_after=3)
    there = run("there", cache=served.url, max_steps=4, save_every=2, resume=True)
    here = run("again", max_steps=4)
    assert all(torch.equal(here.weights[name], there.weights[name]) for name in here.weights)


def test_plain_fine_tuning_fetches_no_predictions(run, served: FileServer):
    run("ce", cache=served.url, loss="ce")
    assert served.gets("gold_ids/c.")
    assert not served.gets("logprobs/c.")
    assert not served.gets("token_ids/c.")


def test_a_part_with_the_arrays_of_a_loss_trains_that_loss_alone(run, kl_cache: Path, tmp_path: Path):
    def arrays(manifest):
        return needed_arrays(resolve_objective(manifest.targets, make(LossSettings, {"loss": "ce"})), manifest)

    list(pull(str(kl_cache), tmp_path / "some", arrays=arrays))
    whole, part = run("whole", loss="ce"), run("part", loss="ce", cache=str(tmp_path / "some"))
    assert all(torch.equal(whole.weights[name], part.weights[name]) for name in whole.weights)
    with pytest.raises(CacheError, match="does not hold those arrays"):
        run("kl", cache=str(tmp_path / "some"))


def test_a_part_trains_on_the_examples_it_holds_and_is_not_mistaken_for_the_whole(run, kl_cache: Path, tmp_path: Path):
    first, stop, rows = CacheReader(kl_cache).manifest.shards[1]
    list(pull(str(kl_cache), tmp_path / "some", examples=(first, stop)))
    done = run("part", cache=str(tmp_path / "some"), epochs=1.0, max_steps=None, batch_size=1)
    assert done.result.steps == stop - first
    assert done.records[-1].tokens == rows
    with pytest.raises(KeyboardInterrupt):
        run("cut", cache=str(tmp_path / "some"), max_steps=4, save_every=2, stop_after=3)
    with pytest.raises(CacheMismatchError, match="other settings"):
        run("cut", max_steps=4, save_every=2, resume=True)
    text = run(
        "text", cache=str(tmp_path / "some"), loss="ce", prompt_loss=True, epochs=1.0, max_steps=None, batch_size=1
    )
    assert text.result.steps == stop - first  # the student's own tokens, of the texts that are here


def stored(root: Path) -> int:
    """Bytes of shards that lie in a mirror now."""
    total = 0
    for path in [*(root / "targets.zarr").glob("*/c.*"), *(root / "examples").glob("*")]:
        with suppress(OSError):  # evicted while we look
            total += path.stat().st_size
    return total


def test_two_ranks_of_a_host_share_a_mirror_and_its_bound_and_fetch_each_file_once(
    build_request, run_build, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    defaults = CacheReader.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "window", 4)  # else the bound would have to hold 16 shards
    monkeypatch.setattr(read_ahead, "TOUCHED_EXAMPLES", 4)  # the shards have two examples each
    cache = tmp_path / "cache"
    run_build(build_request(cache, layout=Layout(32, 32)))
    reader = CacheReader(cache)
    sizes = [commits.read_commit(cache, reader.manifest, i).bytes for i in reader.shards]
    limit = sum(sizes) // 2
    assert len(sizes) > reader.window  # lanes: each rank reads shards of its own, and both read those at a seam
    server, high, over = FileServer(cache), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            high[0] = max(high[0], sum(stored(root) for root in mirrors().glob("*") if root.is_dir()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    settings: dict[str, Any] = {
        "cache": server.url,
        "student": str(student_dir),
        "out": str(tmp_path / "two"),
        "device": "cpu",
    }
    try:
        run_ranks(lambda: train(**settings, cache_bytes=limit, batch_size=4, epochs=1.0, head_chunk=64))
    finally:
        over.set()
        watcher.join()
        server.close()
    fetched = Counter(path for path in server.gets("/targets.zarr") if "/c." in path)
    assert {*fetched.values()} == {1}
    assert limit / 2 < high[0] <= limit  # which is less than the cache
