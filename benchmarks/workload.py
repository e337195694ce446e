"""What `peers.py` and `growth.py` give to everyone alike: texts of an exact length, models of a chosen size, a meter; and
what `bench.py` and `merging.py` measure memory with.

At import it needs neither kd nor torch, so that a peer's own interpreter can use it: what is shared lies in a folder
as `teacher/` and `student/` (what `save_pretrained` writes) and `texts.jsonl` (prompt, target, `input_ids`).
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DEMO_VOCABULARY = 2048
PROMPT_TOKENS = 1
"""Every method scores all other tokens of an example, EOS included."""
POSITIONS = 1024
"""Of every model; no text is longer."""


class Meter:
    """CPU seconds of the process, all threads, between `start` and `stop`; memory above what is resident when made."""

    def __init__(self) -> None:
        self.base = status_mb("VmRSS")
        self.spent: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        self._started = time.process_time()

    def stop(self) -> None:
        self.spent.append(time.process_time() - self._started)

    def result(self, tokens: int, **rest: float) -> dict[str, float]:
        """`tokens` went through between each start and its stop. `us`: CPU microseconds per token, the median."""
        return {
            "us": 1e6 * statistics.median(self.spent) / tokens,
            "peak_mb": status_mb("VmHWM") - self.base,
            **rest,
        }


class Memory:
    """Highest resident memory while it runs, in MB (2^20 bytes), above what is resident when made; mapped files count."""

    def __init__(self) -> None:
        self.base = self.peak = resident_mb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident_mb())

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return self.peak - self.base


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def status_mb(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB (2^20 bytes). `ru_maxrss` would also count the parent at the fork."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def one_thread() -> dict[str, str]:
    """Environment of a case: one thread, no network, no chatter."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return os.environ | quiet


def make_model(folder: Path, vocabulary: int, width: int, layers: int, *, seed: int = 0) -> None:
    """A random GPT-2 with the embedded tokenizer, which gets unused entries until it has as many as there are logits."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kd.models.tokenizer import load_tokenizer

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer("demo").save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    entries = tokenizer["model"]["vocab"]
    entries |= {f"unused{i}": i for i in range(len(entries), vocabulary)}
    path.write_text(json.dumps(tokenizer))


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def make_texts(path: Path, count: int, length: int) -> None:
    """`count` texts from the embedded corpus of exactly `length` tokens each, EOS included, so that no batch is padded."""
    with path.open("w", encoding="utf-8") as file:
        for number, (prompt, target, ids) in zip(range(count), _windows(length), strict=False):
            row = {"id": f"{number}", "prompt": prompt, "target": target, "input_ids": ids}
            file.write(json.dumps(row) + "\n")


def _windows(length: int) -> Iterator[tuple[str, str, list[int]]]:
    from kd.data.sources import load_corpus
    from kd.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("demo")
    tokenizer.model_max_length = 10**9  # whole documents, without a warning

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    while True:  # a corpus shorter than asked for begins again
        for document in load_corpus("demo").examples:
            ids = encode(document.target)
            for first in range(0, len(ids) - length, length):
                here = ids[first : first + length - 1]
                prompt, target = tokenizer.decode(here[:PROMPT_TOKENS]), tokenizer.decode(here[PROMPT_TOKENS:])
                whole = encode(prompt + target) == here and encode(prompt) + encode(target) == here
                if whole and prompt.strip() and target.strip():  # cut elsewhere, the text has other tokens
                    yield prompt, target, [*here, tokenizer.eos_token_id]


def read_texts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batches_of(path: Path, size: int) -> list[list[list[int]]]:
    """The token ids of the texts, in their order; whole batches."""
    ids = [t["input_ids"] for t in read_texts(path)]
    return [ids[n : n + size] for n in range(0, len(ids) - size + 1, size)]


def build_cache(
    model_folder: Path | str,
    texts: Path,
    out: Path,
    *,
    batch_tokens: int,
    profile: str = "kl",
    top_k: int | None = None,
    shard_rows: int | None = None,
    shard: tuple[int, int] = (1, 1),
    model: Any = None,
) -> tuple[Any, Any]:
    """The plan of a cache of `texts`, and the build's iterator, not yet begun."""
    from kd.cache_builder.build.builder import build
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.build.request import BuildRequest
    from kd.cache_builder.store.records.manifest import Layout
    from kd.cache_builder.store.targets import TargetConfig
    from kd.data.sources import load_corpus
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.models.model_request import ModelRequest

    length = len(read_texts(texts)[0]["input_ids"])
    request = BuildRequest(
        out,
        ModelRequest(str(model_folder), device="cpu"),
        load_corpus(str(texts)),
        BlockConfig(length, bos=False, separator=""),
        TargetConfig.of_profile(profile, top_k=top_k),
        tokens_per_batch=batch_tokens,
        shard=shard,
        model=model,
        layout=None if shard_rows is None else Layout(shard_rows, shard_rows),
    )
    plan = plan_build(request)
    return plan, build(plan)


