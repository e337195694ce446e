"""Side by side: the same teacher, texts, k and student through this project and through others; writes docs/benchmarks.md.

    python benchmarks/peers.py --trl-python ~/venvs/trl/bin/python     # ten CPU-minutes and more, much of it TRL's GOLD
    python benchmarks/peers.py --page-from docs/figures/benchmarks.json    # the page and its figures again, nothing run

Every case runs in a process of its own with one thread; the cases take turns, and ratios are of one turn, then the median
over turns. Time is CPU time of the whole process, so that other work on the machine counts little; memory is the highest
resident set above what was resident with all imports done and no model loaded.

    teacher   bare          model(ids).logits, nothing kept
              kd            the whole `build`: from a loaded model to a verified cache
              torch, parquet, megatron, distillkit      logits, log_softmax, top-k, and `peer_encodings`
    stored    the same rows of the embedded teacher: bytes on disk, KL of what is read back, time to read
    student   plain         transformers' own cross-entropy
              ce, kl, uld   ours, from the cache, reading included
              naive         KL over the renormalised top-k of `torch`, on materialised logits, by autograd
              trl-sft, trl-gkd, trl-gold    `peer_trl.py`, where there is a TRL: --trl-python, or installed beside kd
    growth    `growth.py`
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_encodings import ENCODINGS, head_kl
from peers_page import TRL_CASES, write_page
from workload import (
    PROMPT_TOKENS,
    CachedStudent,
    Meter,
    batches_of,
    build_cache,
    load_model,
    make_model,
    make_texts,
    one_thread,
    step,
    train_plain,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sizes:
    """What the cases share."""

    vocabulary: int = 50257
    teacher: tuple[int, int] = (256, 4)
    """Width and layers"""
    student: tuple[int, int] = (128, 2)
    length: int = 256
    """Tokens of every text"""
    top_k: int = 64
    teacher_batch: int = 8
    """Texts"""
    teacher_batches: int = 2
    student_batch: int = 4
    steps: int = 3
    """Counted ones"""
    stored_texts: int = 128
    growth: dict[str, tuple[int, ...]] | None = None
    """Values of some axes; None = all axes and their own"""


QUICK = Sizes(
    vocabulary=2048,
    teacher=(64, 1),
    student=(32, 1),
    length=32,
    teacher_batches=1,
    teacher_batch=2,
    student_batch=2,
    steps=1,
    stored_texts=4,
    growth={"k": (16, 64)},
)


def prepare(work: Path, sizes: Sizes) -> None:
    """Models, texts, our two caches, and the naive script's files."""
    (work / "sizes.json").write_text(json.dumps(asdict(sizes)))
    make_model(work / "teacher", sizes.vocabulary, *sizes.teacher)
    make_model(work / "student", sizes.vocabulary, *sizes.student, seed=1)
    make_texts(work / "texts.jsonl", (sizes.steps + 1) * sizes.student_batch, sizes.length)
    make_texts(work / "teacher.jsonl", sizes.teacher_batches * sizes.teacher_batch, sizes.length)
    make_texts(work / "one.jsonl", 1, sizes.length)
    make_texts(work / "stored.jsonl", sizes.stored_texts, sizes.length)
    for profile in ("kl", "uld"):
        for _ in build_cache(
            work / "teacher",
            work / "texts.jsonl",
            work / f"cache-{profile}",
            profile=profile,
            batch_tokens=sizes.student_batch * sizes.length,
        )[1]:
            pass
    (work / "naive").mkdir()
    teacher = load_model(work / "teacher").eval()
    for number, batch in enumerate(token_batches(work, "texts", sizes.student_batch)):
        ENCODINGS["torch"].write(work / "naive", number, *score(teacher, batch, sizes.top_k), sizes.vocabulary)


def token_batches(work: Path, name: str, size: int) -> list[list[list[int]]]:
    return batches_of(work / f"{name}.jsonl", size)


