"""Build and training on one GPU, as ratios to the bare forward pass and to plain fine-tuning, with random weights.

    python benchmarks/gpu.py                       # every case; about twenty minutes on one H200
    python benchmarks/gpu.py --cases neo,t5-nf4    # some of them
    python benchmarks/gpu.py --device cpu --tiny   # the same code on a CPU and small shapes, in a minute: figures mean nothing

    teachers   neo        GPT-Neo-2.7B, bfloat16, sequences of 1,024 tokens
               t5-bf16    FLAN-T5-XXL, bfloat16, prompts of 512 and targets of 64 tokens
               t5-nf4     the same in 4 bits (bitsandbytes nf4, double quantisation)
    students   gpt2, pythia, smollm with `kl` (k=64) and `uld` (k=16, 16 bands), 1,024 and 8,192 positions a step, bfloat16 autocast

Per teacher: tokens/s and model FLOP utilisation (2 x parameters x tokens / seconds, of --peak-tflops) of the bare forward that
materialises its logits, and of the build's own teacher pass on the same batches (selection and copies to the host included;
encoding and writing run on another thread and are timed apart), their ratio, peak memory above the weights, and the share
of the pass in which the GPU had nothing to do. Per student: seconds per step of transformers' own loss and of ours, their
ratio, peak memory; where Liger-Kernel is installed, its fused cross-entropy beside them.

Text is made of random ids: speed does not depend on it. The last line is one JSON document with every figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kd.cache_builder import codecs
from kd.cache_builder.sparsify import Sparsifier
from kd.cache_builder.targets import TargetConfig, band_edges
from kd.cache_builder.teacher import Teacher, collect
from kd.data.blocks import TokenRows
from kd.data.example import Example
from kd.data.forward import EncoderDecoderHead, LanguageModelHead, batches_by_length, split_head
from kd.data.models import ModelRequest, load_model
from kd.data.shapes import SHAPES
from kd.student_trainer.groups import GroupSettings
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses import Objective

H200_BF16_TFLOPS = 989.0
"""Dense, without sparsity (NVIDIA's data sheet)."""


@dataclass(frozen=True)
class TeacherCase:
    """A teacher, and the text it reads."""

    shape: str
    context: int
    target: int
    load_in_4bit: bool = False


TEACHERS = {
    "neo": TeacherCase("gpt-neo-2.7B", 1, 1023),
    "t5-bf16": TeacherCase("flan-t5-xxl", 512, 64),
    "t5-nf4": TeacherCase("flan-t5-xxl", 512, 64, load_in_4bit=True),
}
STUDENTS = {"gpt2": "gpt2", "pythia": "pythia-410m", "smollm": "SmolLM-360M"}
TINY = {"gpt-neo-2.7B": "demo-student", "flan-t5-xxl": "demo-t5-student", "gpt2": "demo-student",
        "pythia-410m": "demo-student", "SmolLM-360M": "demo-student"}  # fmt: skip


class Clock:
    """Seconds of device work, and the most memory above what was there at its start."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated() if self.cuda else 0
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """`(seconds, MB)`; memory is 0 on a CPU."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        return seconds, (torch.cuda.max_memory_allocated() - self.base) / 2**20 if self.cuda else 0.0


def rows_of(case: TeacherCase, vocabulary: int, tokens: int) -> list[TokenRows]:
    """Random examples of the case's lengths, about `tokens` in all."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(max(2, tokens // (case.context + case.target))):
        context, target = (generator.integers(2, vocabulary, n).astype(np.int32) for n in (case.context, case.target))
        rows.append(TokenRows(Example(str(number), "x"), context, target, np.arange(1, case.target + 1)))
    return rows


def bare_pass(head: LanguageModelHead, model: Any, rows: list[TokenRows], budget: int) -> Iterator[int]:
    """The model's own forward on the build's batches, all logits made: yields tokens read per batch."""
    sizes = [head.size(len(r.context_ids), len(r.target_ids)) for r in rows]
    device = head.weight.device
    for batch in batches_by_length(sizes, budget):
        context, target = (
            torch.from_numpy(np.stack([getattr(rows[i], f"{side}_ids") for i in batch])).long().to(device)
            for side in ("context", "target")
        )
        with torch.inference_mode():
            if isinstance(head, EncoderDecoderHead):
                model(input_ids=context, decoder_input_ids=target, use_cache=False)
            else:
                model(input_ids=torch.cat([context, target], dim=1), use_cache=False)
        yield context.numel() + target.numel()


def teacher_case(case: TeacherCase, args: argparse.Namespace) -> dict[str, float]:
    """Bare pass and build pass in turn, `--repeats` times."""
    request = ModelRequest(f"random:{case.shape}", device=args.device, dtype="bfloat16", load_in_4bit=case.load_in_4bit)
    model = load_model(request)
    head = split_head(model)
    parameters = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())  # two 4-bit a byte
    vocabulary = int(model.config.vocab_size)
    rows = rows_of(case, vocabulary, args.tokens)
    tokens = sum(len(r.context_ids) + len(r.target_ids) for r in rows)
    config = TargetConfig()
    teacher = Teacher(head, Sparsifier(config, vocabulary), tokens_per_batch=args.tokens_per_batch)
    bare: list[tuple[float, float]] = []
    built: list[tuple[float, float]] = []
    busy: list[float] = []
    for number in range(args.repeats + 1):  # the first warms up
        clock = Clock(args.device)
        for _ in bare_pass(head, model, rows, args.tokens_per_batch):
            pass
        bare.append(clock.stop())
        clock = Clock(args.device)
        with gpu_activity(args.device) as activity:
            *_, (_, raw) = collect(rows, teacher.run(rows, 0))
        built.append(clock.stop())
        busy.append(activity() / built[-1][0])
        if number == 0:
            bare, built, busy = [], [], []
    assert raw is not None
    started = time.perf_counter()
    codecs.encode(raw, config)
    encode = time.perf_counter() - started
    times = [statistics.median(t for t, _ in runs) for runs in (bare, built)]
    flops = 2 * parameters * tokens
    return {
        "parameters": parameters, "tokens": tokens,
        "bare_tokens_per_second": tokens / times[0], "build_tokens_per_second": tokens / times[1],
        "ratio": times[0] / times[1],
        "bare_mfu": flops / times[0] / (args.peak_tflops * 1e12),
        "build_mfu": flops / times[1] / (args.peak_tflops * 1e12),
        "bare_peak_mb": statistics.median(m for _, m in bare), "build_peak_mb": statistics.median(m for _, m in built),
        "idle_share": 1 - statistics.median(busy), "encode_seconds_beside": encode,
    }  # fmt: skip


class gpu_activity:
    """Seconds in which at least one kernel or copy ran, from the profiler; all of the time on a CPU."""

    def __init__(self, device: str) -> None:
        self.profiler: Any = None
        if device.startswith("cuda"):
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __enter__(self) -> Callable[[], float]:
        self.started = time.perf_counter()
        if self.profiler is not None:
            self.profiler.__enter__()
        return self._seconds

    def __exit__(self, *failure: Any) -> None:
        self.ended = time.perf_counter()
        if self.profiler is not None:
            torch.cuda.synchronize()
            self.ended = time.perf_counter()
            self.profiler.__exit__(*failure)

    def _seconds(self) -> float:
        if self.profiler is None:
            return self.ended - self.started
        spans = sorted((e.time_range.start, e.time_range.end) for e in self.profiler.events())
        total, reached = 0.0, -float("inf")
        for start, end in spans:  # overlapping streams count once
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total / 1e6


def batch_of(loss: str, positions: int, vocabulary: int, device: str, seq_len: int) -> dict[str, torch.Tensor]:
    """A collated batch as a cache gives it: `positions` scored tokens in sequences of `seq_len`."""
    generator = torch.Generator(device=device).manual_seed(0)
    n = max(1, positions // seq_len)
    ids = torch.randint(2, vocabulary, (n, seq_len + 1), generator=generator, device=device)
    rows = n * seq_len
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "gold_ids": ids[:, 1:].reshape(-1),
        "positions": (torch.arange(n, device=device)[:, None] * (seq_len + 1)
                      + torch.arange(seq_len, device=device)).reshape(-1),
    }  # fmt: skip
    k, bands = (64, 0) if loss == "kl" else (16, 16)
    edges = band_edges(k, vocabulary, bands) if bands else [k, vocabulary]
    pieces: dict[str, list[torch.Tensor]] = {"ids": [], "logprobs": [], "bands": []}
    for start in range(0, rows, 512):
        size = min(512, rows - start)
        log_p = (3 * torch.randn(size, vocabulary, generator=generator, device=device)).log_softmax(dim=1)
        values, order = log_p.sort(dim=1, descending=True)
        pieces["ids"].append(order[:, :k])
        pieces["logprobs"].append(values[:, :k])
        pieces["bands"].append(torch.stack([values[:, a:b].logsumexp(dim=1) for a, b in pairwise(edges)], dim=1))
    found = {name: torch.cat(parts) for name, parts in pieces.items()}
    if loss == "kl":
        return batch | {"token_ids": found["ids"], "logprobs": found["logprobs"],
                        "tail_mass": 1 - found["logprobs"].exp().sum(dim=1)}  # fmt: skip
    first = torch.arange(rows, device=device)
    zeros = torch.zeros(rows, device=device)
    return batch | {"group_first": first, "group_stop": first + 1, "group_log_scale": zeros,
                    "group_chunk_logprob": zeros - 1, "group_weight": zeros + 1 / seq_len,
                    "group_logprobs": found["logprobs"], "group_bands": found["bands"]}  # fmt: skip


def student_case(shape: str, positions: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds per step: transformers' own loss, ours, and Liger's where it is installed, in turn."""
    vocabulary = int(SHAPES[shape]().vocab_size)
    seq_len = min(args.seq_len, positions)
    edges = tuple(band_edges(16, vocabulary, 16))
    uld = Objective("uld", "bands", 0.5, settings=GroupSettings(edges=edges, ranking="fast"))
    objectives = {"kl": Objective(), "uld": uld, "uld_exact": replace(uld, settings=GroupSettings(edges=edges)),
                  "ce": Objective("ce", "none", 0.0)}  # fmt: skip
    figures: dict[str, float] = {}
    names = ["plain", *objectives, *(["liger"] if find_spec("liger_kernel") and args.device != "cpu" else [])]
    for name in names:
        model = load_model(ModelRequest(f"random:{shape}", device=args.device, dtype="float32")).train()
        batch = batch_of("uld" if name.startswith("uld") else "kl", positions, vocabulary, args.device, seq_len)
        if name == "ce":
            batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "gold_ids", "positions")}
        if name == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        elif name != "plain":
            attach_loss(model, objectives[name], vocabulary)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=args.device != "cpu")

        def step(model: Any = model, batch: dict[str, torch.Tensor] = batch, optimizer: Any = optimizer,
                 name: str = name) -> None:  # fmt: skip
            context = (
                torch.autocast(args.device.partition(":")[0], torch.bfloat16) if args.device != "cpu" else nullcontext()
            )
            with context:
                if name in ("plain", "liger"):
                    ids = batch["input_ids"]
                    loss = model(
                        input_ids=ids, attention_mask=batch["attention_mask"], labels=ids, use_cache=False
                    ).loss
                else:
                    loss = model(**batch)["loss"] / len(batch["gold_ids"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        runs = []
        for number in range(args.repeats + 2):
            clock = Clock(args.device)
            step()
            if number >= 2:
                runs.append(clock.stop())
        figures[f"{name}_seconds"] = statistics.median(t for t, _ in runs)
        figures[f"{name}_peak_mb"] = statistics.median(m for _, m in runs)
        del model, optimizer, batch, step
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    for name in names[1:]:
        figures[f"{name}_ratio"] = figures[f"{name}_seconds"] / figures["plain_seconds"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", help="comma-separated; default all of " + ", ".join([*TEACHERS, *STUDENTS]))
    parser.add_argument("--tokens", type=int, default=131_072, help="a teacher reads per repeat")
    parser.add_argument("--tokens-per-batch", type=int, default=16_384)
    parser.add_argument("--positions", default="1024,8192", help="scored per student step")
    parser.add_argument("--seq-len", type=int, default=1023)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=H200_BF16_TFLOPS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a machine without a GPU")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device: run this on a GPU, or --device cpu --tiny to see that it works")
    if args.tiny:
        args.tokens, args.tokens_per_batch, args.positions, args.seq_len, args.repeats = 2048, 512, "128", 63, 1
    wanted = args.cases.split(",") if args.cases else [*TEACHERS, *STUDENTS]
    unknown = [name for name in wanted if name not in TEACHERS and name not in STUDENTS]
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}; known: {', '.join([*TEACHERS, *STUDENTS])}")
    results: dict[str, dict[str, float]] = {}
    for name in wanted:
        if name in TEACHERS:
            case = TEACHERS[name]
            if args.tiny:
                short = (
                    TeacherCase(TINY[case.shape], 1, 63) if case.context == 1 else TeacherCase(TINY[case.shape], 48, 16)
                )
                case = replace(short, load_in_4bit=case.load_in_4bit)
            results[name] = teacher_case(case, args)
            show(name, results[name])
            continue
        for positions in (int(n) for n in args.positions.split(",")):
            shape = TINY[STUDENTS[name]] if args.tiny else STUDENTS[name]
            results[f"{name} {positions}"] = student_case(shape, positions, args)
            show(f"{name}, {positions} positions", results[f"{name} {positions}"])
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "tiny": args.tiny, "results": results}))


def show(name: str, figures: dict[str, float]) -> None:
    print(name)
    for key, value in figures.items():
        print(f"  {key:<26}{value:>16,.4g}" if value < 1000 else f"  {key:<26}{value:>16,.0f}", flush=True)


if __name__ == "__main__":
    main()
