"""Build and training speed and memory, as ratios to the plain thing, in one run.

    python benchmarks/bench.py                # make bench
    python benchmarks/bench.py --shape gpt2 --tokens 4096 --repeats 3

Every case runs in a process of its own (peak memory is what is resident above the process with its model loaded)
and the cases take turns, so that a machine that slows down slows them all; ratios are of medians. The model has the
real GPT-2 vocabulary and random weights; text and tokenizer are the embedded ones. Speeds on a shared machine are
noise; read the ratios. On a machine with other work to do read the ratios of CPU time, with `OMP_NUM_THREADS=1`.

    build   bare      model(ids).logits, materialised, nothing kept
            naive     the same, then log_softmax and top-k on the full tensor (what most scripts do)
            kd        the whole `build`: head in chunks, top-k, normalisers, encoding, writing; batches of its own choice
            t5-bare   an encoder-decoder (flan-t5-small's shape, 32,128 logits, random weights) over the embedded
                      mixture: model(...).logits on the batches of `t5-kd`
            t5-kd     the whole `build` of the same; both count unpadded tokens
    train   plain     transformers' own loss, AdamW
            ce, kl    the same student through `attach_loss`, batches read from the cache
            uld       the same from a cache of profile `uld`, text tokenised again and aligned beforehand
            loop      the whole of `kd train` over the batches of `kl`; its ratios are to `kl`
    read    rows per second of an epoch over a cache of READ_ROWS made-up rows at k=64: opening, checksums, decoding, to
            batches of 16 examples as the loss takes them (`--loss kl`), shuffled by window
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workload import Memory

from kd.common.memory import share_one_heap

SEQ_LEN = 256
READ_ROWS = 220_000
BATCH = 8
VOCABULARY = 50257  # GPT-2's
T5 = "random:flan-t5-small"


def shape_config(name: str) -> Any:
    """`gpt2`, or `small`: the GPT-2 vocabulary on a body a laptop can run (d=256, 4 layers)."""
    from kd.models.shapes import SHAPES

    config = SHAPES["gpt2"]()
    if name == "small":
        config.n_embd, config.n_layer, config.n_head = 256, 4, 4
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return config


def make_model(folder: Path, shape: str) -> None:
    import torch
    from transformers import GPT2LMHeadModel

    from kd.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(shape_config(shape)).save_pretrained(folder)
    load_tokenizer("demo").save_pretrained(folder)
    path = folder / "tokenizer.json"  # as many entries as logits, so that top-k ranges over the real vocabulary
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), VOCABULARY)}
    path.write_text(json.dumps(tokenizer))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return resident(AutoModelForCausalLM.from_pretrained(folder))


def resident(model: Any) -> Any:
    """The same, every weight read once: memory-mapped weights are not resident, and so not the model's own, until then."""
    for parameter in model.parameters():
        float(parameter.detach().sum())
    return model


