"""Building: resumable to the byte, identified by what changes values, and refusing what does not belong together."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.estimate import estimate
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.shard_writing import lengths_of
from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout, load_manifest
from kd.cache_builder.store.writers import shard_writer
from kd.cache_builder.teacher.teacher_pass import Teacher
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError, DataError, TeacherError
from kd.common.files import process_tag
from kd.common.progress import final
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, build_request, run_build, tree) -> dict[str, bytes]:
    """Every file of a `kl` cache that was built in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "c"
    run_build(build_request(out))
    return tree(out)


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names of files that are not the same (shorter to read than two directories of bytes)."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


# progress and result


def test_progress_ends_complete_with_every_row_and_shard_counted(tmp_path: Path, build_request, run_build):
    plan = plan_build(build_request(tmp_path / "c"))
    steps = list(build(plan))
    assert len(plan.manifest.shards) >= 3
    assert [s.rows_done for s in steps] == sorted(s.rows_done for s in steps)
    last = steps[-1]
    assert last.complete
    assert not last.reused
    assert not any(s.complete for s in steps[:-1])
    assert (last.rows_done, last.shards_done) == (last.rows_total, last.shards_total)
    assert set(last.seconds or ()) == {"forward", "head", "select", "encode", "write", "wait"}
    assert len(CacheReader(tmp_path / "c")) == plan.manifest.examples


def test_a_second_run_has_nothing_to_do_and_loads_no_teacher(tmp_path, build_request, run_build, tree, monkeypatch):
    request = build_request(tmp_path / "c")
    run_build(request)
    before = tree(tmp_path / "c")
    monkeypatch.setattr(
        "kd.cache_builder.build.builder.teacher_of_plan", lambda plan: pytest.fail("loaded the teacher")
    )
    (step,) = run_build(request)
    assert step.reused
    assert step.complete
    assert differing(tree(tmp_path / "c"), before) == []


def test_a_build_leaves_only_what_the_format_names(unbroken):
    assert {name.split("/")[0] for name in unbroken} == {
        "manifest.json",
        "shards.parquet",
        "commits.parquet",
        "vocabulary.parquet",
        "lengths",
        "examples",
        "targets.zarr",
        "commits",
    }


def test_the_plan_counts_what_the_build_makes(tmp_path: Path, build_request):
    plan = plan_build(build_request(tmp_path / "c"))
    assert plan.manifest.rows == sum(len(r.target_ids) for r in plan.rows)
    assert plan.tokens == plan.manifest.rows + sum(len(r.context_ids) for r in plan.rows)
    assert not (tmp_path / "c").exists()
    for first, stop, rows in plan.manifest.shards:
        assert rows == sum(len(r.target_ids) for r in plan.rows[first:stop]) <= 128
    # uint8 x 8; ids, gold id and rank uint16; 3 float16 odds; float16 gold; uint32 length
    assert plan.raw_bytes_per_token == 8 + 16 + 2 + 2 + 6 + 2 + 4


def test_an_estimate_writes_nothing_and_counts_commits(tmp_path: Path, build_request, run_build):
    request = build_request(tmp_path / "c")
    plan = plan_build(request)
    before = estimate(plan)
    assert not (tmp_path / "c").exists()
    assert (before["committed_shards"], before["rows"]) == (0, plan.manifest.rows)
    run_build(request)
    assert estimate(plan_build(request))["committed_shards"] == before["shards"]
    assert before["teacher_parameters"] == (400 + 64) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32


# interruption


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_an_abandoned_build_resumes_to_the_same_bytes(tmp_path, build_request, run_build, tree, unbroken, steps: int):
    request = build_request(tmp_path / "c")
    running = build(plan_build(request))
    for _ in range(steps):
        next(running)
    running.close()
    assert not (tmp_path / "c" / "manifest.json").exists()
    run_build(request)
    assert differing(tree(tmp_path / "c"), unbroken) == []


