"""Cut a folder of task rows into train and dev: `python scripts/split_tasks.py TASKS OUT boolq paws anli_r1 cosmos_qa`.

TASKS/TASK/*.jsonl holds labelled rows of one split (a slice of a validation set, say); OUT/TASK/train.jsonl and dev.jsonl get
every row once, each fifth one in dev. OUT then is a `--task-root`. Rows about one passage may lie on both sides: what is
measured on such a dev compares students with each other and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def split(source: Path, out: Path) -> tuple[int, int]:
    """Rows of train and of dev."""
    lines = [line for file in sorted(source.glob("*.jsonl")) for line in file.read_bytes().splitlines() if line.strip()]
    out.mkdir(parents=True, exist_ok=True)
    dev = lines[4::5]
    train = [line for number, line in enumerate(lines) if number % 5 != 4]
    for name, rows in (("train", train), ("dev", dev)):
        (out / f"{name}.jsonl").write_bytes(b"".join(row + b"\n" for row in rows))
    return len(train), len(dev)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    for name in args.names:
        train, dev = split(args.tasks / name, args.out / name)
        print(f"{name}: {train} train, {dev} dev")


if __name__ == "__main__":
    main()