def score(model: Any, batch: list[list[int]], top_k: int) -> tuple[Any, Any]:
    """What most scripts do: ids and log-probabilities `[n, k]` from the full tensor, of all rows but the last of a text."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor(batch), use_cache=False).logits[:, :-1]
        top = logits.float().log_softmax(-1).topk(top_k)
        return top.indices.flatten(0, 1).numpy(), top.values.flatten(0, 1).numpy()


def teacher_case(name: str, work: Path, sizes: Sizes) -> dict[str, float]:
    import torch

    import kd.cache_builder.teacher.teacher_pass  # noqa: F401  # the meter's base has all imports

    meter = Meter()
    model = load_model(work / "teacher").eval()
    batches = token_batches(work, "teacher", sizes.teacher_batch)
    tokens = sum(len(ids) for batch in batches for ids in batch)

    def run(texts: str, batches: list[list[list[int]]], out: Path) -> None:
        for number, batch in enumerate(batches if name != "kd" else ()):
            if name == "bare":
                with torch.inference_mode():
                    model(torch.tensor(batch), use_cache=False)
            else:
                ENCODINGS[name].write(out, number, *score(model, batch, sizes.top_k), sizes.vocabulary)
        if name == "kd":
            _, steps = build_cache(
                work / "teacher",
                work / texts,
                out / "cache",
                top_k=sizes.top_k,
                batch_tokens=sizes.teacher_batch * sizes.length,
                model=model,
            )
            meter.start()  # tokenising and fingerprints are the plan's
            for _ in steps:
                pass

    with tempfile.TemporaryDirectory(dir=work) as first, tempfile.TemporaryDirectory(dir=work) as second:
        run("one.jsonl", [batches[0][:1]], Path(first))  # imports what is imported on first use
        meter.start()
        run("teacher.jsonl", batches, Path(second))
        meter.stop()
    return meter.result(tokens)


def stored_case(work: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Bytes per row, KL of what is read back, CPU microseconds per row to read: everyone on the embedded teacher's rows."""
    import numpy as np
    import torch

    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.models.loading import load_model as load_request
    from kd.models.model_request import ModelRequest

    model = load_request(ModelRequest("demo", device="cpu")).eval()
    batches = token_batches(work, "stored", min(32, sizes.stored_texts))
    with torch.inference_mode():
        true = [model(torch.tensor(b), use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1) for b in batches]
    size, count = true[0].shape[1], sum(map(len, true))
    readers: dict[str, Callable[[], list[tuple[Any, Any]]]] = {}
    for name, encoding in ENCODINGS.items():
        folder = work / f"stored-{name}"
        folder.mkdir()
        for number, rows in enumerate(true):
            top = rows.topk(sizes.top_k)
            encoding.write(folder, number, top.indices.numpy(), top.values.numpy(), size)
        readers[name] = lambda e=encoding, f=folder: [e.read(f, n, size) for n in range(len(true))]  # type: ignore[misc]
    for _ in build_cache("demo", work / "stored.jsonl", work / "stored-kd", batch_tokens=2048, top_k=sizes.top_k)[1]:
        pass

    def read_ours() -> list[tuple[Any, Any]]:
        examples = CacheReader(work / "stored-kd").read(range(sizes.stored_texts))
        return [(e.targets.token_ids, e.targets.logprobs) for e in examples]

    readers["kd"] = read_ours
    whole = torch.cat(true)
    spent: dict[str, list[float]] = {name: [] for name in readers}
    figures_of: dict[str, dict[str, float]] = {}
    for turn in range(4):
        for name, read in readers.items():
            started = time.process_time()
            parts = read()
            if turn:  # the first reading imports
                spent[name].append(1e6 * (time.process_time() - started) / count)
                continue
            ids, logprobs = (np.concatenate(p) for p in zip(*parts, strict=True))
            exact = whole.gather(1, torch.from_numpy(ids)).numpy()
            files = [p for p in (work / f"stored-{name}").rglob("*") if p.is_file()]
            figures_of[name] = {
                "bytes": sum(p.stat().st_size for p in files) / count,
                "head_kl": head_kl(exact, logprobs),
            }
    return {name: figures | {"read_us": statistics.median(spent[name])} for name, figures in figures_of.items()}


