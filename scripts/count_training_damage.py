"""Kill what trains, damage what it leaves, and count what was lost: `python scripts/count_training_damage.py --kills 100`.

The ways are `kd train`, `kd experiment` and `kd recipe run`. Each run happens in a fork that is killed with SIGKILL, every other
time before a chosen operation that writes (an audit hook counts them), else at a random moment; one kill in three hits the run
that continues, too. The same command again must end, with the weights, the scores and the records of an unbroken run, and
nothing may be left behind.

Damages are a flipped bit, a cut, a file of 0 bytes, a missing file, foreign bytes, and bytes added at the end. They hit a
random file of a stopped run (then it is continued) or of a finished one (then everything in it is read). Each must be refused
in words, or come to nothing: the same weights, records and scores as before.

The result is a table in Markdown. docs/reliability.md holds the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from crashing import child, dies_at, operations, watch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from kd.cli import cli  # noqa: E402
from kd.common.errors import KdError  # noqa: E402
from kd.common.settings import make  # noqa: E402
from kd.evaluation.results import load_report  # noqa: E402
from kd.models.loading import load_model  # noqa: E402
from kd.models.model_config import load_request_tokenizer  # noqa: E402
from kd.models.model_request import ModelRequest  # noqa: E402
from kd.student_trainer.configuration.train_config import TrainConfig  # noqa: E402
from kd.student_trainer.run_folder import read_evaluations, read_log, read_run  # noqa: E402
from kd.student_trainer.training import train  # noqa: E402

SHARES = {"train": 60, "experiment": 20, "recipe": 20}
"""Way -> how many of a hundred kills it gets."""
TIMES = ("tokens_per_second", "wait_share", "seconds")
"""Keys of records that differ from run to run."""
TEXT = "The fox went down to the river to look at the fish, and came home with a story of {} ships.\n"
EXPERIMENT = """
about: small
seeds: [0]
cache: {{teacher: demo, data: "{work}/text.txt", top-k: 4, seq-len: 32, device: cpu}}
train: {{student: demo, max-steps: 4, save-every: 2, batch-size: 2, log-every: 1, device: cpu}}
arms: {{plain: {{loss: ce}}, taught: {{loss: kl}}}}
evaluate: {{tasks: perplexity, data: "{work}/held.txt", seq-len: 32, device: cpu}}
"""
RECIPE = """
about: small
steps:
- command: cache build
  options: {{teacher: demo, data: "{work}/text.txt", top-k: 4, seq-len: 32, device: cpu, out: "{{out}}/cache"}}
- command: train
  options: {{student: demo, cache: "{{out}}/cache", max-steps: 4, save-every: 2, batch-size: 2, log-every: 1, device: cpu,
    out: "{{out}}/run"}}
- command: eval
  arguments: ["{{out}}/run"]
  options: {{tasks: perplexity, data: "{work}/held.txt", seq-len: 32, device: cpu, out: "{{out}}/run/eval"}}
- command: report
  arguments: ["{{out}}/run"]
  options: {{out: "{{out}}/report"}}