def test_only_uncommitted_shards_are_built_again(tmp_path, build_request, run_build):
    request = build_request(tmp_path / "c")
    whole = run_build(request)
    commits = tmp_path / "c" / "commits"
    (tmp_path / "c" / "manifest.json").rename(tmp_path / "c" / "building.json")
    # as after a kill: the same document, before its last form
    building = load_manifest(tmp_path / "c").reopened()
    building.save(tmp_path / "c", "building.json")
    (commits / "00001.json").unlink()
    again = run_build(request)
    assert again[0].rows_done > whole[0].rows_done
    assert again[-1].complete
    assert len(again) < len(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from kd.cache_builder.store.writers import shard_publishing
from kd.cache_builder.build.builder import build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.targets import TargetConfig
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.model_request import ModelRequest
from kd.data.sources import load_corpus
import torch
torch.set_num_threads(1)
out, model, text = sys.argv[1:]
publish, count = shard_publishing.publish_first, 0
def deadly(temporary, final):
    global count
    count += 1
    if count == 2:  # the second shard's files are there, its commit is not
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(temporary, final)
shard_publishing.publish_first = deadly
request = BuildRequest(Path(out), ModelRequest(model, device="cpu"), load_corpus(text), BlockConfig(seq_len=32),
                       TargetConfig.of_profile("kl", top_k=8), Layout(128, 32), 128)
for progress in build(plan_build(request)):
    pass
"""


def test_a_killed_build_resumes_to_the_same_bytes(
    tmp_path, build_request, run_build, tree, unbroken, model_dir, text_file
):
    out = tmp_path / "c"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(out), str(model_dir), str(text_file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(out.glob(".staging-*"))
    assert [p.name for p in (out / "commits").glob("*.json")] == ["00000.json"]
    run_build(build_request(out))
    assert differing(tree(out), unbroken) == []


def test_a_build_killed_before_its_first_record_starts_again(tmp_path, build_request, run_build, tree, unbroken):
    out = tmp_path / "c"
    dead = killed_tag()
    (out / f".staging-{dead}.0" / "targets.zarr").mkdir(parents=True)
    (out / "targets.zarr").mkdir()
    (out / f".building.json.{dead}.tmp").write_text("{")
    run_build(build_request(out))
    assert differing(tree(out), unbroken) == []


@pytest.mark.parametrize("lost", ["vocabulary.parquet", "targets.zarr/zarr.json", "targets.zarr/tail_odds/zarr.json"])
def test_a_build_killed_while_it_laid_out_the_directory_continues(
    tmp_path, build_request, run_build, tree, unbroken, lost: str
):
    running = build(plan_build(build_request(tmp_path / "c")))
    next(running)
    running.close()
    (tmp_path / "c" / lost).unlink()  # building.json is there first, the rest follows
    run_build(build_request(tmp_path / "c"))
    assert differing(tree(tmp_path / "c"), unbroken) == []


def killed_tag() -> str:
    """The mark of an earlier process of this very number."""
    return process_tag().rpartition("-")[0] + "-0"


def test_a_kill_between_manifest_and_clean_up_is_cleaned_up_next_time(
    tmp_path, build_request, run_build, tree, unbroken
):
    out = tmp_path / "c"
    run_build(build_request(out))
    (out / "building.json").write_text((out / "manifest.json").read_text())
    left = out / f".staging-{killed_tag()}.0"
    left.mkdir()
    run_build(build_request(out))
    assert differing(tree(out), unbroken) == []
    assert not left.exists()


# several builders


def test_a_shard_that_another_builder_committed_meanwhile_is_not_scored_again(
    tmp_path, build_request, tree, unbroken, monkeypatch
):
    plan = plan_build(build_request(tmp_path / "c"))
    scored, run = [], Teacher.run
    monkeypatch.setattr(Teacher, "run", lambda self, rows, first: scored.append(first) or run(self, rows, first))
    mine = build(plan)
    next(mine)  # scoring shard 0
    other = list(build(plan_build(build_request(tmp_path / "c"))))
    assert not other[-1].complete
    assert list(other[-1].elsewhere) == [0]
    assert str(os.getpid()) in other[-1].elsewhere[0]
    before = len(scored)
    last = list(mine)[-1]
    assert scored[before:] == []
    assert last.complete
    assert (last.rows_done, last.shards_done) == (plan.manifest.rows, len(plan.manifest.shards))
    assert differing(tree(tmp_path / "c"), unbroken) == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_build_that_finds_everything_committed_compares_the_sizes(tmp_path, build_request, run_build, finished: bool):
    out = tmp_path / "c"
    run_build(build_request(out))
    if not finished:  # as after a kill before the manifest was written
        document = load_manifest(out).reopened()
        document.save(out, "building.json")
        (out / "manifest.json").unlink()
    path = out / "targets.zarr" / "gold_rank" / "c.1"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheDamageError, match="another size") as caught:
        run_build(build_request(out))
    assert (caught.value.exit_code, caught.value.details["shard"]) == (3, 1)
    assert "kd cache repair" in str(caught.value.details["try"])
    assert (out / "manifest.json").exists() == finished


def test_a_committed_shard_is_never_overwritten(tmp_path, build_request, run_build, tree):
    """Two machines' bytes differ in the last bits: the commit of one must not stand beside the files of the other."""
    run_build(build_request(tmp_path / "c"))
    before, manifest = tree(tmp_path / "c"), load_manifest(tmp_path / "c")
    shard = shard_store.read_shard(LocalFiles(tmp_path / "c"), manifest, 0)
    rows = pq.read_table(tmp_path / "c" / "examples" / "00000.parquet").to_pylist()
    writer = shard_writer.ShardWriter(tmp_path / "c", manifest)
    assert writer.write(0, {k: np.zeros_like(v) for k, v in shard.arrays.items()}, rows, {})
    writer.close()
    assert differing(tree(tmp_path / "c"), before) == []


def test_a_build_leaves_alone_what_a_live_builder_of_another_host_has_staged(tmp_path, build_request, run_build):
    out = tmp_path / "c"
    names = [".staging-elsewhere-1-77-ab.0/targets.zarr/zarr.json", "commits/.00003.json.elsewhere-1-77-ab.tmp"]
    running = build(plan_build(build_request(out)))
    next(running)
    running.close()
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    run_build(build_request(out))
    assert all((out / name).exists() for name in names)
    assert final(verify(out)) == ()


def test_of_two_builders_that_start_at_once_the_second_accepts_the_first_ones_shards_or_stops(tmp_path, build_request):
    plans = [
        plan_build(build_request(tmp_path / "c", layout=Layout(*rows))) for rows in ((128, 32), (128, 32), (64, 32))
    ]
    next(build(plans[0]))  # the others saw an empty directory
    list(build(plans[1]))
    with pytest.raises(CacheMismatchError, match="laid this directory out differently") as caught:
        list(build(plans[2]))
    assert "--shard-rows" in str(caught.value)
    assert final(verify(tmp_path / "c")) == ()


# failing writers


def test_a_full_disk_stops_the_build_with_its_message_and_can_be_resumed(
    tmp_path, build_request, run_build, tree, unbroken, monkeypatch
):
    request = build_request(tmp_path / "c")
    write, written = shard_writer.ShardWriter.write, []

    def full(self, index, *rest, **ours):
        if index == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(index)
        return write(self, index, *rest, **ours)

    monkeypatch.setattr(shard_writer.ShardWriter, "write", full)
    with pytest.raises(CacheError, match="disk is full") as caught:
        run_build(request)
    assert "run the same command again" in str(caught.value)
    assert written == [0]  # nothing after the failure
    assert [t for t in threading.enumerate() if t.name.startswith("kd-writer")] == []
    monkeypatch.undo()
    run_build(request)
    assert differing(tree(tmp_path / "c"), unbroken) == []


def test_a_failing_writer_is_noticed_before_the_next_shard_is_scored(tmp_path, build_request, monkeypatch):
    def fail(self, index, *rest, **ours):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shard_writer.ShardWriter, "write", fail)
    plan = plan_build(build_request(tmp_path / "c"))
    running = build(plan)
    steps = []
    with pytest.raises(CacheError, match="cannot write"):
        steps.extend(running)
    first_two = sum(rows for _, _, rows in plan.manifest.shards[:2])
    assert steps[-1].rows_done <= first_two
    assert steps[-1].shards_done == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission_is_a_clear_error(tmp_path, build_request, run_build):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CacheError, match="cannot write"):
        run_build(build_request(tmp_path / "locked" / "c"))


