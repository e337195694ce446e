"""What a truncated teacher costs: relative error of the student's gradient against the full distribution.

    python benchmarks/tails.py --student demo-out/finetuned

Teacher: the embedded one. Student: any model with its tokenizer. For 1,024 held-out positions, the gradient of
each loss with respect to the student's logits is compared with that of the dense KL in float64, as
RMS(error) / RMS(dense) over positions | the same for the sum over all positions (bias shows there, variance averages
out). The rule `rest^(1/T)` treats the left-over mass as one token when it is tempered, as DistillKit does.
Also printed: the true tail mass at T and what that rule makes of it.

A second table has the losses that depend on more of the tail, `reverse-kl` and `jsd`, beside `kl`, against the dense gradient of
the same loss, with the masses that explain the error. Two other readings of the tail are compared there with one outcome
(`ghost`): every token beyond the top-k has the same probability (`even`), or the teacher's own probabilities in the order of
the student's (`ranks`: what rank bands, as fine as one rank, could tell). Neither knows which token has which probability.

A third table asks whether draws from the tail (`--tail-samples`) help these losses at T = 1. For kl they are what training
uses. The other two need the drawn tokens' own log-probabilities too, which a cache does not hold; here they are known. A
divergence Σ_v p_v f(q_v / p_v) is then estimated by its kept tokens, and by each draw's share w of the tail as w f(q_v / p_v). For
jsd, the part of f that grows as q_v is worked out exactly from the student's rest, so what is drawn is bounded. For reverse-kl
nothing bounds it.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from kd.cache_builder.teacher.normalisers import padded_width
from kd.cache_builder.teacher.selection import draw
from kd.cache_builder.teacher.tail_draws import draw_tail
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.student_trainer.losses.by_row import jsd, kl_ghost, kl_renorm, kl_reverse, kl_sampled
from kd.student_trainer.losses.loss_targets import LossTargets


def logits_of(name: str, rows: list[Tensor]) -> Tensor:
    """`[N, V]` float64 logits that predict each token of `rows` but the first."""
    model = load_model(ModelRequest(name, device="cpu"))
    with torch.inference_mode():
        return torch.cat([model(r[None]).logits[0, :-1] for r in rows]).double()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logits)[0]


def errors(estimate: Tensor, dense: Tensor) -> str:
    rms = (estimate - dense).norm() / dense.norm()
    batch = (estimate - dense).sum(0).norm() / dense.sum(0).norm()
    return f"{float(rms):.3f} | {float(batch):.3f}"


def divergence(loss: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """`[N]` nats over all columns; the weight of the two sides of `jsd` is one half."""
    p, q = log_p.exp(), log_q.exp()
    if loss == "kl":
        return (p * (log_p - log_q)).sum(1)
    if loss == "reverse-kl":
        return (q * (log_q - log_p)).sum(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * ((p * (log_p - log_m)).sum(1) + (q * (log_q - log_m)).sum(1))


def tail_readings(log_p: Tensor, log_q: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Name -> the teacher's log-probabilities `[N, V]` with another reading of what lies beyond the kept `ids [N, K]`."""
    beyond = log_p.shape[1] - ids.shape[1]
    tail = log_p.scatter(1, ids, -torch.inf)
    mass = tail.logsumexp(1, keepdim=True)
    improbable = tail.sort(1, descending=True).values[:, :beyond]
    order = log_q.scatter(1, ids, -torch.inf).argsort(1, descending=True)[:, :beyond]
    kept = log_p.gather(1, ids)
    even = (mass - math.log(beyond)).expand_as(log_p).scatter(1, ids, kept)
    return {"even": even, "ranks": log_p.scatter(1, order, improbable).scatter(1, ids, kept)}


def print_losses(teacher: Tensor, student: Tensor, sizes: list[int]) -> None:
    """One line per temperature and k: the masses outside the top-k, and the errors of every loss and reading."""
    readings = ("ghost", "even", "ranks")
    names = [f"{loss}, {reading}" for loss in ("kl", "reverse-kl", "jsd") for reading in readings]
    print("\n| T | k | teacher's rest | student's rest | " + " | ".join(names) + " |")
    print("|--:" * (len(names) + 4) + "|")
    for temperature in (1, 2):
        log_p = (teacher / temperature).log_softmax(1)
        log_q = (student / temperature).log_softmax(1).detach()
        for k in sizes:
            values, ids = log_p.topk(k)
            rest = 1 - values.exp().sum(1)
            targets = LossTargets(torch.zeros(len(ids), dtype=torch.long), ids, values, rest)
            cells = []
            for loss, ghost in (("kl", kl_ghost), ("reverse-kl", kl_reverse), ("jsd", jsd)):
                tempered = (student / temperature).log_softmax(1)
                dense = gradient(divergence(loss, log_p, tempered), student)
                cells.append(errors(gradient(ghost(student, targets, temperature=temperature), student), dense))
                for other in tail_readings(log_p, log_q, ids).values():
                    tempered = (student / temperature).log_softmax(1)
                    cells.append(errors(gradient(divergence(loss, other, tempered), student), dense))
            outside = 1 - log_q.gather(1, ids).exp().sum(1)
            cells = [cell.replace(" | ", ", ") for cell in cells]
            print(
                f"| {temperature} | {k} | {float(rest.mean()):.3f} | {float(outside.mean()):.3f} | {' | '.join(cells)} |"
            )