"""


def prepare(work: Path) -> None:
    """The texts and files that the ways start from, and a cache. They are built here, so that forks need import nothing."""
    torch.set_num_threads(1)
    documents = [TEXT.format(n) for n in range(24)]
    (work / "text.txt").write_text("<|endoftext|>\n".join(documents))
    (work / "held.txt").write_text("<|endoftext|>\n".join(f"On day {n} the keeper slept.\n" for n in range(4)))
    (work / "experiment.yaml").write_text(EXPERIMENT.format(work=work))
    (work / "recipe.yaml").write_text(RECIPE.format(work=work))
    command(
        "cache", "build", "--teacher", "demo", "--data", work / "text.txt", "--seq-len", 32, "--out", work / "cache"
    )


def command(*words: object) -> None:
    """Run `kd` in this process, its output thrown away."""
    with open(os.devnull, "w") as nowhere:
        out, err = os.dup(1), os.dup(2)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            cli.main([str(word) for word in words], standalone_mode=False)
        finally:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)


def training(work: Path, out: Path, *, resume: bool = True, **more: Any) -> None:
    """Ten steps with a checkpoint after every second; a finished run is left alone."""
    values = {"cache": str(work / "cache"), "student": "demo", "out": str(out), "device": "cpu", "max_steps": 10}
    values |= {"save_every": 2, "batch_size": 2, "log_every": 1, "rescue_dir": str(work / "rescue")}
    if resume and (out / "run.json").exists() and read_run(out)["complete"]:
        return
    train(make(TrainConfig, values), resume=resume, say=lambda sentence: None, **more)


def ways(work: Path) -> dict[str, Callable[[Path], object]]:
    """Way -> a function that works in a folder, and continues there."""
    return {
        "train": partial(training, work),
        "experiment": lambda out: command("experiment", work / "experiment.yaml", "--out", out),
        "recipe": lambda out: command("recipe", "run", work / "recipe.yaml", "--out", out),
    }


def contents(root: Path) -> dict[str, Any]:
    """What must be equal below a folder: every file's bytes; records and documents without their times and folders."""
    content_of: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or "checkpoint-" in name or name.startswith("report") or path.name == "README.md":
            continue
        if path.name == "metrics.jsonl":
            content_of[name] = timeless(read_log(path.parent))
        elif path.name == "run.json":
            document = read_run(path.parent)
            content_of[name] = (document["identity"], document["complete"])
        elif path.name == "eval.json":
            content_of[name] = load_report(path.parent).tasks
        elif path.name not in ("digests.json", "experiment.json"):
            content_of[name] = path.read_bytes()
    return content_of


def timeless(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what differs from run to run."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def killed(action: Callable[[Path], object], out: Path, total: int, length: float, dice: random.Random) -> bool:
    """Run `action` in a fork and kill it; whether the kill came in time."""
    if dice.random() < 0.5:
        number = dice.randrange(total)

        def doomed() -> None:
            watch(out, dies_at(number))
            action(out)

        return child(doomed)[0] == -9
    pid = os.fork()
    if pid == 0:
        with warnings.catch_warnings():
            torch.set_num_threads(1)
            try:
                action(out)
            finally:
                os._exit(0)
    time.sleep(dice.uniform(0.0, length))
    os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9


def kill_way(action: Callable[[Path], object], out: Path, kills: int, dice: random.Random) -> tuple[int, list[str]]:
    """Kill one way so many times: kills that hit, and what was lost, in words."""
    started = time.monotonic()
    assert child(lambda: action(out / "unbroken")) == (0, "")
    length = time.monotonic() - started
    expected = contents(out / "unbroken")
    total = operations(lambda: action(out / "counted"), out / "counted")
    hits, lost = 0, []
    while hits < kills:
        folder = out / f"k{hits}-{dice.randrange(10**9)}"
        for _ in range(2 if dice.random() < 1 / 3 else 1):
            hits += killed(action, folder, total, length, dice)
        code, text = child(lambda folder=folder: action(folder))  # type: ignore[misc]
        if (code, text) != (0, ""):
            lost.append(f"{folder.name}: the same command again: exit code {code}: {text[:300]}")
            continue
        content_of = contents(folder)
        lost += [
            f"{folder.name}: {name}"
            for name in sorted(content_of.keys() | expected)
            if content_of.get(name) != expected.get(name)
        ]
        shutil.rmtree(folder)
    return hits, lost


def flip(data: bytes, dice: random.Random) -> bytes:
    """One bit."""
    changed = bytearray(data)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped bit": flip,
    "cut": lambda data, dice: data[: dice.randrange(len(data))],
    "0 bytes": lambda data, dice: b"",
    "missing": lambda data, dice: None,
    "foreign bytes": lambda data, dice: dice.randbytes(len(data)),
    "longer": lambda data, dice: data + dice.randbytes(dice.randint(1, 64)),
}
"""Kind -> the damaged bytes of a file; None = there is none."""


def damage(folder: Path, dice: random.Random) -> str:
    """Damage a random file; what was done, in words."""
    path = dice.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    kind = dice.choice(list(DAMAGES))
    changed = DAMAGES[kind](path.read_bytes(), dice)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    return f"{kind}: {path.relative_to(folder)}"


