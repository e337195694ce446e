"""What ULD loses when the teacher is a few values and the mass of rank bands: relative error against full vocabularies.

    python benchmarks/uld.py --teacher demo --student RUN --data demo:heldout

For 1,024 positions of real text, teacher rows go through the cache's own selection and codec; ULD and its gradient
with respect to the student's logits are compared with those of both whole vocabularies in float64. Per line:

    value     mean |error| / mean value
    rows      RMS over positions of |error| / |gradient| (positions of tiny gradients count as much as others)
    logits    |error| / |gradient| over all logits of all positions
    hidden    the same for the gradient of the hidden states: what flows into the student's body
    weight    the same for the gradient of the output layer's weight

in per cent, for the exact order and for the fast bins. Without bands the tail is taken to be zero; one band is what a cache of a
served teacher has.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.targets import RawTargets, TargetConfig, band_edges
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import split_head
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.student_trainer.losses.by_group import sorted_distance, uld
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets

SPLITS = ((16, 0), (16, 1), (16, 8), (16, 16), (20, 12), (24, 8), (64, 0), (64, 1), (64, 8), (64, 16), (128, 1))
"""Values and bands of a row. One band is the tail of a teacher that gives log-probabilities alone. 16 and 16, 20 and 12, and
24 and 8 cost the same."""


def hidden_and_logits(name: str, rows: list[TokenRows], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[N, d]` and `[N, V]` of the first `count` scored positions, and the output layer's weight `[V, d]`."""
    head = split_head(load_model(ModelRequest(name, device="cpu")))
    with torch.no_grad():
        hidden = head.scored_hidden([r.context_ids for r in rows], [r.target_ids for r in rows])[:count]
        logits = head.logits(hidden).float()
        return hidden, logits, head.weight[: logits.shape[1]].double()


def cached(logits: Tensor, gold: Tensor, config: TargetConfig, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Head and bands at `temperature` as a student reads them from a cache."""
    chunk = Sparsifier(config, logits.shape[1])(logits, gold)
    names = ("log_z", "gold_logprob", "gold_rank", "relative", "tail_bands")
    kept: dict[str, Any] = {n: None if (v := getattr(chunk, n)) is None else v.numpy() for n in names}
    raw = RawTargets(gold_ids=gold.numpy(), byte_end=np.arange(len(gold)), **kept)
    stored, _ = codecs.encode(raw, config)
    dtypes = {spec.name: spec.dtype for spec in codecs.array_specs(config, logits.shape[1])}
    packed = {name: value.astype(dtypes.get(name, value.dtype)) for name, value in stored.items()}
    targets = codecs.decode(packed, config)
    bands = None if targets.tail_bands is None else torch.from_numpy(targets.tail_bands[:, 0])
    return torch.from_numpy(targets.logprobs_at(temperature)).float(), bands


def errors(value: Tensor, grad: Tensor, exact: Tensor, dense: Tensor, hidden: Tensor, weight: Tensor) -> str:
    off = grad.double() - dense
    figures = (
        (value.double() - exact).abs().mean() / exact.mean(),
        (off.norm(dim=1) / dense.norm(dim=1)).square().mean().sqrt(),
        off.norm() / dense.norm(),
        (off @ weight).norm() / (dense @ weight).norm(),
        (off.T @ hidden).norm() / (dense.T @ hidden).norm(),
    )
    return " ".join(f"{100 * float(f):7.3f}" for f in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--student", required=True, help="any model with the teacher's tokenizer")
    parser.add_argument("--data", default="demo:heldout")
    parser.add_argument("--positions", type=int, default=1024)
    args = parser.parse_args()
    rows: list[TokenRows] = []
    tokenizer = load_request_tokenizer(ModelRequest(args.teacher))
    for row in tokenize_corpus(load_corpus(args.data), tokenizer, BlockConfig(129)):
        rows.append(row)
        if sum(len(r.target_ids) for r in rows) >= args.positions:
            break
    gold = torch.from_numpy(np.concatenate([r.target_ids for r in rows])[: args.positions]).long()
    n = len(gold)
    _, teacher, _ = hidden_and_logits(args.teacher, rows, n)
    hidden, student, weight = hidden_and_logits(args.student, rows, n)
    hidden = hidden.double()
    print(f"{n} positions, vocabulary {teacher.shape[1]}; per cent")
    print(
        f"{'':<22}{'exact: value  rows  logits  hidden  weight':>44}{'fast: value  rows  logits  hidden  weight':>48}"
    )
    for temperature in (1.0, 2.0):
        leaf = student.double().requires_grad_()
        whole = torch.softmax(teacher.double() / temperature, dim=1).sort(dim=1, descending=True).values
        exact = sorted_distance(whole, torch.softmax(leaf / temperature, dim=1))
        (dense,) = torch.autograd.grad(exact.sum(), leaf)
        print(f"T={temperature:g}, mean value {float(exact.detach().mean()):.4f}")
        for (k, bands), codec in product(SPLITS, ("linear8", "graded", "graded-fine", "float16")):
            config = TargetConfig(
                "uld",
                top_k=k,
                tail_bands=bands,
                temperatures=(1.0, 2.0),
                band_temperatures=(temperature,),
                logprob_codec=codec,
            )
            head, mass = cached(teacher, gold, config, temperature)
            edges = tuple(band_edges(k, teacher.shape[1], bands)) if bands else ()
            zeros = torch.zeros(n)
            groups = GroupTargets(torch.arange(n), torch.arange(n) + 1, gold, zeros, zeros, zeros + 1, head, mass)
            line = []
            for ranking in ("exact", "fast"):
                leaf = student.clone().requires_grad_()
                value = uld(leaf, groups, GroupSettings(temperature, edges, ranking))
                (grad,) = torch.autograd.grad(value.sum(), leaf)
                line.append(errors(value.detach(), grad, exact.detach(), dense, hidden, weight))
            print(f"  k={k:<3} {bands:>2} bands {codec:<12}" + "    ".join(line))


if __name__ == "__main__":
    main()
