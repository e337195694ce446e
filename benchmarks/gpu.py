"""Build and training on one GPU, as ratios to the bare forward pass and to plain fine-tuning, with random weights.

    python benchmarks/gpu.py                       # every case, one after the other
    python benchmarks/gpu.py --cases neo           # one of them: ten minutes at most on one H200
    python benchmarks/gpu.py --cases gpt2 --positions 8192 --methods plain,kl,kl_compiled
    python benchmarks/gpu.py --device cpu --tiny   # the same code on a CPU and small shapes: figures mean nothing

    teachers   neo        GPT-Neo-2.7B, bfloat16, sequences of 1,024 tokens
               t5-bf16    FLAN-T5-XXL, bfloat16, prompts of 512 and targets of 64 tokens
               t5-nf4     the same in 4 bits (bitsandbytes nf4, double quantisation; quantised from a file made on the CPU)
    students   gpt2, pythia, smollm: GPT-2 124M, Pythia-410M, SmolLM-360M, 1,024 and 8,192 positions a step, bfloat16
               autocast, by the methods of `gpu_steps.py`; the teacher of those that need one has GPT-Neo-2.7B's shape and the
               student's vocabulary
    head       GPT-2's output layer on one chunk of rows, in parts: products that end in float32 or bfloat16, each kernel as
               it is and through torch.compile, with the largest difference of the two gradients
    kernels    the fused Triton kernel on as many rows of bfloat16 products as training takes at once, in blocks of several
               sizes, beside torch's kernels on them and Liger's kernel for cross-entropy; and what of the HBM's speed that is

Per teacher: tokens/s and model FLOP utilisation (2 x weights of the linear layers x tokens that go through them / seconds, of
--peak-tflops) of the bare forward that materialises its logits, and of the build's own teacher pass on the same batches
(selection and copies to the host included; encoding and writing run on another thread and are timed apart), their ratio, and
peak memory above the weights. In one pass more, under the profiler: the share of it in which the GPU had nothing to do; in
two others: how often a batch waits for the GPU in the build and in the bare pass. Those waits are the model's own: transformers
asks once per forward whether positions are those of several sequences, and GPT-Neo sends a number to the GPU in every layer.
GPT-Neo's attention is eager, in float32, and about half of its bare pass; of T5 in 4 bits the `wo` layers and the output layer
are bfloat16.
Per student: seconds per step, the highest memory above what was in use before the student was loaded, and their ratios to
transformers' own loss.

What cannot be run is left out with its reason: a library that is not installed, memory, time (--minutes per case).
Text is made of random ids: speed does not depend on it. The last line is one JSON document with every figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from gpu_steps import METHODS, Case, Method
from heads import Compiled, made_up, shorter
from traffic import HBM_BYTES_PER_SECOND, kernel_bytes

from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.targets import TargetConfig, band_edges
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.cache_builder.teacher.teacher_pass import Teacher, collect
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.batching.padded_batches import batches_by_length, head_rows, on_device
from kd.models.families.logit_transform import PLAIN
from kd.models.heads import EncoderDecoderHead, LanguageModelHead, split_head
from kd.models.loading import load_model, random_model
from kd.models.model_request import ModelRequest
from kd.models.shapes import SHAPES
from kd.student_trainer.faster import triton_launch
from kd.student_trainer.faster.fused_loss import torch_gradient_, triton_gradient_
from kd.student_trainer.head import ALIGNED
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings

H200_BF16_TFLOPS = 989.0
"""Dense, without sparsity (NVIDIA's data sheet)."""
Result = dict[str, float | str]
"""Figures by name; under `… left out` the reason."""


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
TINY = {
    "gpt-neo-2.7B": "demo-student",
    "flan-t5-xxl": "demo-t5-student",
    "gpt2": "demo-student",
    "pythia-410m": "demo-student",
    "SmolLM-360M": "demo-student",
}


class Clock:
    """Seconds of device work, and the most memory above `base` bytes, or above what was there at its start."""

    def __init__(self, device: str, base: int | None = None) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.base = in_use(device) if base is None else base
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """`(seconds, MB)`; memory is 0 on a CPU."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        return seconds, (torch.cuda.max_memory_allocated() - self.base) / 2**20 if self.cuda else 0.0


def in_use(device: str) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def tidy(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # it keeps what it has compiled, and compiles no function more than eight times
        torch.compiler.reset()
    if device.startswith("cuda"):
        torch._C._cuda_clearCublasWorkspaces()  # or the first case alone pays for them
        torch.cuda.empty_cache()


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
            on_device(torch.from_numpy(np.stack([getattr(rows[i], f"{side}_ids") for i in batch])).long(), device)
            for side in ("context", "target")
        )
        with torch.inference_mode():
            if isinstance(head, EncoderDecoderHead):
                model(input_ids=context, decoder_input_ids=target, use_cache=False)
            else:
                model(input_ids=torch.cat([context, target], dim=1), use_cache=False)
        yield context.numel() + target.numel()


def flops_of(model: Any, context: int, target: int) -> float:
    """Of one forward pass over so many tokens on either side, without attention's own products."""
    two_sides, total = model.config.is_encoder_decoder, 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):  # 4-bit layers are too, but their weights are packed
            reads_prompt = name.startswith("encoder.") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
            tokens = context + target if not two_sides else context if reads_prompt else target
            total += 2.0 * module.in_features * module.out_features * tokens
    return total


