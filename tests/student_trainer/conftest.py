"""Students of the tiny teacher, caches of its stories, and short runs."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.settings import make
from kd.data.tokenizing.block_config import BlockConfig
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.midway import Midway
from kd.student_trainer.run_folder import StepRecord
from kd.student_trainer.training import TrainResult, train


@pytest.fixture(scope="session")
def make_student(tmp_path_factory: pytest.TempPathFactory, save_student) -> Callable[..., Path]:
    """`make_student(…)`: a folder with a random GPT-2 of 2 layers, d=32, and the teacher's tokenizer."""

    def make(*, seed: int = 1, dropout: float = 0.0, tied: bool = True, vocab: int = 400, positions: int = 64) -> Path:
        return save_student(
            tmp_path_factory.mktemp("student"),
            seed=seed,
            dropout=dropout,
            tie_word_embeddings=tied,
            vocab_size=vocab,
            n_positions=positions,
        )

    return make


@pytest.fixture(scope="session")
def student_dir(make_student: Callable[..., Path]) -> Path:
    """A student without dropout."""
    return make_student()


@pytest.fixture(scope="session")
def kl_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """8 tokens a row in the default codec, in several shards."""
    out = tmp_path_factory.mktemp("caches") / "kl"
    run_build(build_request(out))
    return out


@pytest.fixture(scope="session")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """8 tokens a row as float32."""
    out = tmp_path_factory.mktemp("caches") / "exact"
    run_build(build_request(out, logprob_codec="float32"))
    return out


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and targets of many lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = [
        {"prompt": "one two three four five"[:end], "target": "six seven eight nine ten"[: 2 * end]}
        for end in range(3, 24, 2)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="session")
def pairs_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, pairs_file: Path) -> Path:
    """Contexts of more than one token, whose tokens are not scored."""
    out = tmp_path_factory.mktemp("caches") / "pairs"
    run_build(build_request(out, text=pairs_file, seq_len=64))
    return out


@pytest.fixture(scope="session")
def pairs_reader(pairs_cache: Path) -> CacheReader:
    return CacheReader(pairs_cache)


@pytest.fixture(scope="session")
def story_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and targets of 1 to 20 words, one of them in characters that no tokenizer here has pieces for."""
    path = tmp_path_factory.mktemp("story") / "pairs.jsonl"
    story = "the fox met the keeper at the bridge and told him a long story about seven ships in the fog"
    words = story.split(" ")
    pairs = [
        {"prompt": "Tell the story of " + " ".join(words[:n]), "target": " ".join(words[: n + 1]) + ("\n" * (n % 3))}
        for n in range(1, 19)
    ]
    pairs[3]["target"] = "Café crème — “too much” 日本語 😀"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="session")
def t5_cache(
    tmp_path_factory: pytest.TempPathFactory, build_request, run_build, t5_dir: Path, story_pairs: Path
) -> Path:
    """A teacher with an encoder and another tokenizer."""
    out = tmp_path_factory.mktemp("t5-cache") / "cache"
    request = build_request(
        out,
        model=t5_dir,
        text=story_pairs,
        profile="full",
        top_k=16,
        samples=0,
        tail_bands=8,
        temperatures=(1.0, 2.0),
        band_temperatures=(1.0, 2.0),
    )
    run_build(replace(request, blocks=BlockConfig(seq_len=64, encoder=True)))
    return out


@pytest.fixture(scope="session")
def t5_exact_cache(
    tmp_path_factory: pytest.TempPathFactory, build_request, run_build, t5_dir: Path, story_pairs: Path
) -> Path:
    """Every probability of the teacher with an encoder, in float32."""
    out = tmp_path_factory.mktemp("t5-exact") / "cache"
    request = build_request(
        out, model=t5_dir, text=story_pairs, profile="full", top_k=180, samples=4, tail_bands=1, logprob_codec="float32"
    )
    run_build(replace(request, blocks=BlockConfig(seq_len=64, encoder=True)))
    return out


@pytest.fixture(scope="session")
def kl_reader(kl_cache: Path) -> CacheReader:
    return CacheReader(kl_cache)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    out: Path
    result: TrainResult
    records: list[StepRecord]
    said: list[str]
    """What the run told its user."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.out / "model.safetensors")


@pytest.fixture(scope="session")
def small_heap(student_dir: Path) -> Iterator[None]:
    """Each run of the Trainer collects garbage, 0.3 s for the objects of all imported libraries: set those aside."""
    import peft  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(tmp_path: Path, kl_cache: Path, student_dir: Path, small_heap: None) -> Callable[..., Run]:
    """`run(name, …)`: train in `tmp_path / name`, four examples a batch, every step logged.

    stop_after   interrupted at the line of that step; asked_at: asked to stop, by then
    """

    def go(
        name: str = "run",
        *,
        resume: bool = False,
        stop_after: int | None = None,
        midway: Midway | None = None,
        asked_at: int | None = None,
        **settings: Any,
    ) -> Run:
        defaults: dict[str, Any] = {
            "cache": str(kl_cache),
            "student": str(student_dir),
            "out": str(tmp_path / name),
            "device": "cpu",
            "max_steps": 3,
            "batch_size": 4,
            "log_every": 1,
            "lr": 1e-3,
            "head_chunk": 64,
        }
        records: list[StepRecord] = []
        said: list[str] = []
        asked = threading.Event()

        def on_step(record: StepRecord) -> None:
            records.append(record)
            if record.step == stop_after:
                raise KeyboardInterrupt
            if record.step == asked_at:
                asked.set()

        result = train(
            make(TrainConfig, defaults | settings),
            resume=resume,
            on_step=on_step,
            midway=midway,
            stoppable=nullcontext(asked),
            say=said.append,
        )
        return Run(tmp_path / name, result, records, said)

    return go
