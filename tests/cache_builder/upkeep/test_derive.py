"""Slices and mergers hold what a build would have made, and what need not change is copied to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kd.cache_builder.store.logprob_codecs import CODECS
from kd.cache_builder.store.manifest import Layout, load_manifest
from kd.cache_builder.store.reader import CacheReader, concatenate
from kd.cache_builder.upkeep.derive import converted, merge_caches, slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.cli import cli
from kd.common.errors import CacheMismatchError, DataError


def all_rows(root: Path, **options: object):
    reader = CacheReader(root, **options)
    return concatenate([e.targets for e in reader.read(range(len(reader)))])


def sound(root: Path) -> bool:
    return list(verify(root))[-1].findings == ()


def done(steps) -> None:
    for _ in steps:
        pass


@pytest.fixture(scope="module")
def kl(tmp_path_factory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("derive") / "kl"
    run_build(build_request(out))
    return out


def test_a_slice_of_k_is_the_build_of_k_but_for_what_the_tail_was_rounded_to(tmp_path, kl, build_request, run_build):
    done(slice_cache(kl, tmp_path / "slice", top_k=3))
    run_build(build_request(tmp_path / "built", top_k=3))
    found, expected = all_rows(tmp_path / "slice"), all_rows(tmp_path / "built")
    assert (found.token_ids == expected.token_ids).all()
    for name in ("gold_ids", "gold_rank", "byte_end", "gold_logprob"):
        assert (getattr(found, name) == getattr(expected, name)).all(), name
    # both put the same head on the same scale; the slice's tail holds five tokens as decoded, not exact: the codec's error
    # is at most half a step of 1/46 on each, on a mass below 1, and float16 odds come on top
    for temperature in found.temperatures:
        difference = np.abs(found.logprobs_at(temperature) - expected.logprobs_at(temperature))
        assert difference.max() < 0.012
    assert sound(tmp_path / "slice")


@pytest.mark.parametrize("codec", ["float32", "graded", "graded-coarse", "linear8", "float16"])
def test_kept_and_tail_mass_of_a_slice_add_up_at_every_temperature(tmp_path, build_request, run_build, codec: str):
    run_build(build_request(tmp_path / "c", logprob_codec=codec))
    done(slice_cache(tmp_path / "c", tmp_path / "s", top_k=2))
    whole, cut = all_rows(tmp_path / "c"), all_rows(tmp_path / "s")
    for t in whole.temperatures:
        kept = np.exp(whole.logprobs_at(t))
        expected = whole.tail_mass_at(t) + kept[:, 2:].sum(1)
        # two float16 odds (2^-11 of a logarithm of some nats), and another span of linear8 for fewer values
        assert np.abs(cut.tail_mass_at(t) - expected).max() < (0.02 if codec == "linear8" else 0.005)


def test_the_same_settings_are_the_same_arrays(kl):
    reader = CacheReader(kl)
    stored = reader.shard(0).arrays
    assert converted(stored, reader.config, reader.config) is stored


def test_a_slice_of_examples_has_their_rows_to_the_bit(tmp_path, kl):
    reader = CacheReader(kl)
    first, stop = 3, len(reader) - 2
    assert reader.manifest.shards[0][0] < first
    done(slice_cache(kl, tmp_path / "s", examples=(first, stop)))
    part = CacheReader(tmp_path / "s")
    assert len(part) == stop - first
    for mine, theirs in zip(part.read(range(len(part))), reader.read(range(first, stop)), strict=True):
        assert (mine.id, mine.prompt, mine.target) == (theirs.id, theirs.prompt, theirs.target)
        assert (mine.input_ids == theirs.input_ids).all()
        assert (mine.targets.logprobs == theirs.targets.logprobs).all()
        assert (mine.targets.log_z == theirs.targets.log_z).all()
    assert sound(tmp_path / "s")
    assert "head_kl" not in part.manifest.quality  # not measured on these
    assert part.manifest.quality["rows"] == part.manifest.rows


@pytest.mark.parametrize("profile", ["kl", "compact", "uld", "sampled"])
def test_a_full_cache_holds_every_other_profile(tmp_path, cache, profile: str):
    done(slice_cache(cache, tmp_path / "s", profile=profile))
    whole, cut = all_rows(cache), all_rows(tmp_path / "s")
    assert sound(tmp_path / "s")
    assert (cut.token_ids is None) == (profile in ("uld", "sampled"))
    if profile == "sampled":
        assert (cut.sample_ids == whole.sample_ids).all()
        assert np.abs(cut.log_z - whole.log_z).max() == 0
        return
    step = CODECS[CacheReader(tmp_path / "s").config.logprob_codec].step
    assert (
        np.abs(np.diff(cut.logprobs) - np.diff(whole.logprobs)).max() < 40 * step
    )  # far out steps grow to y/2 at most
    assert np.abs(cut.logprobs[:, 0] - whole.logprobs[:, 0]).max() < 2 * step
    if profile == "uld":
        assert (cut.tail_bands == whole.tail_bands).all()


def test_a_slice_killed_in_between_continues_to_the_same_bytes(tmp_path, kl, tree):
    done(slice_cache(kl, tmp_path / "whole", top_k=3))
    running = slice_cache(kl, tmp_path / "s", top_k=3)
    next(running)
    running.close()
    done(slice_cache(kl, tmp_path / "s", top_k=3))
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match="made from something else"):
        done(slice_cache(kl, tmp_path / "s", top_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "whole cache"),
        ({"top_k": 9}, "no more tokens"),
        ({"profile": "full"}, "cannot hold what"),
        ({"profile": "nonsense"}, "unknown profile"),
        ({"examples": (0, 10_000)}, "no such examples"),
    ],
)
def test_slices_that_cannot_be(tmp_path, kl, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        done(slice_cache(kl, tmp_path / "s", **options))
    assert not (tmp_path / "s").exists()


# mergers


@pytest.fixture
def halves(tmp_path, text_file, build_request, run_build) -> tuple[Path, Path]:
    """Two caches of the two halves of the stories."""
    end = "\n<|end|>\n" if "<|end|>" in text_file.read_text() else None
    documents = text_file.read_text().split(end or "\n")
    paths = []
    for name, part in (("a", documents[:4]), ("b", documents[4:])):
        (tmp_path / f"{name}.txt").write_text((end or "\n").join(part))
        run_build(build_request(tmp_path / name, text=tmp_path / f"{name}.txt"))
        paths.append(tmp_path / name)
    return paths[0], paths[1]


def test_a_merger_holds_both_caches_one_after_the_other(tmp_path, halves):
    done(merge_caches(halves, tmp_path / "both"))
    both, parts = CacheReader(tmp_path / "both"), [CacheReader(p) for p in halves]
    assert len(both) == sum(map(len, parts))
    expected = [e for p in parts for e in p.read(range(len(p)))]
    for mine, theirs in zip(both.read(range(len(both))), expected, strict=True):
        assert (mine.id, mine.target) == (theirs.id, theirs.target)
        for name in ("token_ids", "logprobs", "log_z", "gold_ids", "byte_end"):
            assert (getattr(mine.targets, name) == getattr(theirs.targets, name)).all(), name
    for name, value in both.manifest.quality.items():
        assert value == pytest.approx(sum(p.manifest.quality[name] for p in parts), rel=1e-12)
    assert sound(tmp_path / "both")


def test_the_order_of_caches_is_part_of_what_a_merger_is(tmp_path, halves):
    done(merge_caches(halves, tmp_path / "ab"))
    done(merge_caches(halves[::-1], tmp_path / "ba"))
    assert load_manifest(tmp_path / "ab").fingerprint != load_manifest(tmp_path / "ba").fingerprint


def test_caches_of_other_settings_or_twice_the_same_are_refused(tmp_path, kl, halves, build_request, run_build):
    run_build(build_request(tmp_path / "k4", top_k=4))
    with pytest.raises(CacheMismatchError, match="cannot be merged") as caught:
        done(merge_caches([kl, tmp_path / "k4"], tmp_path / "m"))
    assert "differs targets.top_k  8 and 4" in str(caught.value)
    with pytest.raises(DataError, match="two or more different"):
        done(merge_caches([kl, kl], tmp_path / "m"))
    assert not (tmp_path / "m").exists()


# more text


def test_more_text_after_the_same_beginning_is_built_without_computing_it_again(
    tmp_path, text_file, build_request, run_build, tree, monkeypatch
):
    from kd.cache_builder.teacher.teacher_pass import Teacher

    documents = text_file.read_text()
    (tmp_path / "more.txt").write_text(documents + documents[::-1][:400])
    request = build_request(tmp_path / "old", layout=Layout(64, 32))
    run_build(request)
    longer = build_request(tmp_path / "direct", text=tmp_path / "more.txt", layout=Layout(64, 32))
    run_build(longer)
    scored, run = [], Teacher.run
    monkeypatch.setattr(Teacher, "run", lambda self, rows, first: scored.append(first) or run(self, rows, first))
    import dataclasses

    steps = run_build(dataclasses.replace(longer, out=tmp_path / "extended", extend=tmp_path / "old"))
    old, new = load_manifest(tmp_path / "old"), load_manifest(tmp_path / "extended")
    assert steps[-1].copied >= len(old.shards) - 2 > 2
    assert len(scored) == len(new.shards) - steps[-1].copied
    assert tree(tmp_path / "extended") == tree(tmp_path / "direct")


def test_a_cache_of_another_teacher_is_not_extended(tmp_path, build_request, run_build, save_model, tokenizer_dir):
    import dataclasses

    save_model(tmp_path / "other", seed=9)
    shutil.copytree(tokenizer_dir, tmp_path / "other", dirs_exist_ok=True)
    run_build(build_request(tmp_path / "old", model=tmp_path / "other"))
    with pytest.raises(CacheMismatchError, match="made from something else") as caught:
        run_build(dataclasses.replace(build_request(tmp_path / "new"), extend=tmp_path / "old"))
    assert "weights" in str(caught.value)


# commands, and the registry


def kd(*arguments: object) -> str:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False).output


def test_a_build_of_a_known_fingerprint_is_copied_and_says_so(tmp_path, model_dir, text_file, tree, monkeypatch):
    build = (
        "cache",
        "build",
        "--teacher",
        model_dir,
        "--data",
        text_file,
        "--seq-len",
        32,
        "--top-k",
        8,
        "--shard-rows",
        128,
        "--device",
        "cpu",
    )
    kd(*build, "--out", tmp_path / "one")
    monkeypatch.setattr("kd.cache_builder.build.builder.load_teacher", lambda plan: pytest.fail("loaded the teacher"))
    text = kd(*build, "--out", tmp_path / "two")
    assert f"built at {tmp_path / 'one'}" in text
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    monkeypatch.undo()


def test_ls_finds_caches_by_folder_and_by_fingerprint(tmp_path, model_dir, text_file):
    kd(
        "cache",
        "build",
        "--teacher",
        model_dir,
        "--data",
        text_file,
        "--seq-len",
        32,
        "--top-k",
        8,
        "--device",
        "cpu",
        "--out",
        tmp_path / "deep" / "down",
    )
    kd("cache", "slice", tmp_path / "deep" / "down", "--top-k", 2, "--out", tmp_path / "cut")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    below = json.loads(kd("cache", "ls", tmp_path, "--json"))["caches"]
    assert [Path(row["path"]).name for row in below] == ["bad", "cut", "down"]
    assert below[0]["fingerprint"] is None
    noted = json.loads(kd("cache", "ls", "--json"))["caches"]
    assert sorted(Path(row["path"]).name for row in noted) == ["cut", "down"]
    prefix = below[1]["fingerprint"][:12]
    assert prefix in kd("cache", "ls")
    assert CacheReader(prefix).root == (tmp_path / "cut").resolve()
    from kd.common.errors import CacheError

    with pytest.raises(CacheError, match="no cache of this machine"):
        CacheReader("0123456789ab")


def test_a_slice_pulled_from_an_address_is_the_slice_of_the_cache(tmp_path, kl):
    kd("cache", "push", kl, f"file://{tmp_path / 'there'}")
    kd("cache", "pull", f"file://{tmp_path / 'there'}", tmp_path / "here", "--top-k", 3, "--examples", "2:9")
    done(slice_cache(kl, tmp_path / "slice", top_k=3, examples=(2, 9)))
    assert load_manifest(tmp_path / "here").fingerprint == load_manifest(tmp_path / "slice").fingerprint
    found, expected = all_rows(tmp_path / "here"), all_rows(tmp_path / "slice")
    assert (found.logprobs == expected.logprobs).all()
    assert (found.token_ids == expected.token_ids).all()
    assert sound(tmp_path / "here")


def test_repair_takes_a_second_copy_from_an_address(tmp_path, kl, tree):
    kd("cache", "push", kl, f"file://{tmp_path / 'there'}")
    kd("cache", "pull", f"file://{tmp_path / 'there'}", tmp_path / "here")
    before = tree(tmp_path / "here")
    (tmp_path / "here" / "examples" / "00000.parquet").write_bytes(b"")
    assert "taken from" in kd("cache", "repair", tmp_path / "here", "--from", f"file://{tmp_path / 'there'}")
    assert tree(tmp_path / "here") == before