def teacher_of(case: TeacherCase, device: str) -> Any:
    """The case's model. Weights are drawn on the GPU: XXL's would take a CPU seven minutes; in 4 bits they go through a file."""
    with torch.device(device):
        model = random_model(SHAPES[case.shape](), torch.bfloat16).eval()
    if not case.load_in_4bit:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        tidy(device)
        return load_model(ModelRequest(folder, device=device, dtype="bfloat16", load_in_4bit=True))


def teacher_case(case: TeacherCase, args: argparse.Namespace) -> Result:
    """Bare pass and build pass in turn, `--repeats` times."""
    started = time.perf_counter()
    model = teacher_of(case, args.device)
    head = split_head(model)
    loading = time.perf_counter() - started
    vocabulary = int(model.config.vocab_size)
    rows = rows_of(case, vocabulary, args.tokens)
    sides = [sum(len(getattr(r, f"{side}_ids")) for r in rows) for side in ("context", "target")]
    tokens, flops = sum(sides), flops_of(model, *sides)
    config = TargetConfig()
    teacher = Teacher(head, Sparsifier(config, vocabulary), tokens_per_batch=args.tokens_per_batch)
    base = in_use(args.device)  # what the sparsifier keeps from one batch to the next is the build's
    bare: list[tuple[float, float]] = []
    built: list[tuple[float, float]] = []
    for number in range(args.repeats + 1):  # the first warms up
        if number > 1 and time.perf_counter() > args.deadline:
            break
        clock = Clock(args.device)
        batches = sum(1 for _ in bare_pass(head, model, rows, args.tokens_per_batch))
        bare.append(clock.stop())
        clock = Clock(args.device, base)
        *_, (_, raw) = collect(rows, teacher.run(rows, 0))
        built.append(clock.stop())
        if number == 0:
            bare, built = [], []
    assert raw is not None
    started = time.perf_counter()
    codecs.encode(raw, config)
    encode = time.perf_counter() - started
    times = [statistics.median(t for t, _ in runs) for runs in (bare, built)]
    figures: Result = {
        "tokens": tokens,
        "load_seconds": loading,
        "bare_tokens_per_second": tokens / times[0],
        "build_tokens_per_second": tokens / times[1],
        "ratio": times[0] / times[1],
        "bare_mfu": flops / times[0] / (args.peak_tflops * 1e12),
        "build_mfu": flops / times[1] / (args.peak_tflops * 1e12),
        "bare_peak_mb": statistics.median(m for _, m in bare),
        "build_peak_mb": statistics.median(m for _, m in built),
        "encode_seconds_beside": encode,
        "encode_share_of_pass": encode / times[1],
    }

    def once() -> None:
        for _ in collect(rows, teacher.run(rows, 0)):
            pass

    def bare_once() -> None:
        for _ in bare_pass(head, model, rows, args.tokens_per_batch):
            pass

    if not args.device.startswith("cuda"):
        return figures | {"idle_share left out": "no GPU", "waits_per_batch left out": "no GPU"}
    return figures | {
        "idle_share": idle_share(once),
        "waits_per_batch": waits(once) / batches,
        "bare_waits_per_batch": waits(bare_once) / batches,
    }