def student_case(name: str, work: Path, sizes: Sizes) -> dict[str, float]:
    import torch

    import kd.student_trainer.training  # noqa: F401  # the meter's base has all imports

    meter = Meter()
    tokens = sizes.student_batch * sizes.length
    if name in ("ce", "kl", "uld"):
        cache = "cache-uld" if name == "uld" else "cache-kl"
        student = CachedStudent(work / "student", work / cache, name)
        student.train(1, tokens)
        meter.start()
        student.train(sizes.steps, tokens)
    else:
        batches = token_batches(work, "texts", sizes.student_batch)
        model = load_model(work / "student").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        run = train_plain if name == "plain" else naive_steps(work / "naive", sizes.vocabulary)
        run(model, optimizer, batches[:1])
        meter.start()
        run(model, optimizer, batches[1:])
    meter.stop()
    return meter.result(sizes.steps * tokens)


def naive_steps(folder: Path, vocabulary: int) -> Callable[[Any, Any, Any], None]:
    """Steps on the files of `ENCODINGS['torch']`, one file per batch, in order."""
    import torch

    numbers = iter(range(10**6))

    def run(model: Any, optimizer: Any, batches: Any) -> None:
        for batch in batches:
            ids, logprobs = map(torch.from_numpy, ENCODINGS["torch"].read(folder, next(numbers), vocabulary))
            p = logprobs.log_softmax(-1)
            q = model(torch.tensor(batch), use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1).gather(1, ids)
            (p.exp() * (p - q)).sum(-1).mean().backward()
            step(model, optimizer)

    assert PROMPT_TOKENS == 1  # all rows of a file are scored
    return run


STAGES = {"teacher": ("bare", "kd", *ENCODINGS), "student": ("plain", "ce", "kl", "uld", "naive", *TRL_CASES)}
"""Stage -> its cases; the first is what the others are compared with."""