def test_an_output_below_a_file_is_a_clear_error(tmp_path, build_request, run_build):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        run_build(build_request(tmp_path / "file" / "c"))


# parts


def test_parts_built_one_after_another_are_the_whole(tmp_path, build_request, run_build, tree, unbroken):
    (first, second) = (run_build(build_request(tmp_path / "c", shard=(i, 2))) for i in (1, 2))
    assert not first[-1].complete
    assert second[-1].complete
    assert differing(tree(tmp_path / "c"), unbroken) == []


def test_parts_planned_at_the_same_time_are_the_whole(tmp_path, build_request, tree, unbroken):
    plans = [plan_build(build_request(tmp_path / "c", shard=(i, 2))) for i in (1, 2)]
    first, second = (list(build(plan)) for plan in plans)  # the second plan saw an empty directory
    assert not first[-1].complete
    assert second[-1].complete
    assert differing(tree(tmp_path / "c"), unbroken) == []


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_a_part_that_does_not_exist_is_refused(tmp_path, build_request, shard):
    with pytest.raises(DataError, match="no such part"):
        plan_build(build_request(tmp_path / "c", shard=shard))


# identity


def fingerprint(request) -> str:
    return plan_build(request).manifest.fingerprint


def test_the_fingerprint_does_not_depend_on_how_the_build_is_run(tmp_path, build_request, model_dir, text_file):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model_dir, elsewhere)
    reference = fingerprint(build_request(tmp_path / "a"))
    same = [
        build_request(tmp_path / "b"),
        build_request(tmp_path / "a", tokens_per_batch=999),
        build_request(tmp_path / "a", layout=Layout(512, 128)),
        build_request(tmp_path / "a", shard=(2, 3)),
        build_request(tmp_path / "a", model=elsewhere),
        build_request(tmp_path / "a", dtype="float32"),
    ]
    assert {fingerprint(request) for request in same} == {reference}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},  # nothing is drawn
        {"band_temperatures": (2.0,)},  # there are no bands
        {"blocks": BlockConfig(32, stride=31)},  # what the default stands for
        {"blocks": BlockConfig(32, separator=" ")},  # documents have none
        {"teacher": "named by another path"},
    ],
)
def test_settings_that_change_no_value_do_not_change_the_fingerprint(tmp_path, build_request, model_dir, change: dict):
    reference = build_request(tmp_path / "a")
    if "teacher" in change:
        (tmp_path / "link").symlink_to(model_dir)
        change = {"teacher": ModelRequest(str(tmp_path / "link"), device="cpu")}
    if set(change) <= {"seed", "band_temperatures"}:
        change = {"targets": dataclasses.replace(reference.targets, **change)}
    assert fingerprint(dataclasses.replace(reference, **change)) == fingerprint(reference)