def damage_stopped(work: Path, count: int, dice: random.Random) -> Counter[str]:
    """Damage a stopped run, continue it, and compare. Counts per outcome; `missed: …` names what was not noticed."""
    outcomes: Counter[str] = Counter()
    child(lambda: training(work, work / "unbroken"))
    child(lambda: training(work, work / "stopped", on_step=stop_at(7)))
    expected = contents(work / "unbroken")
    for number in range(count):
        out = shutil.copytree(work / "stopped", work / f"s{number}")
        what = damage(out, dice)
        code, text = child(lambda out=out: training(work, out))  # type: ignore[misc]
        if code in (1, 3):
            outcomes["refused in words"] += 1
        elif code == 0 and contents(out) == expected:
            outcomes["continued to the same weights and records"] += 1
        else:
            outcomes[f"missed: {what}: exit code {code} {text[:200]}"] += 1
        shutil.rmtree(out)
    return outcomes


def stop_at(step: int) -> Callable[[Any], None]:
    """Interrupt the run when the line of a step is logged."""

    def on_step(record: Any) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    return on_step


def everything(run: Path) -> tuple[Any, ...]:
    """All that readers take from a finished run: weights, tokens, records, document, scores."""
    request = ModelRequest(str(run), device="cpu")
    tokens = load_request_tokenizer(request).encode("The keeper counted seven ships: ding, dong.")
    weights = {name: value.clone() for name, value in load_model(request).state_dict().items()}
    scores = load_report(run / "eval")
    records = read_log(run), read_evaluations(run), read_run(run)
    return weights, tokens, json.dumps([records, scores.to_dict(), scores.documents], sort_keys=True)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two readings are equal."""
    weights = one[0].keys() == other[0].keys() and all(torch.equal(one[0][n], other[0][n]) for n in one[0])
    return weights and one[1:] == other[1:]


def damage_finished(work: Path, count: int, dice: random.Random) -> Counter[str]:
    """Damage a finished run and its scores, read all of it, and compare."""
    outcomes: Counter[str] = Counter()
    whole = work / "finished"
    child(lambda: training(work, whole))
    for checkpoint in whole.glob("checkpoint-*"):  # nothing reads them any more
        shutil.rmtree(checkpoint)
    command("eval", whole, "--data", work / "held.txt", "--seq-len", 32, "--device", "cpu", "--out", whole / "eval")
    before = everything(whole)
    assert load_file(whole / "model.safetensors")
    for number in range(count):
        out = shutil.copytree(whole, work / f"f{number}")
        what = damage(out, dice)
        try:
            outcomes["harmless" if same(everything(out), before) else f"missed: {what}"] += 1
        except KdError:
            outcomes["refused in words"] += 1
        except Exception as error:
            outcomes[f"missed: {what}: {type(error).__name__}: {str(error)[:200]}"] += 1
        shutil.rmtree(out)
    return outcomes


def main() -> None:
    """Count, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stopped", type=int, default=200, help="damages to a stopped run")
    parser.add_argument("--finished", type=int, default=200, help="damages to a finished run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["KD_HOME"] = str(work / "home")
        prepare(work)
        print("| command | kills | lost |\n|---|---|---|")
        for name, action in ways(work).items() if given.kills else ():
            hits, lost = kill_way(action, work / name, max(1, given.kills * SHARES[name] // 100), dice)
            print(f"| `kd {name}` | {hits} | {len(lost)} |", flush=True)
            print("\n".join(lost), file=sys.stderr)
        print("\n| damaged | damages | outcome |\n|---|---|---|")
        for name, outcomes in (
            ("a stopped run, then continued", damage_stopped(work, given.stopped, dice)),
            ("a finished run, then read", damage_finished(work, given.finished, dice)),
        ):
            missed = sum(n for what, n in outcomes.items() if what.startswith("missed"))
            shown = [f"{what} {n}" for what, n in sorted(outcomes.items()) if not what.startswith("missed")]
            print(f"| {name} | {sum(outcomes.values())} | {', '.join([*shown, f'missed {missed}'])} |", flush=True)
            print("\n".join(what for what in outcomes if what.startswith("missed")), file=sys.stderr)


if __name__ == "__main__":
    main()