def idle_share(run: Callable[[], None]) -> float:
    """Share of the time in which no kernel and no copy ran, by the profiler (which slows the host down a little)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = profiler.events()
    assert events is not None
    return 1 - busy_seconds(events) / seconds


def busy_seconds(events: Iterable[Any]) -> float:
    """Seconds in which the device was at work: calls of the host do not count, streams side by side count once."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA")
    total, reached = 0.0, -float("inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def waits(run: Callable[[], None]) -> int:
    """How often the host waited for the GPU where torch makes it wait; events waited for on purpose are not among them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def batch_of(loss: str, positions: int, vocabulary: int, device: str, seq_len: int) -> dict[str, torch.Tensor]:
    """A collated batch as a cache gives it: `positions` scored tokens in sequences of `seq_len`."""
    generator = torch.Generator(device=device).manual_seed(0)
    n = max(1, positions // seq_len)
    ids = torch.randint(2, vocabulary, (n, seq_len + 1), generator=generator, device=device)
    rows = n * seq_len
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "gold_ids": ids[:, 1:].reshape(-1),
        "positions": (
            torch.arange(n, device=device)[:, None] * (seq_len + 1) + torch.arange(seq_len, device=device)
        ).reshape(-1),
    }
    k, bands = (16, 16) if loss == "uld" else (64, 0)
    edges = band_edges(k, vocabulary, bands) if bands else [k, vocabulary]
    pieces: dict[str, list[torch.Tensor]] = {"ids": [], "logprobs": [], "bands": []}
    for start in range(0, rows, 512):
        size = min(512, rows - start)
        log_p = (3 * torch.randn(size, vocabulary, generator=generator, device=device)).log_softmax(dim=1)
        values, order = log_p.sort(dim=1, descending=True)
        pieces["ids"].append(order[:, :k])
        pieces["logprobs"].append(values[:, :k])
        pieces["bands"].append(torch.stack([values[:, a:b].logsumexp(dim=1) for a, b in pairwise(edges)], dim=1))
    targets_of = {name: torch.cat(parts) for name, parts in pieces.items()}
    ids, logprobs = targets_of["ids"], targets_of["logprobs"]
    if loss == "kl":
        return batch | {"token_ids": ids, "logprobs": logprobs, "tail_mass": 1 - logprobs.exp().sum(dim=1)}
    if loss == "kl_ragged":
        kept = torch.randint(1, k + 1, (rows,), generator=generator, device=device)
        inside = torch.arange(k, device=device) < kept[:, None]
        tail = 1 - torch.where(inside, logprobs.exp(), 0.0).sum(dim=1)
        return batch | {"token_ids": ids[inside], "logprobs": logprobs[inside], "tail_mass": tail, "kept": kept}
    first = torch.arange(rows, device=device)
    zeros = torch.zeros(rows, device=device)
    return batch | {
        "group_first": first,
        "group_stop": first + 1,
        "group_log_scale": zeros,
        "group_chunk_logprob": zeros - 1,
        "group_weight": zeros + 1 / seq_len,
        "group_logprobs": targets_of["logprobs"],
        "group_bands": targets_of["bands"],
    }


def student_case(shape: str, positions: int, args: argparse.Namespace) -> Result:
    """Seconds per step and memory of every method; plain first, those with a teacher in memory last."""
    figures: Result = {}
    for name in args.methods:
        try:
            if time.perf_counter() > args.deadline:
                raise TimeoutError(f"more than {args.minutes:g} minutes")
            seconds, memory = student_steps(METHODS[name], shape, positions, args)
        except Exception as error:
            figures[f"{name} left out"] = reason(error)
        else:
            figures |= {f"{name}_seconds": seconds, f"{name}_peak_mb": memory}
        tidy(args.device)
    for figure, ratio in (("seconds", "ratio"), ("peak_mb", "peak_ratio")):
        base = figures.get(f"plain_{figure}")
        for name in args.methods:
            value = figures.get(f"{name}_{figure}")
            if name != "plain" and isinstance(value, float) and isinstance(base, float) and base > 0:
                figures[f"{name}_{ratio}"] = value / base
    return figures


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def student_steps(method: Method, shape: str, positions: int, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a step, and its most memory in MB: weights, optimizer, batch and all."""
    base = in_use(args.device)
    model = load_model(ModelRequest(f"random:{shape}", device=args.device, dtype="float32")).train()
    vocabulary = int(model.config.vocab_size)
    teacher = None
    if method.teacher:
        config = SHAPES[TINY["gpt-neo-2.7B"] if args.tiny else "gpt-neo-2.7B"]()
        config.vocab_size = vocabulary
        with torch.device(args.device):
            teacher = random_model(config, torch.bfloat16).eval()
    batch = batch_of(method.targets, positions, vocabulary, args.device, min(args.seq_len, positions))
    loss_of = method.make(Case(model, vocabulary, tuple(band_edges(16, vocabulary, 16)), teacher))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=args.device != "cpu")
    kind = args.device.partition(":")[0]
    runs: list[tuple[float, float]] = []
    for number in range(args.repeats + 2):  # the first two allocate, and compile
        clock = Clock(args.device, base)
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        runs.append(clock.stop())
        if number == 0 and not math.isfinite(float(loss.detach())):
            raise ValueError(f"loss {float(loss.detach())}")
        if number > 2 and time.perf_counter() > args.deadline:
            break
    return statistics.median(t for t, _ in runs[2:]), statistics.median(m for _, m in runs[2:])