class Clock:
    """Wall-clock and CPU seconds of this process, all threads, since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def rates(self, tokens: float) -> dict[str, float]:
        return {
            "tokens_per_second": tokens / (time.perf_counter() - self.wall),
            "tokens_per_cpu_second": tokens / (time.process_time() - self.cpu),
        }


def batches(tokens: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(max(1, tokens // (BATCH * SEQ_LEN))):
        yield torch.randint(VOCABULARY, (BATCH, SEQ_LEN), generator=generator)


def case_bare(work: Path, tokens: int, keep: bool = False) -> dict[str, float]:
    import torch

    model = load(work / "model").eval()
    count, memory = 0, Memory()
    with torch.inference_mode():
        model(next(batches(0))[:1, :8])
        clock = Clock()
        for ids in batches(tokens):
            logits = model(ids, use_cache=False).logits
            if keep:
                logits.float().log_softmax(-1).topk(64)
            count += ids.numel()
    return clock.rates(count) | {"peak_mb": memory.stop()}


def case_naive(work: Path, tokens: int) -> dict[str, float]:
    return case_bare(work, tokens, keep=True)


def corpus(tokens: int) -> Any:
    """Text of the embedded source worth about `tokens` tokens of the embedded tokenizer."""
    from kd.data.sources import load_corpus

    documents = load_corpus("demo").examples
    size, count = 0, 0
    while size < tokens * 3.1 and count < len(documents):
        size += len(documents[count].target)
        count += 1
    return load_corpus("demo", limit=count)


def build_cache(work: Path, out: Path, tokens: int, model: Any = None, profile: str = "kl") -> Any:
    from kd.cache_builder.build.builder import build
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.build.request import BuildRequest
    from kd.cache_builder.store.targets import TargetConfig
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.models.model_request import ModelRequest

    request = ModelRequest(str(work / "model"), device="cpu")
    targets = TargetConfig.of_profile(profile)
    plan = plan_build(BuildRequest(out, request, corpus(tokens), BlockConfig(SEQ_LEN), targets, model=model))
    return plan, build(plan)


def case_kd(work: Path, tokens: int) -> dict[str, float]:
    out = Path(tempfile.mkdtemp(dir=work)) / "cache"
    plan, steps = build_cache(work, out, tokens, load(work / "model").eval())
    return drive(plan, steps, build_cache(work, out.parent / "warm", 64, plan.request.model)[1])


def drive(plan: Any, steps: Any, warm: Any) -> dict[str, float]:
    """Run a build to its end and delete it; `warm` is a tiny one, for imports and first calls, which memory does count."""
    memory = Memory()  # above the loaded model, as in the other cases
    for _ in warm:
        pass
    first = next(steps)  # the store is created, the output layer checked: costs that do not grow with the text
    clock = Clock()
    *_, last = steps
    left = 1 - first.rows_done / first.rows_total
    result = clock.rates(plan.tokens * left) | {"peak_mb": memory.stop(), "padding_share": last.padding_share}
    shutil.rmtree(plan.request.out.parent)
    return result | {f"s_{k}": v for k, v in last.seconds.items()}


def t5_plan(out: Path, tokens: int, model: Any = None) -> Any:
    """About `tokens` tokens of the mixture's examples, some 35 each; the model is `plan.request.model`."""
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.build.request import BuildRequest
    from kd.cache_builder.store.targets import TargetConfig
    from kd.data.sources import load_corpus
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.models.loading import load_model
    from kd.models.model_request import ModelRequest

    request = ModelRequest(T5, tokenizer="demo-t5", device="cpu")
    model = model or resident(load_model(request).eval())
    corpus = load_corpus("mini", limit=tokens // 35)
    return plan_build(BuildRequest(out, request, corpus, BlockConfig(SEQ_LEN), TargetConfig(), model=model))


def case_t5_bare(work: Path, tokens: int) -> dict[str, float]:
    import torch

    from kd.models.batching.padded_batches import batches_by_length, forward_tokens

    plan = t5_plan(work / "none", tokens)
    model = plan.request.model
    sizes = [(len(r.context_ids), len(r.target_ids)) for r in plan.rows]
    memory, ids = Memory(), torch.ones(1, 8, dtype=torch.long)
    with torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=ids)
        clock = Clock()
        for batch in batches_by_length(sizes, forward_tokens("cpu", two_sides=True)):
            pad = torch.nn.utils.rnn.pad_sequence
            contexts, targets = (
                pad(
                    [torch.tensor(getattr(plan.rows[i], name), dtype=torch.int64) for i in batch],
                    True,
                    model.config.pad_token_id,
                )
                for name in ("context_ids", "target_ids")
            )
            model(input_ids=contexts, attention_mask=(contexts != 0).long(), decoder_input_ids=targets, use_cache=False)
    return clock.rates(plan.tokens) | {"peak_mb": memory.stop()}


def case_t5_kd(work: Path, tokens: int) -> dict[str, float]:
    from kd.cache_builder.build.builder import build

    out = Path(tempfile.mkdtemp(dir=work)) / "cache"
    plan = t5_plan(out, tokens)
    return drive(plan, build(plan), build(t5_plan(out.parent / "warm", 70, plan.request.model)))


