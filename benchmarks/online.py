"""From a cache against a teacher in memory: the same student, rows, order and steps, with the outcome and its price.

    kd cache build --teacher demo --data demo --limit 80 --seq-len 128 --out CACHE
    python benchmarks/online.py --cache CACHE --steps 80 --seeds 0,1,2

Every arm runs in a process of its own, in the plain loop of `examples/plain_loop.py`:

    cache    KL from the cache's top-k and the rest as one outcome; the teacher is never loaded
    online   KL from the teacher's whole distribution, which it works out for every batch
    ce       cross-entropy alone
    trl      TRL's GKDTrainer on the same batches, off-policy (lmbda=0, beta=0, temperature=1); with --trl-python alone

Printed: KL of the student from the teacher over all tokens of held-out blocks (nats per token), and its difference from `online`
over the same seeds, with the standard error over seeds and blocks; CPU microseconds per token, and the memory of the loop above
that of the process before models are loaded. The cache's own cost is printed by `kd cache build`.

TRL 1.16's DistillationTrainer reads prompts alone and lets the student write, so it has no off-policy training to compare with;
GKDTrainer with lmbda=0 is that. `--trl-python` names an interpreter that has kd and trl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workload import Meter

import kd
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus

ARMS = ("ce", "cache", "online", "trl")
HELD_OUT = 48
"""Blocks on which students are compared with the teacher."""
IGNORED = -100
"""The label that transformers leaves out."""


def dense_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """`[N, V], [N, V] -> [N]` nats, over all tokens."""
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def train(arm: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one student; its held-out KL by block, and what the training took."""
    meter = Meter()
    torch.manual_seed(seed)
    student, tokenizer = kd.load_student(args.student, seed=seed)
    loss: Any = "ce" if arm == "ce" else "kl"
    dataset = kd.CacheDataset(args.cache, student, tokenizer, tokens_per_batch=2048, seed=seed, loss=loss)
    teacher = kd.load_teacher(args.teacher)[0].eval() if arm == "online" else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    student.train()
    if arm == "trl":
        tokens = train_with_trl(student, tokenizer, dataset, (optimizer, schedule), args, meter)
        return meter.result(tokens) | {"kl": held_out_kl(student.eval(), args.teacher)}
    tokens = 0
    meter.start()
    for batch in first_batches(dataset, args.steps):
        inputs = dataset.inputs(batch)
        logits = student(**inputs).logits
        if teacher is None:
            value = dataset.loss(logits, batch).loss
        else:
            with torch.inference_mode():
                target = teacher(**inputs).logits.flatten(0, 1)[batch["positions"]]
            value = dense_kl(target, logits.flatten(0, 1)[batch["positions"]]).mean()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += len(batch["positions"])
    meter.stop()
    return meter.result(tokens) | {"kl": held_out_kl(student.eval(), args.teacher)}


def first_batches(dataset: kd.CacheDataset, steps: int) -> Iterator[dict[str, Tensor]]:
    """The batches of so many steps, pass after pass."""
    return islice((batch for _ in iter(int, 1) for batch in dataset), steps)


def train_with_trl(
    student: Any, tokenizer: Any, dataset: kd.CacheDataset, optimizers: Any, args: argparse.Namespace, meter: Meter
) -> int:
    """Train with TRL's GKDTrainer on the same batches in the same order; the number of target tokens."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class InOrder(GKDTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(numbers)

    batches = [labelled(dataset.inputs(batch), batch["positions"]) for batch in first_batches(dataset, args.steps)]
    numbers = Dataset.from_dict({"number": range(len(batches))})
    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": folder, "max_steps": args.steps, "per_device_train_batch_size": 1, "max_grad_norm": 1.0}
        quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
        plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_dropout": False}
        trainer = InOrder(
            model=student,
            teacher_model=kd.load_teacher(args.teacher)[0].eval(),
            args=GKDConfig(lmbda=0.0, beta=0.0, temperature=1.0, **common, **quiet, **plain),
            train_dataset=numbers,
            data_collator=lambda rows: batches[rows[0]["number"]],
            processing_class=getattr(tokenizer, "hf", tokenizer),
            optimizers=optimizers,
        )
        meter.start()
        trainer.train()
        meter.stop()
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)


def labelled(inputs: dict[str, Any], positions: Tensor) -> dict[str, Tensor]:
    """What TRL's loss reads: labels where a position of the student predicts a token that counts, IGNORED elsewhere."""
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    labels.flatten()[positions + 1] = ids.flatten()[positions + 1]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def held_out_kl(student: Any, teacher_name: str) -> list[float]:
    """Mean KL from the teacher of each held-out block."""
    teacher, tokenizer = kd.load_teacher(teacher_name)
    divergences: list[float] = []
    for row in tokenize_corpus(load_corpus("demo:heldout"), tokenizer, BlockConfig(128)):
        if len(row.input_ids) == 128 and len(divergences) < HELD_OUT:
            ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
            divergences.append(
                float(dense_kl(*(m(ids).logits[0, :-1].double() for m in (teacher.eval(), student))).mean())
            )
    return divergences


def paired(kl: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Mean difference over `[seeds, blocks]`, and its standard error from both."""
    difference = kl - baseline
    seeds, blocks = difference.shape
    over = [difference.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0, difference.mean(0).var(ddof=1) / blocks]
    return float(difference.mean()), float(np.sqrt(sum(over)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--teacher", default="demo", help="the teacher of the cache")
    parser.add_argument("--student", default="demo")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--trl-python", metavar="PATH", help="interpreter that has kd and trl, for the arm trl")
    parser.add_argument(
        "--arm", choices=ARMS, help="train this arm alone and print JSON (the benchmark calls itself so)"
    )
    args = parser.parse_args()
    if args.arm is not None:
        print(json.dumps(train(args.arm, args, int(args.seeds))))
        return
    arms = ARMS if args.trl_python else ARMS[:-1]
    runs_of: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in args.seeds.split(","):
        for arm in arms:
            python = args.trl_python if arm == "trl" else sys.executable
            command = [python, __file__, *sys.argv[1:], "--seeds", seed, "--arm", arm]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs_of[arm].append(json.loads(printed.splitlines()[-1]))
    baseline = np.array([run["kl"] for run in runs_of["online"]])
    print("| arm | KL to teacher, held out | against online | CPU us per token | memory, MB |\n|---|--:|--:|--:|--:|")
    for arm, runs in runs_of.items():
        kl = np.array([run["kl"] for run in runs])
        difference, error = paired(kl, baseline)
        against = "" if arm == "online" else f"{difference:+.4f} ± {error:.4f}"
        costs = " | ".join(f"{np.median([run[name] for run in runs]):,.0f}" for name in ("us", "peak_mb"))
        print(f"| {arm} | {kl.mean():.4f} | {against} | {costs} |")


if __name__ == "__main__":
    main()