def head_case(args: argparse.Namespace) -> Result:
    """Parts of the output layer and its losses, seconds each, on as many rows as training takes at once."""
    vocabulary, width = (2048, 96) if args.tiny else (50257, 768)
    device = torch.device(args.device)
    count = 32 if args.tiny else head_rows(vocabulary, device.type, training=True)
    torch.manual_seed(0)
    edges = tuple(band_edges(16, vocabulary, 16))
    targets = [moved(part, device) for part in made_up(count, vocabulary, edges)]
    hidden, weight = (torch.randn(n, width, device=device).bfloat16() for n in (count, vocabulary))
    logits = torch.randn(count, vocabulary, device=device)
    narrow, total = logits.bfloat16(), torch.zeros(vocabulary, width, device=device)
    uld = Objective("uld", "bands", 0.5, settings=GroupSettings(edges=edges, ranking="fast"))
    parts: dict[str, Callable[[], object]] = {
        "product_rounded": lambda: F.linear(hidden, weight).float(),
        "product_float32": lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32),
        "weight_gradient_rounded": lambda: total.add_(narrow.t() @ hidden),
        "weight_gradient_float32": lambda: torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total),
    }
    figures: Result = {"rows": count}
    for name, objective in {"ce": Objective("ce", "none", 0.0), "kl": Objective(), "uld": uld}.items():
        own_targets = targets[1] if objective.groups else targets[0]
        parts[f"{name}_kernel"] = partial(objective.gradient_, torch.empty_like(logits), own_targets)
        if not args.compile:
            figures[f"{name}_compiled left out"] = "--no-compile"
            continue
        compiled = Compiled(objective)
        parts[f"{name}_compiled"] = partial(compiled.gradient_, torch.empty_like(logits), own_targets)
        try:
            eager, other = logits.clone(), logits.clone()
            objective.gradient_(eager, own_targets)
            compiled.gradient_(other, own_targets)
            figures[f"{name}_compiled_difference"] = float((eager - other).abs().max() / eager.abs().max())
        except Exception as error:
            figures[f"{name}_compiled_difference left out"] = reason(error)
    for name, part in parts.items():
        try:
            figures[f"{name}_seconds"] = seconds_of(part, logits, args)
        except Exception as error:
            figures[f"{name} left out"] = reason(error)
    return figures


def kernels_case(args: argparse.Namespace) -> Result:
    """Seconds of the losses' kernels alone, over products in rows that begin at a multiple of 64 columns, as in training."""
    vocabulary = 2048 + 13 if args.tiny else 50257
    device, dtype = torch.device(args.device), torch.bfloat16
    kl, ce = Objective(), Objective("ce", "none", 0.0)
    count = 32 if args.tiny else 2 * head_rows(vocabulary, device.type, training=True)
    torch.manual_seed(0)
    by_row, _ = made_up(count, vocabulary, tuple(band_edges(16, vocabulary, 16)))
    targets = {"kl": by_row, "kl_ragged": shorter(by_row)["kl ragged"], "ce": by_row}
    products = torch.empty(count, -(-vocabulary // ALIGNED) * ALIGNED, dtype=dtype, device=device)[:, :vocabulary]
    source = torch.randn_like(products)
    figures: Result = {"rows": count}

    def timed(name: str, part: Callable[[], object], bytes_moved: int) -> None:
        try:
            seconds = seconds_of(partial(lambda written, run: run(), products, part), source, args)
        except Exception as error:
            figures[f"{name} left out"] = reason(error)
            return
        figures[f"{name}_seconds"] = seconds
        figures[f"{name}_share_of_hbm"] = bytes_moved / seconds / HBM_BYTES_PER_SECOND

    for name, own_targets in targets.items():
        objective, part = ce if name == "ce" else kl, moved(own_targets, device)
        traffic = kernel_bytes(products, part, objective.loss)
        timed(f"{name}_torch", partial(torch_gradient_, objective, products, None, PLAIN, part), traffic)
        for block, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32)):
            run = partial(blocks, block, warps, triton_gradient_, objective, products, None, PLAIN, part)
            timed(f"{name}_triton_{block}_{warps}", run, traffic)
    gold = by_row.gold_ids.to(device)
    timed("ce_liger", lambda: liger_cross_entropy(products, gold), kernel_bytes(products, by_row, "ce"))
    return figures


