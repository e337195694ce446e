"""Memory and time of planning over texts of any size: `python benchmarks/corpora.py --out FOLDER`.

    python benchmarks/corpora.py --out corpora                       all cases; the teacher is tiny and never run
    python benchmarks/corpora.py --out corpora --case 64MB --workers 2
    git worktree add --detach ../before 88e6467 && ln -s .. ../before/.typing/kd
    python benchmarks/corpora.py --out corpora --case few-lines --kept counts --before ../before

Each case is a process of its own. It plans a build (the text in tokens, its shards, its identity) with the tokens on the disk, as
`kd cache build` does, then reads every shard of rows as a builder does, and says its peak memory: of this process, and of those
that tokenise beside it. `--kept counts` is what `kd cache plan` does. Imports are not measured. Texts are made from WikiText in
KD_SHARED's folder. `--before` plans the same text by the code of 88e6467, the last version that held texts in memory, and compares
the CPU time per token and the fingerprints.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Process
from pathlib import Path
from typing import Any

CASES = {
    "16MB": (16 << 20, 4_000),
    "64MB": (64 << 20, 4_000),
    "256MB": (256 << 20, 4_000),
    "one-document": (50 << 20, 50 << 20),
    "lines": (64 << 20, 64),
    "few-lines": (8 << 20, 64),
}
"""Case -> (characters in all, characters of a document)."""


def text_of(size: int, each: int) -> Iterator[str]:
    """Documents of about `each` characters, `size` in all; every round over the source begins elsewhere."""
    source = (Path(os.environ["KD_SHARED"]) / "wikitext-2" / "wiki.train.tokens").read_text(encoding="utf-8")
    made = shift = 0
    while made < size:
        document = ""
        while len(document) < each:
            if shift + each > len(source):
                shift = shift % 977 + 1
            document += source[shift : shift + each - len(document)]
            shift += each
        made += len(document)
        yield document


def write_text(file: Path, size: int, each: int) -> None:
    """Write a text as JSONL."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in text_of(size, each))


def short_text(file: Path) -> Path:
    """A text of one document beside a text: who plans it first has imported everything."""
    short = file.with_name("short.jsonl")
    short.write_text('{"text": "a short text"}\n', encoding="utf-8")
    return short


def measured(folder: Path, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plan one build and read the rows of its shards; called in a process of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.build.request import BuildRequest
    from kd.cache_builder.store.targets import TargetConfig
    from kd.cache_builder.tokens.token_folder import token_folder
    from kd.cache_builder.tokens.token_pass import COUNTS, Keep
    from kd.data.sources import stream_text
    from kd.data.tokenizing.block_config import BlockConfig
    from kd.models.model_request import ModelRequest

    out = folder / f"cache-{file.stem}"
    shutil.rmtree(out, ignore_errors=True)
    request = BuildRequest(
        out,
        ModelRequest(str(args.teacher), device="cpu"),
        stream_text(str(short_text(file))),
        BlockConfig(256),
        TargetConfig.of_profile("kl", top_k=8),
        tokenize_workers=args.workers,
    )
    plan_build(request, COUNTS)  # which imports everything
    request = replace(request, corpus=stream_text(str(file)))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    spent = time.process_time()
    plan = plan_build(request, COUNTS if args.kept == "counts" else Keep(token_folder(out)))
    cpu, seconds = time.process_time() - spent, time.perf_counter() - started
    shards = list(plan.manifest.shards) if args.kept == "files" else []
    rows = sum(len(row.target_ids) for first, stop, _ in shards for row in plan.rows[first:stop])
    assert rows in (0, plan.text.targets)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    store = sum(p.stat().st_size for p in token_folder(out).glob("*")) if args.kept == "files" else 0
    shutil.rmtree(out, ignore_errors=True)
    tokens = plan.tokens
    return {
        "fingerprint": plan.manifest.fingerprint,
        "examples": plan.text.examples,
        "tokens": tokens,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mb": before / 1024,
        "child_peak_mb": children.ru_maxrss / 1024,
        "us_per_token_cpu": 1e6 * (cpu + (children.ru_utime + children.ru_stime if args.workers != 1 else 0)) / tokens,
        "us_per_token": 1e6 * seconds / tokens,
        "store_bytes_per_token": store / tokens,
    }


BEFORE = """
import json, sys, time
from pathlib import Path
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.targets import TargetConfig
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.loading import ModelRequest

def planned(file):
    model, blocks, targets = ModelRequest(sys.argv[2], device="cpu"), BlockConfig(256), TargetConfig.of_profile("kl", top_k=8)
    return plan_build(BuildRequest(Path("none"), model, load_corpus(file), blocks, targets))

planned(sys.argv[3])
spent = time.process_time()
plan = planned(sys.argv[1])
spent = time.process_time() - spent
tokens = sum(len(row.input_ids) for row in plan.rows)
print(json.dumps({"us_per_token_cpu": 1e6 * spent / tokens, "fingerprint": plan.manifest.fingerprint}))
"""
"""Plans a text by the code of 88e6467, after a short one: `python -c BEFORE FILE TEACHER SHORT`."""


def planned_before(checkout: Path, file: Path, teacher: str) -> dict[str, Any]:
    """CPU time per token of that version, and the fingerprint of the cache that it would build."""
    environment = os.environ | {"PYTHONPATH": str(checkout / ".typing")}
    command = [sys.executable, "-c", BEFORE, str(file), teacher, str(short_text(file))]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    figures: dict[str, Any] = json.loads(printed)
    return figures


def main() -> None:
    """Make each text, measure it in a process of its own, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kept", choices=("files", "counts"), default="files")
    parser.add_argument("--teacher", default="demo", help="folder of a teacher, whose tokenizer is used")
    parser.add_argument("--before", type=Path, help="a checkout of 88e6467, whose time is measured beside")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measured(args.out, args.one, args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for case in args.case or CASES:
        file = args.out / f"{case}.jsonl"
        # in a process of its own: what this one has held counts for its children
        writer = Process(target=write_text, args=(file, *CASES[case]))
        writer.start()
        writer.join()
        command = [sys.executable, __file__, "--out", str(args.out), "--one", str(file), "--workers", str(args.workers)]
        command += ["--kept", args.kept, "--teacher", str(args.teacher)]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        fingerprint = figures.pop("fingerprint")
        print(case, {name: round(value, 3) for name, value in figures.items()}, flush=True)
        if args.before is not None:
            old = planned_before(args.before, file, args.teacher)
            share = figures["us_per_token_cpu"] / old["us_per_token_cpu"]
            same = "the same fingerprint" if old["fingerprint"] == fingerprint else "ANOTHER FINGERPRINT"
            print(f"  before {old['us_per_token_cpu']:.3f} us_per_token_cpu, now {share:.1%} of it, {same}", flush=True)
        file.unlink()


if __name__ == "__main__":
    main()