def test_pairs_have_no_stride_and_always_an_end(tmp_path, build_request):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "The fox", "target": "jumps over."}\n')
    reference = build_request(tmp_path / "a", text=tmp_path / "pairs.jsonl")
    prints = {
        blocks: fingerprint(dataclasses.replace(reference, blocks=blocks))
        for blocks in (
            BlockConfig(32),
            BlockConfig(32, stride=5),
            BlockConfig(32, eos=True),
            BlockConfig(32, separator=" "),
        )
    }
    assert len(set(prints.values())) == 2
    assert prints[BlockConfig(32, separator=" ")] != prints[BlockConfig(32)]


def test_the_bytes_of_a_cache_do_not_depend_on_the_path_of_the_text(
    tmp_path, build_request, run_build, tree, unbroken, text_file
):
    (tmp_path / "moved").mkdir()
    shutil.copy(text_file, tmp_path / "moved" / text_file.name)
    run_build(build_request(tmp_path / "c", text=tmp_path / "moved" / text_file.name))
    assert differing(tree(tmp_path / "c"), unbroken) == []  # the provenance names the last part of the path


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, model_dir: Path, save_model) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model_dir, folder)
    save_model(folder, seed=1)
    return folder


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"top_k": 7}, "targets.top_k"),
        ({"samples": 4, "seed": 1}, "targets.seed"),
        ({"seq_len": 31}, "blocks.seq_len"),
        ({"dtype": "bfloat16"}, "teacher.dtype"),
        ({"temperatures": (1.0, 2.0)}, "targets.temperatures"),
        ({"logprob_codec": "float16"}, "targets.logprob_codec"),
        ({"profile": "sampled"}, "targets.profile"),
    ],
)
def test_a_change_of_settings_is_refused_and_named(cache_kl, build_request, tree, change: dict, key: str):
    before = tree(cache_kl)
    with pytest.raises(CacheMismatchError) as caught:
        plan_build(build_request(cache_kl, **change))
    assert f"differs {key}" in str(caught.value)
    assert fingerprint(build_request(cache_kl.parent / "new", **change)) != load_manifest(cache_kl).fingerprint
    assert differing(tree(cache_kl), before) == []


