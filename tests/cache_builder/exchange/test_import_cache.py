"""An imported cache holds the rows of its source, and is then a cache like any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from terminal import kd, run_kd

from kd.cache_builder.exchange.export_cache import export_cache
from kd.cache_builder.exchange.import_cache import import_cache, import_steps
from kd.cache_builder.exchange.import_settings import FORMAT_NAMES, ImportSettings
from kd.cache_builder.exchange.source_formats import FORMATS
from kd.cache_builder.share.dataset_card import dataset_card
from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheError, CacheMismatchError, DataError
from kd.common.progress import final
from kd.common.settings import make
from kd.evaluation.measures.agreement import evaluate_agreement
from kd.student_trainer.training import train

from .conftest import GOLD, TEXT

ROWS = ("gold_ids", "token_ids", "logprobs", "tail_mass", "gold_logprob", "gold_rank", "byte_end")
IDS = ("input_ids", "token_ids")
EXACT = {"logprob_codec": "float32", "shard_rows": 128}


@pytest.fixture
def imported(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., CacheReader]:
    """`imported(source, out="imported", …)`: the source as a cache, with exact log-probabilities."""

    def run(source: Path, out: str = "imported", format: str = "npz", **settings: Any) -> CacheReader:
        chosen: dict[str, Any] = {"out": tmp_path / out, "tokenizer": str(tokenizer_dir)} | EXACT | settings
        return import_cache(format, source, **chosen)

    return run


def every(reader: CacheReader) -> dict[str, np.ndarray]:
    targets = [e.targets for e in reader.read(range(len(reader)))]
    return {name: np.concatenate([getattr(t, name) for t in targets]) for name in ROWS}


def assert_same_rows(found: CacheReader, expected: CacheReader) -> None:
    ours, theirs = every(found), every(expected)
    for name in ROWS:  # a row's float32 numbers are taken relative to its first, and normalised again
        atol = 1e-6 if name in ("logprobs", "tail_mass") else 0
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)
    for a, b in zip(found.read(range(len(found))), expected.read(range(len(expected))), strict=True):
        assert (a.id, a.prompt, a.target) == (b.id, b.prompt, b.target)
        np.testing.assert_array_equal(a.context_ids, b.context_ids)


def test_names_of_formats_are_those_of_the_registry() -> None:
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_what_was_exported_comes_back_as_the_same_rows(original, exported, imported) -> None:
    reader = imported(exported)
    assert_same_rows(reader, CacheReader(original))
    assert final(verify(reader.root)) == ()
    assert len(reader.manifest.shards) > 2


def test_arrays_worked_out_by_hand_give_the_rows_of_the_cache(original, write, imported) -> None:
    assert_same_rows(imported(write()), CacheReader(original))


def test_every_codec_comes_back_to_the_bit(tmp_path, imported, build_request, run_build) -> None:
    for codec in ("graded", "graded-coarse", "float16"):
        run_build(build_request(tmp_path / codec, temperatures=(1.0,), logprob_codec=codec))
        export_cache("npz", tmp_path / codec, out=tmp_path / f"{codec}-arrays")
        reader = imported(tmp_path / f"{codec}-arrays", f"{codec}-again", logprob_codec=codec)
        ours, theirs = every(reader), every(CacheReader(tmp_path / codec))
        for name in set(ROWS) - {"logprobs", "tail_mass"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        # the same places of the scale; the odds of the tail are float16 of a float32 sum: 2^-11 of a few nats
        np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=5e-3)


def test_rows_that_differ_in_length_come_back(tmp_path, imported, build_request, run_build) -> None:
    run_build(build_request(tmp_path / "a", profile="adaptive", top_k=32, temperatures=(1.0,), logprob_codec="float32"))
    export_cache("npz", tmp_path / "a", out=tmp_path / "arrays")
    reader = imported(tmp_path / "arrays", profile="adaptive")
    ours, theirs = every(reader), every(CacheReader(tmp_path / "a"))
    for name in ("token_ids", "gold_ids", "gold_rank", "byte_end"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=1e-6)  # float32
    assert final(verify(reader.root)) == ()
    narrow = imported(tmp_path / "arrays", "narrow")
    kept = np.concatenate([e.targets.kept for e in CacheReader(tmp_path / "a").read(range(len(reader)))])
    assert narrow.config.top_k == kept.min() < kept.max()
    assert narrow.manifest.provenance["imported"]["tokens_in_the_tail"] == (kept - kept.min()).sum()


def test_fewer_tokens_per_row_put_the_others_into_the_tail(original, write, imported) -> None:
    ours = every(imported(write(), top_k=3))
    theirs = every(CacheReader(original))
    np.testing.assert_array_equal(ours["token_ids"], theirs["token_ids"][:, :3])
    expected = 1 - np.exp(theirs["logprobs"][:, :3].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(ours["tail_mass"][:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(ours["gold_logprob"], theirs["gold_logprob"])


def test_the_order_of_tokens_in_a_row_does_not_matter(original, arrays, write, imported) -> None:
    order = np.random.default_rng(0).permutation(8)
    path = write(token_ids=arrays["token_ids"][:, order], logprobs=arrays["logprobs"][:, order])
    np.testing.assert_array_equal(every(imported(path))["token_ids"], every(CacheReader(original))["token_ids"])


def test_text_that_the_source_lacks_is_spelled_from_its_ids(original, write, imported) -> None:
    reader = imported(write(without=TEXT))
    assert_same_rows(reader, CacheReader(original))
    assert any("spelled" in line for line in reader.manifest.provenance["imported"]["unknown"])


def test_training_from_an_imported_cache_is_training_from_the_original(
    build_request, run_build, imported, tmp_path, save_student
) -> None:
    """With the codec of the original, the stored numbers are the same, and so is every weight."""
    run_build(build_request(tmp_path / "original", temperatures=(1.0,)))
    export_cache("npz", tmp_path / "original", out=tmp_path / "arrays")
    student = save_student(tmp_path / "student")
    weights = []
    for cache in (tmp_path / "original", imported(tmp_path / "arrays", logprob_codec="graded").root):
        out = tmp_path / f"run-{len(weights)}"
        train(cache=cache, student=str(student), out=out, max_steps=6, batch_size=4, seed=3, device="cpu")
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_killed_import_continues_to_the_same_bytes(exported, imported, tmp_path, tokenizer_dir, tree) -> None:
    whole = imported(exported, "whole").root
    chosen = make(ImportSettings, {"out": tmp_path / "cut", "tokenizer": str(tokenizer_dir)} | EXACT)
    steps = import_steps("npz", exported, chosen)
    for _ in range(3):
        next(steps)
    steps.close()
    done = len(list((tmp_path / "cut" / "commits").iterdir()))
    assert 0 < done < len(load_manifest(whole).shards)
    imported(exported, "cut")
    assert tree(tmp_path / "cut") == tree(whole)


def test_a_source_that_changes_is_another_cache(write, arrays, imported) -> None:
    first = imported(write()).manifest.fingerprint
    path = write(logprobs=arrays["logprobs"] - np.float32(1e-3))
    with pytest.raises(CacheMismatchError, match="made from something else"):
        imported(path)
    assert imported(path, "other").manifest.fingerprint != first


def test_an_imported_cache_is_sliced_pushed_pulled_and_read_from_a_url(exported, imported, tmp_path) -> None:
    reader = imported(exported)
    for _ in slice_cache(reader.root, tmp_path / "slice", top_k=2):
        pass
    final(push(reader.root, (tmp_path / "shared").as_uri()))
    final(pull((tmp_path / "shared").as_uri(), tmp_path / "copy"))
    for root in (tmp_path / "slice", tmp_path / "copy"):
        assert final(verify(root)) == ()
    assert "could not be digested" in dataset_card(reader.root, "hf://datasets/somebody/cache")
    assert_same_rows(CacheReader(tmp_path / "copy"), reader)


def test_the_manifest_names_what_the_source_could_not_say(exported, write, imported) -> None:
    manifest = imported(exported, teacher="Qwen3-8B", teacher_id="abc").manifest
    teacher = manifest.identity["teacher"]
    assert (teacher["model"], teacher["id"], teacher["weights"]) == ("Qwen3-8B", "abc", "unknown")
    assert manifest.logprobs_only
    assert not manifest.gold_in_top_k
    assert not manifest.tail_unknown
    assert "name of the teacher" not in manifest.provenance["imported"]["unknown"]
    less = imported(write(without=GOLD), "less").manifest
    assert less.gold_in_top_k
    assert less.identity["teacher"]["ranks"] == "top-k"


def test_losses_that_need_every_token_are_refused_where_the_source_says_those_of_the_rows_alone(
    write, imported, tmp_path, save_student, original
) -> None:
    reader = imported(write(without=GOLD))
    known = np.isfinite(every(reader)["gold_logprob"])
    listed = (every(reader)["token_ids"] == every(reader)["gold_ids"][:, None]).any(axis=1)
    exact = every(CacheReader(original))["gold_logprob"]
    np.testing.assert_allclose(every(reader)["gold_logprob"][listed], exact[listed], atol=2e-2)  # float16
    assert known.all()
    assert (every(reader)["gold_logprob"][~listed] >= exact[~listed] - 2e-2).all()
    settings: dict[str, Any] = {"student": str(save_student(tmp_path / "s")), "out": tmp_path / "run", "max_steps": 1}
    with pytest.raises(DataError, match="cannot serve --loss uld"):
        train(cache=reader.root, loss="uld", **settings)
    with pytest.raises(CacheError, match="cannot be compared"):
        list(evaluate_agreement(None, reader))
    train(cache=reader.root, loss="kl", **settings)


def test_values_without_their_normaliser_serve_kl_over_the_kept_tokens_alone(
    arrays, write, imported, tmp_path, save_student
) -> None:
    values = arrays["logprobs"].astype(np.float64)
    kept = (values - np.log(np.exp(values).sum(axis=1, keepdims=True))).astype(np.float32)
    for number, changed in enumerate((kept, (values + 7.5).astype(np.float32))):  # renormalised; logits
        path = write(without=GOLD, logprobs=changed)
        with pytest.raises(DataError, match="renormalised" if number == 0 else "as logits would"):
            imported(path, "refused")
        assert not (tmp_path / "refused").exists()
        reader = imported(path, f"unknown-{number}", tail="unknown")
        np.testing.assert_allclose(every(reader)["logprobs"], kept, atol=2e-6)  # float32 of values around 10
    settings: dict[str, Any] = {"student": str(save_student(tmp_path / "s")), "out": tmp_path / "run", "max_steps": 1}
    with pytest.raises(DataError, match="cannot serve --loss kl --tail ghost"):
        train(cache=reader.root, **settings)
    train(cache=reader.root, tail="renorm", **settings)
    with pytest.raises(CacheError, match="cannot be exported"):
        export_cache("npz", reader.root, out=tmp_path / "again")


def test_a_shift_and_another_tokenizer_are_found_and_can_be_insisted_on(tmp_path, imported, tokenizer_dir) -> None:
    """A trained teacher is needed: the tokens that a random one finds probable have nothing to do with those that follow."""
    kd("cache", "build", "--teacher", "demo", "--data", "demo", "--limit", 1, "--top-k", 8, "--out", tmp_path / "demo")
    export_cache("npz", tmp_path / "demo", out=tmp_path / "arrays")
    demo: dict[str, Any] = {"tokenizer": "demo", "shard_rows": 512}
    arrays = dict(np.load(tmp_path / "arrays" / "data-00000.npz"))
    for shift in (1, -1):
        moved = arrays | {name: np.roll(arrays[name], shift, axis=0) for name in ("token_ids", "logprobs")}
        np.savez(tmp_path / "moved.npz", **moved)
        with pytest.raises(DataError, match="contradicts its row"):
            imported(tmp_path / "moved.npz", **demo)
        np.savez(tmp_path / "moved.npz", **{name: a for name, a in moved.items() if name not in GOLD})
        with pytest.raises(DataError, match="shifted by one token"):
            imported(tmp_path / "moved.npz", **demo)
        imported(tmp_path / "moved.npz", f"insisted{shift}", **demo, check_source=False)
    mixed = np.random.default_rng(0).permutation(1500)
    renumbered = arrays | {
        name: np.where(arrays[name] < 1500, mixed[arrays[name] % 1500], arrays[name]) for name in IDS
    }
    np.savez(tmp_path / "renumbered.npz", **renumbered)
    with pytest.raises(DataError, match="another tokenizer"):
        imported(tmp_path / "renumbered.npz", **demo)
    with pytest.raises(DataError, match="an id that the tokenizer does not have"):
        imported(tmp_path / "arrays", shard_rows=512, tokenizer=str(tokenizer_dir))


def test_the_command_takes_a_file_of_settings_and_says_what_it_wrote(exported, tmp_path, tokenizer_dir) -> None:
    config = tmp_path / "import.yaml"
    config.write_text(
        yaml.safe_dump({"tokenizer": str(tokenizer_dir), "teacher": "tiny", "top_k": 4}), encoding="utf-8"
    )
    said = kd("cache", "import", "npz", exported, "--config", config, "--out", tmp_path / "c")
    assert "complete" in said
    assert "weights of the teacher" in said
    assert "sound" in kd("cache", "verify", tmp_path / "c")
    assert load_manifest(tmp_path / "c").targets.top_k == 4


def test_repair_says_how_an_imported_cache_is_written_again(exported, imported, tmp_path) -> None:
    root = imported(exported).root
    sound = shutil.copytree(root, tmp_path / "sound")
    victim = next((root / "targets.zarr" / "token_ids").glob("c.1*"))
    victim = victim if victim.is_file() else next(p for p in victim.rglob("*") if p.is_file())
    victim.write_bytes(b"")
    with pytest.raises(CacheError) as raised:
        run_kd("cache", "repair", root)
    assert "kd cache import" in str(raised.value)
    imported(exported)
    assert final(verify(root)) == final(verify(sound)) == ()
