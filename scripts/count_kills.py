"""Kill everything that writes a cache, again and again, and count what was lost: `python scripts/count_kills.py --kills 100`.

The ways are build, build with two workers, slice, merge, push, pull and repair. Each run happens in a fork that is killed with
SIGKILL, every other time before a chosen operation that writes (an audit hook counts them), else at a random moment. Then:

- what is there must verify without a finding, if it says that it is a cache;
- the same call must end, with the bytes of an unbroken run;
- nothing must be left behind: no staging folder, no claim, no process.

Late builders are counted too: a builder sleeps (SIGSTOP) before a chosen operation while a second one, whose numbers have other
last bits, finishes the cache; then it wakes up. It must not change a byte.

The result is a table in Markdown. docs/reliability.md holds the last one. It takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from crashing import child, dies_at, killed_at_moment, operations, sleeper, watch, woken  # noqa: E402

from kd.cache_builder.build.build_settings import BuildSettings  # noqa: E402
from kd.cache_builder.build.builder import build  # noqa: E402
from kd.cache_builder.build.from_settings import request_of  # noqa: E402
from kd.cache_builder.build.plan import BuildPlan, plan_build  # noqa: E402
from kd.cache_builder.build.together.engines import build_together  # noqa: E402
from kd.cache_builder.share.pull import pull  # noqa: E402
from kd.cache_builder.share.push import push  # noqa: E402
from kd.cache_builder.store.cache_files import LocalFiles  # noqa: E402
from kd.cache_builder.store.encoding import codecs  # noqa: E402
from kd.cache_builder.store.encoding.arrays import Arrays  # noqa: E402
from kd.cache_builder.store.records.manifest import Layout  # noqa: E402
from kd.cache_builder.store.targets import RawTargets, TargetConfig  # noqa: E402
from kd.cache_builder.upkeep.merge_caches import merge_caches  # noqa: E402
from kd.cache_builder.upkeep.repair import mend, reopen  # noqa: E402
from kd.cache_builder.upkeep.slice_cache import slice_cache  # noqa: E402
from kd.cache_builder.upkeep.verify import verify  # noqa: E402
from kd.common.progress import final  # noqa: E402
from kd.common.settings import make  # noqa: E402

SHARES = {"build": 20, "workers": 10, "slice": 14, "merge": 14, "push": 14, "pull": 14, "repair": 14}
"""Way -> how many of a hundred kills it gets."""
TEXTS = ("The fox went down to the river. " * 40, "The keeper counted seven ships. " * 40)


@dataclass
class Tally:
    """What happened to one way."""

    kills: int = 0
    lost: list[str] = field(default_factory=list)
    """What was lost, in words."""
    seconds: float = 0.0


def planned(out: Path, text: Path) -> BuildPlan:
    """A build of the embedded teacher in shards of 64 rows."""
    values = {"teacher": "demo", "spec": str(text), "out": out, "device": "cpu", "seq_len": 32, "top_k": 8}
    request = request_of(make(BuildSettings, values | {"tokens_per_batch": 64}))
    return plan_build(replace(request, layout=Layout(64, 32)))


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def ways(work: Path) -> dict[str, Callable[[Path], object]]:
    """Way -> a function that writes a cache to a folder, and continues there."""
    one, two = work / "one", work / "two"
    texts = [work / "one.txt", work / "two.txt"]

    def repair(out: Path) -> None:
        """Half of the damage from a copy, the rest by building again."""
        findings = [] if not (out / "manifest.json").exists() else final(verify(out))
        for _ in mend(out, LocalFiles(one), [f for f in findings if f.shard != 1]):
            pass
        if any(f.shard == 1 for f in findings):
            reopen(out, [f for f in findings if f.shard == 1])
        for _ in build(planned(out, texts[0])):
            pass

    return {
        "build": lambda out: list(build(planned(out, texts[0]))),
        "workers": lambda out: list(build_together(planned(out, texts[0]), workers=2)),
        "slice": lambda out: list(slice_cache(one, out, top_k=4)),
        "merge": lambda out: list(merge_caches([one, two], out)),
        "push": lambda out: list(push(one, str(out))),
        "pull": lambda out: list(pull(str(one), out)),
        "repair": repair,
    }


def prepare(work: Path) -> None:
    """The caches that the ways start from, one of them damaged. They are built here, so that forks need import nothing."""
    torch.set_num_threads(1)
    for name, text in zip(("one", "two"), TEXTS, strict=True):
        (work / f"{name}.txt").write_text(text)
        list(build(planned(work / name, work / f"{name}.txt")))
    shutil.copytree(work / "one", work / "damaged")
    for name in ("examples/00000.parquet", "examples/00001.parquet", "vocabulary.parquet"):
        (work / "damaged" / name).write_bytes(b"damage")


def problems(out: Path, action: Callable[[Path], object], unbroken: dict[str, bytes], *, sound: bool) -> list[str]:
    """What is wrong with what a killed run left, and after the same call again. A cache in repair need not be `sound` before."""
    lost: list[str] = []
    if sound and any((out / name).exists() for name in ("manifest.json", "building.json")):
        lost += [f"damage: {f.where} {f.problem}" for f in final(verify(out))]
    code, text = child(lambda: action(out))
    if (code, text) != (0, ""):
        return [*lost, f"the same call again: exit code {code}: {text[:200]}"]
    after = tree(out)
    different = sorted(n for n in after.keys() | unbroken.keys() if after.get(n) != unbroken.get(n))
    return lost + [f"other bytes, or left behind: {name}" for name in different]


def run_way(name: str, action: Callable[[Path], object], work: Path, kills: int, dice: random.Random) -> Tally:
    """Kill one way so many times."""
    tally, started = Tally(), time.monotonic()
    make: Callable[[Path], object] = (lambda out: shutil.copytree(work / "damaged", out)) if name == "repair" else bool
    """What lies there before: nothing, but for a repair."""
    make(work / f"{name}-unbroken")
    make(work / f"{name}-counted")
    assert child(lambda: action(work / f"{name}-unbroken")) == (0, "")
    length = time.monotonic() - started
    unbroken = tree(work / f"{name}-unbroken")
    total = 0 if name == "workers" else operations(lambda: action(work / f"{name}-counted"), work / f"{name}-counted")
    while tally.kills < kills:
        out = work / f"{name}-{tally.kills}-{dice.randrange(10**9)}"
        make(out)
        if total and tally.kills % 2 == 0:
            number = dice.randrange(total)

            def doomed(out: Path = out, number: int = number) -> None:
                watch(out, dies_at(number))
                action(out)

            hit = child(doomed)[0] == -9
        else:
            hit = killed_at_moment(partial(action, out), dice.uniform(0.0, length))
        if hit:
            tally.kills += 1
            if name == "workers" and (left := workers_left()):
                tally.lost.append(f"{left} workers outlived their parent")
            lost = problems(out, action, unbroken, sound=name != "repair")
            tally.lost += [f"{out.name}: {problem}" for problem in lost]
        shutil.rmtree(out, ignore_errors=True)
    tally.seconds = time.monotonic() - started
    return tally


def workers_left() -> int:
    """Builders that still run 40 seconds after their parent was killed."""
    deadline = time.monotonic() + 40
    while (left := len(builders_of_nobody())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def builders_of_nobody() -> list[int]:
    """Processes that `multiprocessing` has spawned in this session, and whose parent is gone."""
    orphans = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            int(fields[3]) == os.getsid(0)
            and fields[1] == "1"
            and b"multiprocessing.spawn" in words
            and fields[0] != "Z"
        ):
            orphans.append(int(folder.name))
    return orphans


def build_alone(out: Path, text: Path) -> None:
    """Build with one builder."""
    list(build(planned(out, text)))


def with_other_last_bits(out: Path, text: Path) -> None:
    """Build as another processor would: the same tokens, and log-probabilities that differ a little."""
    exact = codecs.encode

    def encode(
        raw: RawTargets, config: TargetConfig, *, vocabulary_size: int | None = None
    ) -> tuple[Arrays, dict[str, float]]:
        stored, quality = exact(raw, config, vocabulary_size=vocabulary_size)
        return stored | {"gold_logprob": stored["gold_logprob"] * np.float16(1.01)}, quality

    codecs.encode = encode
    build_alone(out, text)


def run_late(work: Path, sleeps: int, dice: random.Random) -> Tally:
    """Wake builders up late, so many times."""
    tally, started = Tally(), time.monotonic()
    text = work / "one.txt"
    total = operations(lambda: list(build(planned(work / "late", text))), work / "late")
    while tally.kills < sleeps:
        out = work / f"late-{tally.kills}-{dice.randrange(10**9)}"
        pid = sleeper(out, partial(build_alone, out, text), dice.randrange(total))
        if pid is None:
            continue
        tally.kills += 1
        for claim in (out / "commits").glob(".*.claim"):
            os.utime(claim, (1.0, 1.0))
        second = child(partial(with_other_last_bits, out, text))
        finished = {name: data for name, data in tree(out).items() if not name.startswith(".") and "/." not in name}
        codes = (second, woken(pid))
        if codes != ((0, ""), 0):
            tally.lost.append(f"{out.name}: {codes}")
        if tree(out) != finished:
            tally.lost.append(f"{out.name}: the late builder changed a finished cache, or left something behind")
        tally.lost += [f"{out.name}: {f.where} {f.problem}" for f in final(verify(out))]
        shutil.rmtree(out)
    tally.seconds = time.monotonic() - started
    return tally


def table(rows: Sequence[tuple[str, Tally]]) -> str:
    """The result in Markdown."""
    lines = ["| way | kills | lost | seconds |", "|---|---|---|---|"]
    lines += [f"| {name} | {t.kills} | {len(t.lost)} | {t.seconds:.0f} |" for name, t in rows]
    kills, lost = sum(t.kills for _, t in rows), sum(len(t.lost) for _, t in rows)
    return "\n".join([*lines, f"| all | {kills} | {lost} | {sum(t.seconds for _, t in rows):.0f} |"])


def main() -> None:
    """Count, print the table, and end with exit code 1 where anything was lost."""
    parser = argparse.ArgumentParser(description="Kill everything that writes a cache, and count what was lost.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--late", type=int, default=30, help="late builders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one way")
    options = parser.parse_args()
    dice, rows = random.Random(options.seed), list[tuple[str, Tally]]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KD_HOME"] = f"{folder}/home"
        work = Path(folder)
        prepare(work)
        for name, action in ways(work).items():
            if options.only in (None, name):
                kills = max(1, options.kills * SHARES[name] // 100)
                rows.append((name, run_way(name, action, work, kills, dice)))
                print(f"{name}: {rows[-1][1]}", file=sys.stderr, flush=True)
        if options.only in (None, "late"):
            rows.append(("late builders", run_late(work, options.late, dice)))
            print(f"late: {rows[-1][1]}", file=sys.stderr, flush=True)
    print(table(rows))
    sys.exit(any(t.lost for _, t in rows))


if __name__ == "__main__":
    main()
