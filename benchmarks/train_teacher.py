"""Train the teacher of `sizes.py`: a small GPT-2-layout model with a real tokenizer of 50,257 pieces, on real text.

    python benchmarks/train_teacher.py --tokenizer PATH/gpt2 --data wiki.train.tokens --out teacher

What a cache of it weighs is closer to a large teacher's than a model of random weights (whose ids do not compress) or
one with a small vocabulary. The longer it is trained, the more its ids depend on the text before, and the more they
weigh: docs/cache-format.md has two, of 866 and 4,110 steps. The output layer is nine tenths of a step at this size: until
the last part of the steps the sum over the vocabulary is estimated from its FREQUENT ids and as many drawn from the rest.
The weights are never committed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

WIDTH, BATCH, WARMUP, EXACT = 256, 6, 0.03, 0.94
"""Positions of a training row, rows per step; parts of the steps: the rate rises until, the sum is exact from."""
FREQUENT = 2048


def step_loss(model: GPT2LMHeadModel, batch: torch.Tensor, frequent: torch.Tensor | None) -> float:
    """Mean cross-entropy of a batch, nats, its gradients added; logits 64 positions at a time, or memory is the clock.

    With `frequent` ids the sum over the others is that over FREQUENT of them, times how many they stand for.
    """
    weight = model.lm_head.weight
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(batch).last_hidden_state[:, :-1].flatten(0, 1)
    gold, total = batch[:, 1:].flatten(), 0.0
    if frequent is None:
        leaf = hidden.detach().requires_grad_()
        for rows, ids in zip(leaf.split(64), gold.split(64), strict=True):  # type: ignore[no-untyped-call]
            with torch.autocast("cpu", torch.bfloat16):
                logits = functional.linear(rows, weight)
            loss = functional.cross_entropy(logits.float(), ids, reduction="sum") / len(gold)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        hidden.backward(leaf.grad)
        return total
    rare = torch.randint(len(weight), (2 * FREQUENT,))
    rare = rare[~torch.isin(rare, frequent)][:FREQUENT]
    share = torch.zeros(FREQUENT + len(rare))
    share[FREQUENT:] = math.log((len(weight) - FREQUENT) / len(rare))
    rows_of = weight[torch.cat([frequent, rare, gold])]
    with torch.autocast("cpu", torch.bfloat16):
        logits = functional.linear(hidden, rows_of[: len(share)]).float()
    gold_logits = (hidden * rows_of[len(share) :]).sum(1).float()
    rest = torch.where(torch.isin(gold, frequent), -torch.inf, gold_logits)
    loss = (torch.logaddexp((logits + share).logsumexp(1), rest) - gold_logits).mean()
    loss.backward()
    return float(loss.item())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    return sum(float(model(r[None], labels=r[None]).loss) for r in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=866)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    ids = torch.tensor(tokenizer(args.data.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    train, held_out = ids[:-8192], ids[-8192:].view(-1, WIDTH)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=WIDTH,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 32,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    frequent = torch.bincount(train, minlength=config.vocab_size).topk(FREQUENT).indices
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} training tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(args.steps):
        done = step / args.steps
        rate = min(1.0, done / WARMUP + 0.01) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        offsets = torch.randint(len(train) - WIDTH, (BATCH,)).tolist()
        batch = torch.stack([train[o : o + WIDTH] for o in offsets])
        optimizer.zero_grad(set_to_none=True)
        loss = step_loss(model, batch, frequent if done < EXACT else None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  {done:.0%}  train {loss:.3f} nats per token", flush=True)
    model.eval()
    print(f"step {args.steps}  held out {held_out_loss(model, held_out):.3f} nats per token")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
