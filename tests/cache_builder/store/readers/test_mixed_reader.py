"""A mixture is its caches, each in its share, in an order that (seed, epoch) decides."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.mixed_reader import MixedReader
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import CacheMismatchError
from kd.common.settings import changed, make
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train


@pytest.fixture(scope="module")
def pair(tmp_path_factory, build_request, run_build, save_model, tokenizer_dir) -> tuple[Path, Path]:
    """Two teachers over the same text."""
    folder = tmp_path_factory.mktemp("mixture")
    save_model(folder / "other", seed=9)
    shutil.copytree(tokenizer_dir, folder / "other", dirs_exist_ok=True)
    run_build(build_request(folder / "a"))
    run_build(build_request(folder / "b", model=folder / "other"))
    return folder / "a", folder / "b"


def mixed(pair: tuple[Path, Path], a: float = 0.7, b: float = 0.3) -> MixedReader:
    return MixedReader([(CacheReader(pair[0]), a), (CacheReader(pair[1]), b)])


def test_its_examples_are_those_of_its_caches(pair):
    reader, parts = mixed(pair), [CacheReader(p) for p in pair]
    assert len(reader) == len(parts[0]) + len(parts[1])
    assert (reader.lengths()[0] == np.concatenate([p.lengths()[0] for p in parts])).all()
    expected = [e for p in parts for e in p.read(range(len(p)))]
    for number, (mine, theirs) in enumerate(zip(reader.read(range(len(reader))), expected, strict=True)):
        assert (mine.index, mine.id, mine.target) == (number, theirs.id, theirs.target)
        assert (mine.targets.logprobs == theirs.targets.logprobs).all()


def test_shares_are_the_weights_and_no_example_comes_twice_before_all_came_once(pair):
    reader = mixed(pair)
    size, epochs = len(CacheReader(pair[0])), 60
    order = np.concatenate([reader.epoch_order(3, e) for e in range(epochs)])
    share = (order < size).mean()
    # a binomial share: five of its standard errors
    assert abs(share - 0.7) < 5 * np.sqrt(0.21 / len(order))
    for offset, count in ((0, size), (size, len(reader) - size)):
        own = order[(order >= offset) & (order < offset + count)] - offset
        for start in range(0, len(own) - count + 1, count):
            assert sorted(own[start : start + count]) == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch(pair):
    orders = {(seed, epoch): tuple(mixed(pair).epoch_order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 5)}
    assert len(set(orders.values())) == 6
    assert all(tuple(mixed(pair).epoch_order(*key)) == order for key, order in orders.items())


def test_the_fingerprint_knows_the_weights(pair):
    prints = {mixed(pair, *w).manifest.fingerprint for w in ((0.7, 0.3), (0.3, 0.7), (0.5, 0.5))}
    assert len(prints) == 3
    assert mixed(pair, 7, 3).manifest.fingerprint not in {CacheReader(p).manifest.fingerprint for p in pair}


def test_caches_of_other_settings_are_not_mixed(tmp_path, pair, build_request, run_build):
    run_build(build_request(tmp_path / "k4", top_k=4))
    with pytest.raises(CacheMismatchError, match="cannot be mixed") as caught:
        open_cache(f"{pair[0]}=1,{tmp_path / 'k4'}=1")
    assert "top_k" in str(caught.value)


def test_a_student_learns_from_both(tmp_path, pair, model_dir):
    """From its teacher alone a copy of it has nothing to learn; from the mixture it has, and the run says what it used."""
    values = {"student": model_dir, "max_steps": 2, "lr": 1e-9, "batch_size": 8, "device": "cpu"}
    config = make(TrainConfig, values | {"cache": pair[0], "out": tmp_path / "own"})
    spec = f"{pair[0]}=0.5,{pair[1]}=0.5"
    own, both = train(config), train(changed(config, cache=spec, out=tmp_path / "both"))
    assert own.kd < 1e-3 < 0.05 < both.kd
    assert both.cache_fingerprint == open_cache(spec).manifest.fingerprint
