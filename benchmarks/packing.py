"""What packing is worth: target tokens per CPU second of a forward and backward pass, and the share of padding.

    kd cache build --teacher demo-t5 --data mini --profile full --out CACHE
    python benchmarks/packing.py --cache CACHE --seq-len 112 --seq-len 128 --seq-len 256

For a student with an encoder (`random:demo-t5-student`, KL) and a causal one (`random:demo-student`, cross-entropy),
the first batches of one plan without packing, then of one per `--seq-len`; all plans take turns, batch by batch, so that
other work on the machine disturbs them alike. CPU seconds of the process, one thread: what waits is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kd.cache_builder.store.readers.reader import CacheReader
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective

KL, CE = Objective(), Objective("ce", "none", 0.0, 1.0)
STUDENTS = {"random:demo-t5-student": ("demo-t5", KL, 1216), "random:demo-student": ("demo", CE, 2048)}


class Contender:
    """One way to cut the same examples into batches."""

    def __init__(
        self,
        reader: CacheReader,
        text: StudentText,
        objective: Objective,
        *,
        two_sides: bool,
        budget: int,
        seq_len: int | None,
    ) -> None:
        tokens, rows = text.lengths()
        lengths = np.stack([tokens - rows, rows], axis=1) if two_sides else tokens[:, None]
        capacity = None if seq_len is None else (seq_len,) * lengths.shape[1]
        self.name = "plain" if seq_len is None else f"packed {seq_len}"
        self.plan = plan_batches(reader, lengths, seed=0, tokens_per_batch=budget, capacity=capacity)
        self.collator = Collator(objective, text, start_ids=(0,) if two_sides else (), capacity=capacity)
        self.reader, self.seconds, self.rows = reader, 0.0, 0

    def steps(self, model: Any) -> Iterator[None]:
        for batch in self.plan:
            tensors = self.collator(self.reader.read(batch.examples))
            started = time.process_time()
            model(**tensors)["loss"].backward()
            self.seconds += time.process_time() - started
            self.rows += len(tensors["gold_ids"])
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--seq-len", type=int, action="append", required=True)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = CacheReader(args.cache)
    print(f"{'student':<24}{'sequences':<14}{'examples':>9}{'padding':>9}{'tokens/s':>10}{'ratio':>7}")
    for name, (tokenizer, objective, width) in STUDENTS.items():
        request = ModelRequest(name, device="cpu", tokenizer=tokenizer)
        model = load_model(request).train()
        two_sides = bool(model.config.is_encoder_decoder)
        size = reader.manifest.vocabulary_size if objective is KL else width
        attach_loss(model, objective, size)
        text = StudentText(reader, load_request_tokenizer(request), window=None, encoder=two_sides)
        contenders = [
            Contender(reader, text, objective, two_sides=two_sides, budget=args.tokens_per_batch, seq_len=n)
            for n in (None, *args.seq_len)
        ]
        for _, *_ in zip(range(args.batches), *(c.steps(model) for c in contenders), strict=False):
            pass
        for c in contenders:
            speed = c.rows / c.seconds
            ratio = speed / (contenders[0].rows / contenders[0].seconds)
            per_batch = sum(len(batch.examples) for batch in c.plan) / len(c.plan)
            print(f"{name:<24}{c.name:<14}{per_batch:>9.1f}{c.plan.padding_share:>9.3f}{speed:>10,.0f}{ratio:>7.2f}")


if __name__ == "__main__":
    main()