def blocks(block: int, warps: int, run: Callable[..., object], *arguments: Any) -> None:
    """Run with another size of blocks than the kernel's own."""
    with patch.object(triton_launch, "BLOCK", block), patch.object(triton_launch, "WARPS", warps):
        run(*arguments)


def liger_cross_entropy(products: torch.Tensor, gold: torch.Tensor) -> None:
    """Liger's kernel over the same products; it writes the gradient over them too."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    LigerCrossEntropyLoss()(products.requires_grad_(), gold)
    products.requires_grad_(False)


def moved(targets: Any, device: torch.device) -> Any:
    """A dataclass of tensors (and of such) on a device."""
    values = {f.name: getattr(targets, f.name) for f in fields(targets)}
    return replace(
        targets,
        **{
            n: v.to(device) if isinstance(v, torch.Tensor) else moved(v, device)
            for n, v in values.items()
            if v is not None
        },
    )


def seconds_of(part: Callable[[], object], logits: torch.Tensor, args: argparse.Namespace) -> float:
    """Median; a kernel writes over its logits, which are copied there again before each run."""
    buffer = part.args[0] if isinstance(part, partial) else None
    runs = []
    for _ in range(args.repeats + 2):
        if buffer is not None:
            buffer.copy_(logits)
        clock = Clock(args.device)
        part()
        runs.append(clock.stop()[0])
    return statistics.median(runs[2:])


def main() -> None:
    known = [*TEACHERS, *STUDENTS, "head", "kernels"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", help="comma-separated; default all of " + ", ".join(known))
    parser.add_argument("--methods", help="of students, comma-separated; default all of " + ", ".join(METHODS))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a case begins nothing new")
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
    wanted = args.cases.split(",") if args.cases else known
    args.methods = (
        args.methods.split(",") if args.methods else [m for m in METHODS if args.compile or "compiled" not in m]
    )
    for kind, names, choices in (("case", wanted, known), ("method", args.methods, list(METHODS))):
        for name in names:
            if name not in choices:
                sys.exit(f"unknown {kind} {name!r}; known: {', '.join(choices)}")
    results: dict[str, Result] = {}
    for name in wanted:
        started = time.perf_counter()
        args.deadline = started + 60 * args.minutes
        if name in STUDENTS:
            sizes = [int(n) for n in args.positions.split(",")]
            shape = TINY[STUDENTS[name]] if args.tiny else STUDENTS[name]
            for number, positions in enumerate(sizes, 1):
                args.deadline = started + 60 * args.minutes * number / len(sizes)
                results[f"{name} {positions}"] = student_case(shape, positions, args)
                show(f"{name}, {positions} positions", results[f"{name} {positions}"])
            continue
        try:
            alone = {"head": head_case, "kernels": kernels_case}.get(name)
            results[name] = alone(args) if alone else teacher_case(case_of(name, tiny=args.tiny), args)
        except Exception as error:  # no bitsandbytes, no memory, …
            results[name] = {"left out": reason(error)}
        show(name, results[name])
        tidy(args.device)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "tiny": args.tiny, "results": results}))


def case_of(name: str, *, tiny: bool) -> TeacherCase:
    case = TEACHERS[name]
    if not tiny:
        return case
    lengths = (1, 63) if case.context == 1 else (48, 16)
    return TeacherCase(TINY[case.shape], *lengths, load_in_4bit=case.load_in_4bit)


def show(name: str, figures: Result) -> None:
    print(name)
    for key, value in figures.items():
        if isinstance(value, str):
            print(f"  {key}: {value}", flush=True)
        else:
            print(f"  {key:<32}{value:>16,.4g}" if value < 1000 else f"  {key:<32}{value:>16,.0f}", flush=True)


if __name__ == "__main__":
    main()