class CachedStudent:
    """A student of `folder` that learns from `cache` with one of our losses: what `kd.student_trainer.training` sets up."""

    def __init__(self, folder: Path, cache: Path, loss: str) -> None:
        import torch
        from transformers import AutoTokenizer

        from kd.cache_builder.store.readers.reader import CacheReader
        from kd.cache_builder.store.targets import band_edges
        from kd.common.settings import make
        from kd.models.tokenizer import vocabulary_size
        from kd.student_trainer.batches.collate import Collator
        from kd.student_trainer.batches.compatibility import resolve_objective
        from kd.student_trainer.batches.student_text import StudentText
        from kd.student_trainer.configuration.learning_settings import LossSettings
        from kd.student_trainer.head import attach_loss

        self.cache = cache
        reader = CacheReader(cache)
        size, kept = reader.manifest.vocabulary_size, reader.config
        edges = tuple(band_edges(kept.top_k, size, kept.tail_bands)) if kept.tail_bands else ()
        objective = resolve_objective(kept, make(LossSettings, {"loss": loss}), edges=edges)
        text = None
        if objective.groups:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            size, text = vocabulary_size(tokenizer), StudentText(reader, tokenizer, window=POSITIONS, separator=None)
        self.collate = Collator(objective, text)
        self.model = load_model(folder).train()
        attach_loss(self.model, objective, size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def train(self, count: int, batch_tokens: int) -> None:
        """`count` steps in the cache's order, its files opened, verified and decoded on the way."""
        from kd.cache_builder.store.readers.reader import CacheReader
        from kd.student_trainer.batches.batch_plan import plan_batches
        from kd.student_trainer.batches.read_ahead import CachedExamples

        reader = CacheReader(self.cache)
        data = CachedExamples(reader)
        lengths, _ = reader.lengths()
        for planned in plan_batches(reader, lengths, seed=0, count=count, tokens_per_batch=batch_tokens):
            batch = self.collate(data.__getitems__(list(planned.examples)))
            units, _ = batch.pop("units", None), batch.pop("aligned_bytes", None)
            if units is not None:
                batch["kd_scale"] = len(batch["gold_ids"]) / units
            outputs = self.model(**batch)
            (outputs["loss"] / len(batch["gold_ids"])).backward()
            step(self.model, self.optimizer)


def train_plain(model: Any, optimizer: Any, batches: Sequence[Sequence[Sequence[int]]]) -> None:
    """One step per batch on transformers' own cross-entropy; the prompt is not scored."""
    import torch

    for batch in batches:
        ids = torch.tensor(batch)
        labels = ids.clone()
        labels[:, :PROMPT_TOKENS] = -100
        model(ids, labels=labels, use_cache=False).loss.backward()
        step(model, optimizer)


def step(model: Any, optimizer: Any) -> None:
    """What transformers' Trainer does after the backward pass."""
    import torch

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