def run_child(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(name: str, work: Path, sizes: Sizes, trl_python: str | None) -> Any:
    if name in TRL_CASES:
        assert trl_python is not None
        steps = 1 if name == "trl-gold" else sizes.steps  # minutes each on a CPU
        return run_child(
            [
                trl_python,
                str(HERE / "peer_trl.py"),
                name.removeprefix("trl-"),
                "--work",
                str(work),
                "--batch",
                str(sizes.student_batch),
                "--steps",
                str(steps),
            ]
        )
    return run_child([sys.executable, str(HERE / "peers.py"), "--case", name, "--work", str(work)])


def find_trl(asked: str | None) -> str | None:
    """An interpreter that has trl, or None."""
    if asked is None:
        return sys.executable if importlib.util.find_spec("trl") else None
    try:
        done = subprocess.run([asked, "-c", "import trl"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"--trl-python {asked}: {error.strerror}") from error
    if done.returncode:
        raise SystemExit(f"--trl-python {asked} has no trl: {done.stderr.strip().splitlines()[-1]}")
    return asked


def summarise(runs: dict[str, list[dict[str, Any]]], base: str) -> dict[str, dict[str, float]]:
    """Medians over turns, and ratios to `base` within each turn, then their median."""
    table: dict[str, dict[str, float]] = {}
    for name, turns in runs.items():
        row = {key: statistics.median(t[key] for t in turns) for key in ("us", "peak_mb")}
        for key in ("us", "peak_mb"):
            row[f"{key}_ratio"] = statistics.median(t[key] / b[key] for t, b in zip(turns, runs[base], strict=True))
        table[name] = row
    return table


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    versions = {name: version(name) for name in ("torch", "transformers", "zarr", "pyarrow")}
    return {"cores": os.cpu_count(), "cpu": cpu, "python": platform.python_version(), "versions": versions}


def measure(
    sizes: Sizes, cases: set[str] | None, repeats: int, trl_python: str | None, save: Callable[[dict[str, Any]], None]
) -> None:
    """Run everything; `save` gets what the page is made of after every turn, so that a run cut short is not lost."""
    results: dict[str, Any] = {"sizes": asdict(sizes), "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if cases != {"growth"}:
            prepare(work, sizes)
        for stage, names in STAGES.items():
            chosen = [n for n in names if (cases is None or n in cases) and (n not in TRL_CASES or trl_python)]
            if not chosen:
                continue
            if names[0] not in chosen:
                chosen.insert(0, names[0])
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
            for turn in range(repeats):
                for name in chosen:
                    print(f"{stage}, turn {turn + 1}: {name}", file=sys.stderr)
                    runs[name].append(run_case(name, work, sizes, trl_python))
                if stage == "student":
                    results["trl"] = next((r[0]["versions"] for n, r in runs.items() if n in TRL_CASES), None)
                save(results | {stage: summarise(runs, names[0]), f"{stage}_turns": runs})
            results |= {stage: summarise(runs, names[0]), f"{stage}_turns": runs}
        if cases is None or "stored" in cases:
            print("stored", file=sys.stderr)
            results["stored"] = run_case("stored", work, sizes, trl_python)
            save(results)
    if cases is None or "growth" in cases:
        from growth import AXES

        results["growth"] = {}
        for axis in AXES if sizes.growth is None else sizes.growth:
            print(f"growth: {axis}", file=sys.stderr)
            values = [] if sizes.growth is None else ["--values", ",".join(map(str, sizes.growth[axis]))]
            results["growth"][axis] = run_child([sys.executable, str(HERE / "growth.py"), axis, *values])
            save(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trl-python", metavar="PATH", help="interpreter that has trl; default: this one, where it does"
    )
    parser.add_argument("--repeats", type=int, default=2, help="turns of every case")
    parser.add_argument(
        "--cases",
        help="some of them, separated by commas; also `stored` and `growth`; the "
        "others stay as they are in figures/benchmarks.json",
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, one turn: does it run?")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="where benchmarks.md and figures/ go")
    parser.add_argument("--page-from", type=Path, metavar="JSON", help="write the page from an earlier run's figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sizes = Sizes(**json.loads((args.work / "sizes.json").read_text()))
        run = {"teacher": teacher_case, "student": student_case}
        result = (
            stored_case(args.work, sizes)
            if args.case == "stored"
            else next(run[stage](args.case, args.work, sizes) for stage, names in STAGES.items() if args.case in names)
        )
        print(json.dumps(result))
        return
    known = {name for names in STAGES.values() for name in names} | {"stored", "growth"}
    cases = set(args.cases.split(",")) if args.cases else None
    if cases and not cases <= known:
        parser.error(f"no such case: {', '.join(sorted(cases - known))}; there are {', '.join(sorted(known))}")
    if args.page_from:
        write_page(json.loads(args.page_from.read_text()), args.out)
        return
    trl_python = find_trl(args.trl_python)
    if trl_python is None:
        print("no trl here: its rows are left out (--trl-python PATH)", file=sys.stderr)
    started = time.perf_counter()
    sizes = QUICK if args.quick else Sizes()
    raw = args.out / "figures" / "benchmarks.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(raw.read_text()) if cases and raw.exists() else {}
    if earlier and earlier["sizes"] != json.loads(json.dumps(asdict(sizes))):
        raise SystemExit(f"{raw} has other sizes; another --out")

    def save(results: dict[str, Any]) -> None:
        raw.write_text(json.dumps(earlier | results, indent=1) + "\n")
        write_page(earlier | results, args.out)

    measure(sizes, cases, 1 if args.quick else args.repeats, trl_python, save)
    print(f"{args.out / 'benchmarks.md'}, {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