@pytest.fixture(scope="module")
def cache_kl(tmp_path_factory, build_request, run_build) -> Path:
    out = tmp_path_factory.mktemp("kl") / "c"
    run_build(build_request(out))
    return out


def test_other_weights_are_refused_and_named(cache_kl, build_request, other_model):
    with pytest.raises(CacheMismatchError) as caught:
        plan_build(build_request(cache_kl, model=other_model))
    message = str(caught.value)
    assert "differs teacher.weights.model.safetensors" in message
    assert "tokenizer" not in message


def test_other_text_is_refused_and_named(cache_kl, build_request, text_file, tmp_path):
    (tmp_path / "t.txt").write_text(text_file.read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    with pytest.raises(CacheMismatchError) as caught:
        plan_build(build_request(cache_kl, text=tmp_path / "t.txt"))
    assert "differs corpus.text_digest" in str(caught.value)


def test_another_tokenizer_is_refused_and_named(cache_kl, build_request, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(CacheMismatchError) as caught:
        plan_build(build_request(cache_kl, model=tmp_path / "m"))
    assert "differs tokenizer.fingerprint" in str(caught.value)


def test_an_unfinished_build_refuses_other_settings_too(tmp_path, build_request):
    running = build(plan_build(build_request(tmp_path / "c")))
    next(running)
    running.close()
    with pytest.raises(CacheMismatchError):
        plan_build(build_request(tmp_path / "c", top_k=7))


def test_another_shard_size_is_refused_and_none_takes_that_of_the_cache(cache_kl, build_request):
    with pytest.raises(CacheMismatchError, match="other shard sizes"):
        plan_build(build_request(cache_kl, layout=Layout(512, 64)))
    assert plan_build(build_request(cache_kl, layout=None)).manifest.layout == Layout(128, 32)


def test_a_commit_of_another_cache_does_not_count_as_done(tmp_path, build_request, run_build, monkeypatch):
    run_build(build_request(tmp_path / "a", top_k=7))
    running = build(plan_build(build_request(tmp_path / "b")))
    next(running)
    running.close()
    (tmp_path / "b" / "commits").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "a" / "commits" / "00003.json", tmp_path / "b" / "commits")
    monkeypatch.setattr(
        "kd.cache_builder.build.builder.teacher_of_plan", lambda plan: pytest.fail("scored before it looked")
    )
    with pytest.raises(CacheDamageError, match="does not belong"):
        run_build(build_request(tmp_path / "b"))


# refusals


def test_a_directory_with_other_things_in_it_is_refused(tmp_path, build_request):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("precious")
    with pytest.raises(CacheError, match="not empty and not a cache") as caught:
        plan_build(build_request(tmp_path / "c"))
    assert caught.value.details["found"] == "thesis.tex"


def test_an_empty_directory_is_fine_and_a_file_is_not(tmp_path, build_request):
    (tmp_path / "c").mkdir()
    plan_build(build_request(tmp_path / "c"))
    (tmp_path / "f").write_text("")
    with pytest.raises(CacheError, match="not a directory"):
        plan_build(build_request(tmp_path / "f"))


def test_k_beyond_the_vocabulary_is_refused(tmp_path, build_request):
    plan_build(build_request(tmp_path / "c", top_k=400))
    with pytest.raises(DataError, match="larger than the vocabulary") as caught:
        plan_build(build_request(tmp_path / "c", top_k=401))
    assert caught.value.details["expected"] == "at most 400"


def test_a_sequence_longer_than_the_models_positions_is_refused(tmp_path, build_request):
    plan_build(build_request(tmp_path / "c", seq_len=64))
    with pytest.raises(DataError, match="longer than the teacher's positions") as caught:
        plan_build(build_request(tmp_path / "c", seq_len=65))
    assert caught.value.details["try"] == "--seq-len 64"


def test_an_example_longer_than_a_shard_is_refused(tmp_path, build_request):
    with pytest.raises(DataError, match="more rows than a shard holds"):
        plan_build(build_request(tmp_path / "c", layout=Layout(16, 16)))


def test_a_tokenizer_wider_than_the_model_is_refused(tmp_path, build_request, model_dir, save_model):
    shutil.copytree(model_dir, tmp_path / "m")
    save_model(tmp_path / "m", vocab=399)
    with pytest.raises(DataError, match="fewer logits than its tokenizer has entries"):
        plan_build(build_request(tmp_path / "c", model=tmp_path / "m"))


def test_padded_logit_columns_are_left_out(tmp_path, build_request, run_build, model_dir, save_model):
    shutil.copytree(model_dir, tmp_path / "m")
    save_model(tmp_path / "m", vocab=448)
    request = build_request(tmp_path / "c", model=tmp_path / "m")
    run_build(request)
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.vocabulary_size == 400
    assert max(reader[i].targets.token_ids.max() for i in range(len(reader))) < 400


def test_shards_too_large_to_read_back_are_not_built(tmp_path, build_request):
    with pytest.raises(CacheError, match="too many rows per shard"):
        plan_build(build_request(tmp_path / "c", layout=Layout(2**25, 64)))


def test_nan_logits_stop_the_build_with_the_example(tmp_path, build_request, run_build, model_dir):
    from transformers import GPT2LMHeadModel

    shutil.copytree(model_dir, tmp_path / "m")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    model.transformer.wpe.weight.data[20] = float("nan")  # position 20 exists in long blocks only
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(TeacherError, match="not finite") as caught:
        run_build(build_request(tmp_path / "c", model=tmp_path / "m"))
    assert str(caught.value.details["where"]).startswith("example stories.txt")


def test_random_weights_build_without_any_file(tmp_path, build_request, run_build, tokenizer_dir):
    request = build_request(tmp_path / "c", layout=None)
    teacher = ModelRequest("random:demo-student", device="cpu", tokenizer=str(tokenizer_dir), seed=3)
    request = dataclasses.replace(request, teacher=teacher, blocks=BlockConfig(seq_len=64))
    run_build(request)
    reader = CacheReader(tmp_path / "c")
    assert reader.manifest.vocabulary_size == 2048  # the real width, although the tokenizer has 400 entries
    assert load_manifest(tmp_path / "c").identity["teacher"]["seed"] == 3


# encoder-decoder teachers


@pytest.fixture
def pairs_request(tmp_path, build_request, t5_dir):
    """A build over three pairs, one of them with white space that the tokenizer loses."""
    rows = [
        {"prompt": "The keeper counted\n\nthe ships.", "target": "seven  ships,\nsix bells"},
        {"prompt": "It rained.", "target": "It stopped 🦊 then."},
        {"prompt": "", "target": "fog"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(**change):
        made = build_request(tmp_path / "t5-cache", model=t5_dir, text=tmp_path / "pairs.jsonl", layout=None)
        return dataclasses.replace(made, **change)

    return make


def test_an_encoder_decoder_cache_holds_one_row_per_target_token_and_the_end(pairs_request, run_build, t5_dir):
    run_build(pairs_request())
    reader = CacheReader(pairs_request().out)
    tokenizer = load_tokenizer(str(t5_dir))
    for number in range(3):
        example = reader[number]
        ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        assert list(example.targets.gold_ids) == [*ids, 1]
        assert list(example.context_ids) == [*tokenizer(example.prompt, add_special_tokens=False)["input_ids"], 1]
        assert example.targets.token_ids.max() < len(tokenizer)
    assert reader.manifest.vocabulary_size == len(tokenizer) < 320  # the logits are wider
    assert reader.manifest.identity["tokenizer"]["eos_token_id"] == 1
    assert reader.manifest.blocks.encoder
    assert final(verify(pairs_request().out)) == ()


def test_byte_ends_follow_the_text_as_it_was_written(pairs_request, run_build):
    run_build(pairs_request())
    example = CacheReader(pairs_request().out)[0]
    data, ends = example.target.encode(), example.targets.byte_end
    words = [(0, 5), (7, 13), (14, 17), (18, 23)]  # `seven  ships,\nsix bells`
    assert {end for _, end in words} <= set(ends.tolist())
    assert ends[-1] == ends[-2] == len(data)  # the end token takes no bytes
    assert (np.diff(ends) >= 0).all()


def test_an_encoder_decoder_teacher_resumes_to_the_same_bytes(pairs_request, run_build, tree):
    run_build(pairs_request(layout=Layout(16, 16)))
    whole = tree(pairs_request().out)
    shutil.rmtree(pairs_request().out)
    running = build(plan_build(pairs_request(layout=Layout(16, 16))))
    next(running)
    running.close()
    run_build(pairs_request(layout=Layout(16, 16)))
    assert differing(tree(pairs_request().out), whole) == []


def test_documents_for_an_encoder_decoder_are_refused(tmp_path, build_request, t5_dir):
    with pytest.raises(DataError, match="needs a prompt"):
        plan_build(build_request(tmp_path / "c", model=t5_dir))


def test_what_was_dropped_as_too_long_is_on_record(pairs_request):
    request = pairs_request()
    blocks = dataclasses.replace(request.blocks, target_len=5, overlong="drop")
    plan = plan_build(dataclasses.replace(request, blocks=blocks))
    assert plan.left_out.counts == {"without_prompt": 1, "too_long": 2}
    assert plan.manifest.provenance["left_out"] == plan.left_out.document()
    with pytest.raises(DataError, match="no example is left"):
        plan_build(dataclasses.replace(request, blocks=dataclasses.replace(blocks, target_len=1)))


# a teacher that is refused


def refuse(plan: object) -> None:
    raise TeacherError("this teacher is refused")


def test_a_refused_teacher_leaves_the_folder_free_for_the_corrected_command(
    tmp_path: Path, build_request, run_build, monkeypatch: pytest.MonkeyPatch
):
    request = build_request(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("kd.cache_builder.build.builder.teacher_of_plan", refuse)
        with pytest.raises(TeacherError):
            run_build(request)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    run_build(build_request(tmp_path / "c", profile="uld", tail_bands=4))  # another cache
    assert load_manifest(tmp_path / "c").complete


def test_a_refused_teacher_takes_nothing_from_a_build_under_way(
    tmp_path: Path, build_request, tree, monkeypatch: pytest.MonkeyPatch
):
    """Where a shard was committed, or another builder has one in hand, everything stays."""
    from kd.cache_builder.store.writers.claims import Claims

    out = tmp_path / "c"
    steps = build(plan_build(build_request(out)))
    while next(steps).shards_done < 1:
        pass
    steps.close()
    before = tree(out)
    monkeypatch.setattr("kd.cache_builder.build.builder.teacher_of_plan", refuse)
    with pytest.raises(TeacherError):
        list(build(plan_build(build_request(out))))
    assert tree(out) == before
    held = tmp_path / "held"
    plan = plan_build(build_request(held))
    writer = shard_writer.ShardWriter(held, plan.manifest)
    writer.create(plan.vocabulary, plan.codes, lengths_of(plan.rows))
    claims = Claims(held)
    assert claims.take(1) is None
    writer.withdraw()
    assert (held / "building.json").exists()
    claims.release_all()
    writer.withdraw()
    assert not (held / "building.json").exists()