def case_plain(work: Path, tokens: int) -> dict[str, float]:
    import torch

    model = load(work / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    memory, clock, count = Memory(), None, 0
    for number, ids in enumerate(batches(tokens + BATCH * SEQ_LEN)):
        if number == 1:  # the first step allocates the optimizer's state
            clock = Clock()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += ids[:, 1:].numel() if number else 0  # positions that are scored
    assert clock is not None
    return clock.rates(count) | {"peak_mb": memory.stop()}


def case_student(work: Path, tokens: int, loss: str = "kl") -> dict[str, float]:
    """Reading, decoding, collating and a step, one after another."""
    import torch

    from kd.common.settings import make
    from kd.student_trainer.batches.batch_plan import plan_batches
    from kd.student_trainer.batches.read_ahead import CachedExamples
    from kd.student_trainer.configuration.train_config import TrainConfig
    from kd.student_trainer.head import attach_loss
    from kd.student_trainer.prepare import prepare

    folder = work / ("cache-uld" if loss == "uld" else "cache")
    prepared = prepare(make(TrainConfig, {"cache": folder, "student": work / "model", "out": "unused", "loss": loss}))
    reader, collate = prepared.reader, prepared.collator
    model = load(work / "model")
    attach_loss(model, prepared.objective, prepared.vocabulary_size)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    lengths, _ = reader.lengths()
    plan = plan_batches(
        reader, lengths, seed=0, count=1 + max(1, tokens // (BATCH * SEQ_LEN)), tokens_per_batch=BATCH * SEQ_LEN
    )
    data = CachedExamples(reader)
    memory, clock, count = Memory(), None, 0
    for number, planned in enumerate(plan):
        if number == 1:
            clock = Clock()
        batch = collate(data.__getitems__(list(planned.examples)))
        for name in ("units", "aligned_bytes"):
            batch.pop(name, None)
        outputs = model(**batch)
        (outputs["loss"] / len(batch["gold_ids"])).backward()
        optimizer.step()
        optimizer.zero_grad()
        count += len(batch["gold_ids"]) if number else 0
    assert clock is not None
    return clock.rates(count) | {"peak_mb": memory.stop()}


def case_student_ce(work: Path, tokens: int) -> dict[str, float]:
    return case_student(work, tokens, "ce")


def case_student_uld(work: Path, tokens: int) -> dict[str, float]:
    return case_student(work, tokens, "uld")


def case_loop(work: Path, tokens: int) -> dict[str, float]:
    """The whole of `kd train` over the batches of `kl`, from the end of its first step to that of its last."""
    from kd.common.settings import make
    from kd.student_trainer.configuration.train_config import TrainConfig
    from kd.student_trainer.training import train

    marks: list[tuple[Clock, int]] = []
    rates: dict[str, float] = {}

    def on_step(record: Any) -> None:
        marks.append((Clock(), record.tokens))
        if len(marks) > 1:
            rates.update(marks[0][0].rates(record.tokens - marks[0][1]))
            rates["wait_share"] = record.wait_share

    steps = 1 + max(1, tokens // (BATCH * SEQ_LEN))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        memory = Memory()
        train(
            make(
                TrainConfig,
                {
                    "cache": work / "cache",
                    "student": work / "model",
                    "out": Path(folder) / "run",
                    "loss": "kl",
                    "max_steps": steps,
                    "lr": 1e-5,
                    "tokens_per_batch": BATCH * SEQ_LEN,
                    "device": "cpu",
                    "log_every": steps,
                },
            ),
            on_step=on_step,
        )
        size = (work / "model" / "model.safetensors").stat().st_size / 2**20
        return rates | {"peak_mb": memory.stop() - size}


def make_read_cache(work: Path, rows: int = READ_ROWS) -> None:
    """`work/read`: about `rows` rows of the embedded text with made-up heads, written without a teacher."""
    import numpy as np

    from kd.cache_builder.build.shard_writing import lengths_of, write_shard
    from kd.cache_builder.store.targets import RawTargets
    from kd.cache_builder.store.writers.claims import Claims
    from kd.cache_builder.store.writers.shard_writer import ShardWriter

    plan, _ = build_cache(work, work / "read", rows)
    writer, rng = ShardWriter(work / "read", plan.manifest), np.random.default_rng(0)
    writer.create(plan.vocabulary, plan.codes, lengths_of(plan.rows))
    seconds, claims = {"encode": 0.0, "write": 0.0}, Claims(work / "read")
    for index, (first, stop, n) in enumerate(plan.manifest.shards):
        examples = plan.rows[first:stop]
        gaps = rng.exponential(1 / np.arange(1, 65), (n, 64))
        relative = np.cumsum(gaps, axis=1) - gaps[:, :1]
        log_z = np.stack([np.log(np.exp(-relative / t).sum(1)) + 0.3 for t in (1, 2, 4)], axis=1)
        raw = RawTargets(
            gold_ids=np.concatenate([r.target_ids for r in examples]),
            log_z=log_z.astype(np.float32),
            gold_logprob=-rng.exponential(3, n).astype(np.float32),
            gold_rank=rng.zipf(1.5, n) % VOCABULARY,
            byte_end=np.concatenate([r.byte_end for r in examples]),
            token_ids=rng.zipf(1.1, (n, 64)) % VOCABULARY,
            relative=-relative.astype(np.float32),
        )
        claims.take(index)
        write_shard(writer, index, examples, raw, plan, seconds, claims)
    writer.finish()


def case_read(work: Path, tokens: int) -> dict[str, float]:
    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.student_trainer.batches.collate import Collator
    from kd.student_trainer.batches.compatibility import needed_arrays
    from kd.student_trainer.losses.loss_registry import Objective

    objective = Objective()
    collate = Collator(objective)
    for warm in (False, True):
        rows, started, cpu = 0, time.perf_counter(), time.process_time()
        reader = CacheReader(work / "read")
        reader.keep(needed_arrays(objective, reader.manifest))
        order = reader.epoch_order(0, 0).tolist()
        for first in range(0, len(order) if warm else 16, 16):
            rows += len(collate(reader.read(order[first : first + 16]))["gold_ids"])
    return {
        "tokens_per_second": rows / (time.perf_counter() - started),
        "tokens_per_cpu_second": rows / (time.process_time() - cpu),
        "peak_mb": 0.0,
    }


CASES = {
    "bare": case_bare,
    "naive": case_naive,
    "kd": case_kd,
    "plain": case_plain,
    "ce": case_student_ce,
    "kl": case_student,
    "uld": case_student_uld,
    "loop": case_loop,
    "read": case_read,
    "t5-bare": case_t5_bare,
    "t5-kd": case_t5_kd,
}

BASES = {
    "bare": "bare",
    "naive": "bare",
    "kd": "bare",
    "plain": "plain",
    "ce": "plain",
    "kl": "plain",
    "uld": "plain",
    "loop": "kl",
    "t5-bare": "t5-bare",
    "t5-kd": "t5-bare",
}
"""What each case's ratios are to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("small", "gpt2"), default="small")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="Some of the cases, comma-separated; with the case each is compared to.")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        if args.case in ("kd", "t5-kd"):
            share_one_heap()  # as the `kd` command does
        print(json.dumps(CASES[args.case](args.work, args.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results: dict[str, list[dict[str, float]]] = {n: [] for n in (args.only.split(",") if args.only else CASES)}
        make_model(work / "model", args.shape)
        for _ in build_cache(work, work / "cache", args.tokens)[1]:
            pass
        for _ in build_cache(work, work / "cache-uld", args.tokens, profile="uld")[1] if "uld" in results else ():
            pass
        if "read" in results:
            make_read_cache(work)
        for _ in range(args.repeats):
            for name in results:
                command = [sys.executable, __file__, "--case", name, "--work", folder, "--tokens", str(args.tokens)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"case {name} failed:\n{done.stderr[-3000:]}")
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
        report(results, work / "cache")


def report(results: dict[str, list[dict[str, float]]], cache: Path) -> None:
    from kd.cache_builder.store.readers.reader import quality_means
    from kd.cache_builder.store.records.manifest import load_manifest

    middle = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in results.items()}
    print(f"{'case':<8}{'tokens/s':>12}{'ratio':>8}{'by CPU time':>14}{'peak MB above the model':>26}{'ratio':>8}")
    for name, to in BASES.items():
        if name not in middle or to not in middle:
            continue
        row, base = middle[name], middle[to]
        speed, memory = row["tokens_per_second"] / base["tokens_per_second"], row["peak_mb"] / base["peak_mb"]
        cpu = row.get("tokens_per_cpu_second", 0) / base.get("tokens_per_cpu_second", 1)
        print(
            f"{name:<8}{row['tokens_per_second']:>12,.0f}{speed:>8.2f}{cpu:>14.2f}{row['peak_mb']:>26,.0f}{memory:>8.2f}"
        )
    if "read" in middle:
        read = middle["read"]
        print(f"{'read':<8}{read['tokens_per_second']:>12,.0f} ({read['tokens_per_cpu_second']:,.0f} per CPU-second)")
    if "loop" in middle:
        print(f"loop waited for data {100 * middle['loop']['wait_share']:.2f} % of its time")
    for name in ("kd", "t5-kd"):
        if name in middle:
            seconds = ", ".join(f"{k[2:]} {v:.2f}" for k, v in middle[name].items() if k.startswith("s_"))
            print(f"{name}, seconds: {seconds}; padding {middle[name]['padding_share']:.3f}")
    manifest = load_manifest(cache)
    size = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    means = quality_means(manifest)
    print(
        f"cache of random weights (incompressible ids): {size / manifest.rows:.1f} B/token at k={manifest.targets.top_k}, "
        f"head KL {means['head_kl']:.1e}"
    )


if __name__ == "__main__":
    main()
