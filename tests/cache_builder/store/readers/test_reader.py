"""Reading: any order, by example, equal to what was scored; the order of an epoch is a function of (seed, epoch)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.readers.reader import CacheReader, quality_means
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.soft_targets import SoftTargets, concatenate
from kd.common.errors import CacheError


def kept(targets: SoftTargets) -> np.ndarray:
    """Ids of the kept tokens, of a profile that has them."""
    assert targets.token_ids is not None
    return targets.token_ids


@pytest.fixture(scope="module")
def reader(cache: Path) -> CacheReader:
    return CacheReader(cache)


def assert_equal(a: SoftTargets, b: SoftTargets) -> None:
    for name in SoftTargets.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            assert x == y, name


def test_cached_targets_are_the_models_own_predictions(reader: CacheReader, model_dir: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for number in (0, 5, len(reader) - 1):
        example = reader[number]
        c, n = len(example.context_ids), len(example.targets)
        with torch.no_grad():
            logits = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0, c - 1 : c + n - 1]
        for t in (1.0, 2.0, 4.0):
            log_p = (logits.double() / t).log_softmax(-1).numpy()
            expected = np.take_along_axis(log_p, kept(example.targets), 1)
            top = expected[:, :1]
            got = example.targets.logprobs_at(t)
            # graded: half a step, 1/92 nat that grows e-fold in 5 (nats at temperature 1); the normaliser moves by
            # less than the first values' share of it
            assert (np.abs(got - expected) <= np.exp((top - expected) * t / 5) / 92 * 1.02 + 1 / 92).all()
            tail = 1 - np.exp(expected).sum(1)
            np.testing.assert_allclose(example.targets.tail_mass_at(t), tail, atol=2e-3)
        assert (example.targets.token_ids == np.argsort(-logits.numpy(), axis=1)[:, :8]).all()


def test_rows_tile_the_text(reader: CacheReader, text_file: Path):
    whole: dict[str, str] = {}
    for number in range(len(reader)):
        example = reader[number]
        assert example.index == number
        document = example.id.partition("#")[0]
        whole[document] = whole.get(document, "") + example.target
        assert example.targets.byte_end[-1] == len(example.target.encode())
    assert "\n<|endoftext|>\n".join(whole.values()) == text_file.read_text(encoding="utf-8")


def test_gold_ids_spell_the_target(reader: CacheReader):
    vocabulary = reader.vocabulary()
    for number in (0, 3, len(reader) - 1):
        example = reader[number]
        assert b"".join(vocabulary[i] for i in example.targets.gold_ids) == example.target.encode()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kept_plus_tail_is_one_and_ids_are_unique_and_sorted(reader: CacheReader, temperature: float):
    for number in range(len(reader)):
        targets = reader[number].targets
        log_p = targets.logprobs_at(temperature)
        np.testing.assert_allclose(np.exp(log_p).sum(1) + targets.tail_mass_at(temperature), 1, atol=1e-6)
        assert (np.diff(log_p, axis=1) <= 0).all()
        assert all(len(set(row)) == len(row) for row in targets.token_ids.tolist())


def test_a_slice_keeps_kept_plus_tail_at_one(cache: Path, reader: CacheReader):
    sliced = CacheReader(cache, top_k=3)
    for number in (0, 4, len(reader) - 1):
        a, b = sliced[number].targets, reader[number].targets
        assert a.token_ids.shape[1] == 3
        np.testing.assert_array_equal(a.logprobs, b.logprobs[:, :3])
        for t in a.temperatures:
            kept = np.exp(a.logprobs_at(t)).sum(1)
            np.testing.assert_allclose(kept + a.tail_mass_at(t), 1, atol=1e-6)
            assert (a.tail_mass_at(t) >= b.tail_mass_at(t)).all()


@pytest.mark.parametrize("top_k", [0, 9, -1])
def test_more_tokens_than_stored_are_refused(cache: Path, top_k: int):
    with pytest.raises(CacheError, match="does not hold that many"):
        CacheReader(cache, top_k=top_k)


def test_several_examples_at_once_equal_one_at_a_time(reader: CacheReader):
    order = [len(reader) - 1, 0, 7, 7, 3]
    for together, number in zip(reader.read(order), order, strict=True):
        alone = reader[number]
        assert (together.index, together.id, together.target) == (number, alone.id, alone.target)
        np.testing.assert_array_equal(together.input_ids, alone.input_ids)
        assert_equal(together.targets, alone.targets)
    assert reader.read([]) == []


@pytest.mark.parametrize("number", [-1, 10**6])
def test_an_example_that_is_not_there_is_an_index_error(reader: CacheReader, number: int):
    with pytest.raises(IndexError):
        reader[number]


def test_lengths_are_those_of_the_examples(reader: CacheReader):
    tokens, rows = reader.lengths()
    examples = reader.read(range(len(reader)))
    assert tokens.tolist() == [len(e.input_ids) for e in examples]
    assert rows.tolist() == [len(e.targets) for e in examples]
    assert rows.sum() == reader.manifest.rows


# order


def test_an_epoch_is_a_permutation(reader: CacheReader):
    for seed, epoch in [(0, 0), (0, 1), (5, 2)]:
        assert sorted(reader.epoch_order(seed, epoch)) == list(range(len(reader)))


def test_the_order_is_a_function_of_seed_and_epoch(cache: Path, reader: CacheReader):
    order = reader.epoch_order(3, 1)
    reader.read([0, 1, 2])  # what was read before does not matter
    np.testing.assert_array_equal(CacheReader(cache, top_k=2).epoch_order(3, 1), order)
    for other in ((3, 0), (3, 2), (4, 1), (1, 3)):
        assert reader.epoch_order(*other).tolist() != order.tolist()


def test_examples_of_a_window_are_shuffled_together(reader: CacheReader):
    starts = [first for first, _, _ in reader.manifest.shards]
    changes, falls = 0, 0
    for epoch in range(10):
        order = np.asarray(reader.epoch_order(0, epoch))
        shards = np.searchsorted(starts, order, side="right") - 1
        changes = max(changes, int((np.diff(shards) != 0).sum()))
        falls += sum(int((np.diff(order[shards == s]) < 0).sum()) for s in range(len(starts)))
    assert changes > len(starts) - 1  # as many as whole shards one after another would have
    assert falls > 0  # nor does a shard keep its own order


def test_threads_that_ask_for_one_shard_load_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    reader, loads, together = CacheReader(cache), list[int](), Barrier(4)
    read_shard: Callable = shard_store.read_shard

    def slow(files, manifest, index, names=None):
        loads.append(index)
        time.sleep(0.05)  # long enough for the others to come
        return read_shard(files, manifest, index, names)

    def ask(_: int) -> shard_store.Shard:
        together.wait()
        return reader.shard(0)

    monkeypatch.setattr(shard_store, "read_shard", slow)
    with ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(ask, range(4)))
    assert loads == [0]
    assert all(shard is shards[0] for shard in shards)


def test_an_epoch_touches_each_shard_in_one_window(cache: Path, monkeypatch: pytest.MonkeyPatch):
    reader = CacheReader(cache, window=2)
    reads = []
    read_shard: Callable = shard_store.read_shard

    def counted(
        files: CacheFiles, manifest: CacheManifest, index: int, names: list[str] | None = None
    ) -> shard_store.Shard:
        reads.append(index)
        return read_shard(files, manifest, index, names)

    monkeypatch.setattr(shard_store, "read_shard", counted)
    for number in reader.epoch_order(0, 0):
        reader[int(number)]
    assert sorted(reads) == list(range(len(reader.manifest.shards)))


def test_memory_holds_a_window_of_shards(cache: Path):
    reader = CacheReader(cache, window=1)
    for index in (0, 1, 2, 0):
        reader.shard(index)
        assert len(reader._shards) <= 2
    assert reader.shard(0) is reader.shard(0)


def test_threads_read_the_same(cache: Path, reader: CacheReader):
    shared = CacheReader(cache, window=1)
    order = reader.epoch_order(1, 1).tolist() * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: shared[n].targets, order))
    for number, targets in zip(order, found, strict=True):
        assert_equal(targets, reader[number].targets)


# profiles and pieces


def test_an_unfinished_cache_is_refused_with_its_progress(tmp_path: Path, build_request):
    running = build(plan_build(build_request(tmp_path / "c")))
    next(running)
    running.close()
    with pytest.raises(CacheError, match="not complete") as caught:
        CacheReader(tmp_path / "c")
    assert "shards" in str(caught.value.details["found"])


@pytest.mark.parametrize(
    ("profile", "options", "present", "absent"),
    [
        ("kl", {}, {"token_ids", "logprobs"}, {"tail_bands", "sample_ids", "boundary_logprob"}),
        ("uld", {}, {"logprobs", "tail_bands"}, {"token_ids", "sample_ids", "boundary_logprob"}),
        ("sampled", {"samples": 6}, {"sample_ids", "sample_counts"}, {"token_ids", "logprobs", "tail_bands"}),
        ("full", {"tail_bands": 3}, {"token_ids", "logprobs", "tail_bands", "sample_ids", "boundary_logprob"}, set()),
    ],
)
def test_each_profile_gives_what_it_says(tmp_path, build_request, run_build, profile, options, present, absent):
    run_build(build_request(tmp_path / "c", profile=profile, **options))
    targets = CacheReader(tmp_path / "c")[0].targets
    assert all(getattr(targets, name) is not None for name in present)
    assert all(getattr(targets, name) is None for name in absent)
    if profile == "sampled":
        assert (targets.sample_counts.sum(1) == 6).all()
        with pytest.raises(CacheError, match="no top-k"):
            targets.logprobs_at(1.0)
    if profile == "full":
        # bands are float16 logarithms and the head is linear8; each is good to about 1e-3 of the mass
        bands = np.exp(targets.tail_bands[:, 0]).sum(1)
        np.testing.assert_allclose(bands, targets.tail_mass_at(1.0), atol=2e-3)


def test_the_whole_vocabulary_in_float32_leaves_no_tail(tmp_path, build_request, run_build):
    run_build(build_request(tmp_path / "c", top_k=400, logprob_codec="float32"))
    targets = CacheReader(tmp_path / "c")[0].targets
    for t in targets.temperatures:
        np.testing.assert_allclose(np.exp(targets.logprobs_at(t)).sum(1), 1, atol=1e-5)  # sum of 400 float32
    assert (np.sort(kept(targets), axis=1) == np.arange(400)).all()
    rows = np.arange(len(targets))
    gold = (targets.token_ids == targets.gold_ids[:, None]).argmax(1)
    assert (gold == targets.gold_rank).all()
    np.testing.assert_allclose(targets.logprobs[rows, gold], targets.gold_logprob, rtol=2**-10, atol=1e-4)  # float16


def test_quality_means_are_per_row(reader: CacheReader):
    means = quality_means(reader.manifest)
    examples = reader.read(range(len(reader)))
    top1 = np.concatenate([e.targets.gold_rank == 0 for e in examples]).mean()
    nll = -np.concatenate([e.targets.gold_logprob for e in examples]).mean()
    kept = 1 - np.concatenate([e.targets.tail_mass_at(1.0) for e in examples]).mean()
    assert means["top1"] == pytest.approx(top1)
    assert means["gold_nll"] == pytest.approx(nll, rel=2**-10)  # gold_logprob is stored as float16
    assert means["mass_kept"] == pytest.approx(kept, abs=2e-3)  # linear8
    assert 0 <= means["head_kl"] < 1e-3


def test_rows_alone_are_those_of_the_examples_one_after_another(reader: CacheReader):
    numbers = [3, 0, len(reader) - 1, 1]
    assert_equal(reader.read_rows(numbers), concatenate([e.targets for e in reader.read(numbers)]))
    sliced = CacheReader(reader.root, top_k=3)
    assert_equal(sliced.read_rows(numbers), concatenate([sliced[n].targets for n in numbers]))
