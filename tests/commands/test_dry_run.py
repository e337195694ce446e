"""`--dry-run` says what a command would write, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from terminal import kd, run_main

from kd.cache_builder.share.push import planned_push
from kd.common.errors import CacheError, CacheMismatchError
from kd.student_trainer.training_estimate import plan_training

TEXT = (
    "Once upon a time there was a fox. It ran to the river and looked at the fish.\n\nThe keeper counted seven ships.\n"
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A build of some rows, less its folder."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT * 8, encoding="utf-8")
    settings = ("--seq-len", "32", "--shard-rows", "128", "--no-reuse", "--json")
    return "cache", "build", "--teacher", "demo", "--data", str(text), *settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, build: tuple[str, ...]) -> Path:
    out = tmp_path_factory.mktemp("built") / "cache"
    kd(*build, "--out", out)
    return out


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def data_of(cache: Path) -> int:
    """Bytes of the arrays' chunks."""
    return sum(path.stat().st_size for path in files_of(cache) if path.name.startswith("c."))


def test_a_build_is_no_larger_than_said(build, cache: Path, tmp_path: Path) -> None:
    said = json.loads(kd(*build, "--out", tmp_path / "out", "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    assert len(files_of(cache)) <= said["files_at_most"] < 1.5 * len(files_of(cache))
    assert 0 < data_of(cache) <= said["bytes_at_most"]
    assert said["fingerprint"] == json.loads((cache / "manifest.json").read_text())["fingerprint"]


def test_a_build_into_another_cache_is_refused_as_the_build_is(build, cache: Path, tmp_path: Path) -> None:
    done = run_main(*build, "--profile", "compact", "--out", cache, "--dry-run", code=1)
    assert "made from something else" in done.stderr


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_copy_moves_what_was_said(cache: Path, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "copy"
    said = json.loads(kd("cache", command, cache, copy, "--dry-run", "--json"))
    assert not copy.exists()
    kd("cache", command, cache, copy)
    assert (said["files"], said["bytes"]) == (len(files_of(copy)), size_of(copy))
    (copy / "commits" / "00000.json").unlink()
    (copy / "manifest.json").unlink()
    again = json.loads(kd("cache", command, cache, copy, "--dry-run", "--json"))
    assert again["files"] == 2
    assert again["files"] + again["files_there"] == said["files"]


def test_a_part_is_as_large_as_said(cache: Path, tmp_path: Path) -> None:
    words = ("cache", "pull", cache, tmp_path / "part", "--for", "ce", "--json")
    said = json.loads(kd(*words, "--dry-run"))
    kd(*words)
    held = [path for path in files_of(tmp_path / "part") if path.name != "partial.json"]
    assert (said["files"], said["bytes"]) == (len(held), sum(path.stat().st_size for path in held))


def test_a_push_that_would_be_refused_is_refused(build, cache: Path, tmp_path: Path) -> None:
    kd(*build, "--out", tmp_path / "other", "--profile", "compact")
    with pytest.raises(CacheMismatchError):
        planned_push(cache, str(tmp_path / "other"))
    with pytest.raises(CacheError, match="only be read"):
        planned_push(cache, "http://127.0.0.1:9/cache")


def test_a_training_writes_as_much_as_said(cache: Path, tmp_path: Path) -> None:
    words = ("train", "--cache", cache, "--student", "demo", "--batch-size", "4", "--json", "--out", tmp_path / "run")
    said = json.loads(kd(*words, "--dry-run", "--save-every", "1"))
    assert list(tmp_path.iterdir()) == []
    done = json.loads(kd(*words, "--save-every", "1"))
    assert (said["steps"], said["parameters"]) == (done["steps"], done["parameters"])
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert said["weights_bytes"] == pytest.approx(weights, rel=0.02)  # the header
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) <= said["checkpoints_at_once"]
    assert all(size_of(path) < 1.2 * said["checkpoint_bytes_at_most"] for path in checkpoints)
    assert "holds a run already" in run_main(*words, "--dry-run", code=1).stderr


@pytest.mark.parametrize("command", ["slice", "merge", "import"])
def test_what_is_made_of_other_caches_is_no_larger_than_said(build, cache: Path, tmp_path: Path, command: str) -> None:
    if command == "slice":
        words: tuple[object, ...] = ("cache", "slice", cache, "--top-k", "8", "--examples", "1:5")
    elif command == "import":
        kd("cache", "export", "npz", cache, "--out", tmp_path / "arrays")
        words = ("cache", "import", "npz", tmp_path / "arrays", "--tokenizer", "demo")
    else:
        text = tmp_path / "more.txt"
        text.write_text("A keeper of ships went down to the river.\n" * 20, encoding="utf-8")
        kd(*build, "--data", text, "--out", tmp_path / "more")
        words = ("cache", "merge", cache, tmp_path / "more")
    out = tmp_path / "out"
    said = json.loads(kd(*words, "--out", out, "--dry-run", "--json"))
    assert not out.exists()
    kd(*words, "--out", out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (said["fingerprint"], said["examples"], said["rows"]) == tuple(
        manifest[name] for name in ("fingerprint", "examples", "rows")
    )
    assert 0 < data_of(out) <= said["bytes_at_most"]
    assert json.loads(kd(*words, "--out", out, "--dry-run", "--json"))["committed_shards"] == said["shards"]


def test_a_slice_that_would_be_refused_is_refused(cache: Path, tmp_path: Path) -> None:
    done = run_main("cache", "slice", cache, "--out", tmp_path / "out", "--top-k", "999", "--dry-run", code=1)
    assert "no more tokens per row than the cache" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_as_large_as_said(gpt2_pool, tmp_path: Path) -> None:
    pool = Path(gpt2_pool.models[0].path).parent / "pool.yaml"
    words = ("merge", "--method", "task-arithmetic", "--pool", pool, "--no-score", "--json", "--out", tmp_path / "out")
    said = json.loads(kd(*words, "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    done = json.loads(kd(*words))
    assert (said["models"], said["parameters"]) == (done["models"], done["parameters"])
    weights = tmp_path / "out" / "model.safetensors"
    assert said["weights_bytes"] <= weights.stat().st_size < said["weights_bytes"] + 10_000  # the header
    assert "not empty" in run_main(*words, "--dry-run", code=1).stderr


def test_python_plans_the_training_that_the_command_plans(cache: Path, tmp_path: Path) -> None:
    words = ("train", "--cache", cache, "--student", "demo", "--batch-size", "4", "--out", tmp_path / "run")
    said = json.loads(kd(*words, "--dry-run", "--json"))
    assert plan_training(cache=cache, student="demo", batch_size=4, out=tmp_path / "run") == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_an_export_is_no_larger_than_said(cache: Path, tmp_path: Path, format: str) -> None:
    words = ("cache", "export", format, cache, "--out", tmp_path / "out")
    said = json.loads(kd(*words, "--dry-run", "--json"))
    assert list(tmp_path.iterdir()) == []
    assert json.loads(kd(*words, "--json"))["files"] == sorted(path.name for path in files_of(tmp_path / "out"))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert (said["examples"], said["rows"]) == (manifest["examples"], manifest["rows"])
    assert said["files"] == len(files_of(tmp_path / "out"))
    assert (
        said["bytes_at_most"] / 4 < size_of(tmp_path / "out") <= said["bytes_at_most"] + 10_000 * said["files"]
    )  # heads
    assert "not empty" in run_main(*words, "--dry-run", code=1).stderr


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_classifier_is_as_large_as_said(
    layouts: dict[str, Path], glue_root: Path, tmp_path: Path, accumulate: int
) -> None:
    rows = ("--data", glue_root / "mnli", "--limit", "20", "--max-length", "64", "--device", "cpu", "--json")
    steps = ("--batch-size", "3", "--accumulate", accumulate, "--epochs", "1.5", "--out", tmp_path / "run")
    words = ("classify", "train", "--model", layouts["llama"], *rows, *steps)
    said = json.loads(kd(*words, "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    done = json.loads(kd(*words))
    for name in ("task", "rows", "classes", "steps", "parameters", "out"):
        assert said[name] == done[name], name
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert said["weights_bytes"] <= weights < said["weights_bytes"] + 10_000  # the header
    assert "not empty" in run_main(*words, "--dry-run", code=1).stderr
