"""Train the embedded demo teacher and its tokenizer, from nothing but this interpreter's standard library.

    python scripts/train_demo_models.py --out models/embedded

A byte-level BPE of 2,048 pieces and a GPT-2-layout model of 2.7 M parameters (5 layers, d=192, 256 positions),
trained on the `train` split of `kd.data.demo.stdlib_text`; weights are stored as float16. Everything is seeded. The
figures of the run that made the committed weights are in docs/log.md. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from kd.data.demo.stdlib_text import documents

VOCABULARY_SIZE = 2048
END = "<|endoftext|>"


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def stream(tokenizer: Tokenizer, split: str) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    assert end is not None
    ids: list[int] = []
    for _, text in documents(split):
        ids += [end, *tokenizer.encode(text).ids]
    return torch.tensor(ids)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, ids: torch.Tensor, width: int) -> float:
    model.eval()
    blocks = ids[: len(ids) // width * width].view(-1, width)
    total = sum(model(b, labels=b).loss.item() * len(b) for b in blocks.split(32))  # type: ignore[no-untyped-call]
    model.train()
    return total / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer([text for _, text in documents("train")], args.out)
    train_ids, dev_ids = stream(tokenizer, "train"), stream(tokenizer, "heldout")
    config = GPT2Config(  # no attention dropout: it has no fused kernel and costs 3x
        vocab_size=VOCABULARY_SIZE,
        n_positions=256,
        n_embd=192,
        n_layer=5,
        n_head=6,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(train_ids):,} training tokens, {len(dev_ids):,} held-out", flush=True)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    warmup, width, start = 100, 256, time.time()
    for step in range(args.steps):
        progress = max(0.0, (step - warmup) / (args.steps - warmup))
        rate = args.lr * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.randint(len(train_ids) - width, (args.batch,)).tolist()
        batch = torch.stack([train_ids[o : o + width] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.steps - 1:
            dev = held_out_loss(model, dev_ids, width)
            seconds = time.time() - start
            print(
                f"step {step:5d}  train {loss.item():.4f}  held-out {dev:.4f} nats/token  {seconds:.0f} s", flush=True
            )
            weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
            save_file(weights, str(args.out / "model.safetensors"), metadata={"format": "pt"})
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(args.out)


if __name__ == "__main__":
    main()