def drawn_shares(log_p: Tensor, ids: Tensor, most: int) -> Tensor:
    """`[N, V]`: the probability that the draws from each row's tail give to every token; see `tail_draws`."""
    count, size = log_p.shape
    shifted = (log_p - log_p.amax(1, keepdim=True)).float()
    uniforms = torch.rand(count, 1, dtype=torch.float64)
    kept = torch.full((count,), ids.shape[1])
    powers = torch.zeros(count, padded_width(size, "cpu"))
    drawn, draws = draw_tail(shifted, shifted.logsumexp(1), ids, kept, most, uniforms, powers)
    mass = 1 - log_p.gather(1, ids).exp().sum(1, keepdim=True)
    share = mass / draws.unsqueeze(1) * (torch.arange(most) < draws.unsqueeze(1))
    return torch.zeros_like(log_p).scatter_add_(1, drawn.long(), share)


def from_draws(loss: str, log_p: Tensor, log_q: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """`[N]` nats: a divergence from the kept `ids` and from draws whose log-probabilities are known."""
    p, q = log_p.exp(), log_q.exp()
    weight = shares / p  # of what each drawn token adds; 1 for a kept one
    weight = weight.scatter(1, ids, 1.0)
    if loss == "kl":
        return (weight * p * (log_p - log_q)).sum(1)
    if loss == "reverse-kl":
        return (q * log_q - weight * q * log_p).sum(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    bounded = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m - math.log(2)))
    return (weight * bounded).sum(1) + 0.5 * math.log(2) * q.sum(1)


def print_draws(teacher: Tensor, student: Tensor) -> None:
    """One line for each loss, k and number of draws: without and with draws, over rows and of the sum."""
    print("\n| loss | k | `--tail-samples` | one outcome | of the sum | draws | of the sum |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    log_p = teacher.log_softmax(1)
    for loss, ghost in (("kl", kl_ghost), ("jsd", jsd), ("reverse-kl", kl_reverse)):
        for k, most in ((16, 50), (16, 200), (64, 50)):
            values, ids = log_p.topk(k)
            targets = LossTargets(torch.zeros(len(ids), dtype=torch.long), ids, values, 1 - values.exp().sum(1))
            dense = gradient(divergence(loss, log_p, student.log_softmax(1)), student)
            plain = errors(gradient(ghost(student, targets), student), dense)
            shares = drawn_shares(log_p, ids, most)
            drawn = errors(gradient(from_draws(loss, log_p, student.log_softmax(1), ids, shares), student), dense)
            print(f"| {loss} | {k} | {most} | {plain} | {drawn} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--sizes", default="16,64,256,1024", help="k of the second table")
    args = parser.parse_args()
    tokenizer = load_request_tokenizer(ModelRequest("demo"))
    rows: list[Tensor] = []
    for row in tokenize_corpus(load_corpus("demo:heldout"), tokenizer, BlockConfig(129)):
        if len(row.input_ids) == 129 and len(rows) < args.positions // 128:
            rows.append(torch.tensor(row.input_ids, dtype=torch.int64))
    teacher = logits_of("demo", rows)
    student = logits_of(args.student, rows).clone().requires_grad_()
    torch.manual_seed(0)
    print(f"{len(teacher)} positions, vocabulary {teacher.shape[1]}; RMS over positions | sum over the batch")
    print(f"{'':<24}" + "".join(f"{f'T={t} k={k}':>18}" for t in (1, 2, 4) for k in (16, 64)))
    lines: dict[str, list[str]] = {
        n: [] for n in ("renormalised", "rest^(1/T)", "ghost, exact log Z", "k draws from p")
    }
    masses: list[str] = []
    for temperature in (1, 2, 4):
        p = (teacher / temperature).softmax(1)
        dense = gradient((p * (p.log() - (student / temperature).log_softmax(1))).sum(1), student)
        for k in (16, 64):
            values, ids = p.topk(k)
            one = teacher.softmax(1).gather(1, ids)
            left = 1 - one.sum(1)
            tempered = torch.cat([one, left[:, None]], 1) ** (1 / temperature)
            tempered /= tempered.sum(1, keepdim=True)
            gold = torch.zeros(len(ids), dtype=torch.long)
            exact = LossTargets(gold, ids, values.log(), 1 - values.sum(1))
            naive = LossTargets(gold, ids, tempered[:, :-1].log(), tempered[:, -1])
            drawn = draw(teacher - teacher.amax(1, keepdim=True), torch.rand(len(ids), k, dtype=torch.float64).numpy())
            samples = LossTargets(gold, sample_ids=drawn[0], sample_counts=drawn[1])
            for name, loss in (
                ("renormalised", kl_renorm(student, exact, temperature=temperature)),
                ("rest^(1/T)", kl_ghost(student, naive, temperature=temperature)),
                ("ghost, exact log Z", kl_ghost(student, exact, temperature=temperature)),
            ):
                lines[name].append(errors(gradient(loss, student), dense))
            drawn_error = errors(gradient(kl_sampled(student, samples), student), dense) if temperature == 1 else "-"
            lines["k draws from p"].append(drawn_error)
            masses.append(f"{float((1 - values.sum(1)).mean()):.3f} / {float(tempered[:, -1].mean()):.3f}")
    for name, cells in lines.items():
        print(f"{name:<24}" + "".join(f"{c:>18}" for c in cells))
    print(f"{'tail mass true / rule':<24}" + "".join(f"{c:>18}" for c in masses))
    print_losses(teacher, student, [int(k) for k in args.sizes.split(",")])
    print_draws(teacher, student)


if __name__ == "__main__":
    main()
