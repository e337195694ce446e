"""Train the embedded T5-shaped teacher and its tokenizer on the embedded task mixture.

    python scripts/train_demo_t5.py --out models/embedded_t5 --compile

A sentencepiece-like Unigram tokenizer (1,200 pieces, white space collapsed, no piece for a line break) and a model in the
layout of T5 v1.1 (gated GELU, RMSNorm, relative positions, an output layer of its own, wider than the tokenizer),
trained on endless fresh examples of the `train` facts of `kd.data.demo.mini_mixture`; weights are stored as float16.
Everything is seeded. The figures of the run that made the committed weights are in docs/log.md. Takes about nine minutes
on one core with `--compile`, which needs a C++ compiler.

T5's own random start and AdamW do not go together at this size (docs/log.md): the model starts with heads that look for
repeated words and with a decoder that copies, and the queries' learning rate is smaller.

Accuracy on held-out facts, printed while it trains: for families with choices the option with the least mean
negative log-likelihood per token (end of sequence included), else the greedy answer, right if `is_right` says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from kd.data.demo.mini_mixture import examples, is_right
from kd.data.demo.stdlib_text import documents
from kd.data.rows.example import Example

PIECES, EXTRA_IDS, LOGITS = 1200, 8, 1216
"""Tokenizer entries, of these sentinels; rows of the output layer (the next multiple of 64)."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, END_ID = 0, 1
NO_LABEL = -100
WIDTHS, TARGET_WIDTH = (36, 54), 16
"""Tokens that training batches are padded to: few shapes, so that `--compile` compiles twice."""


def train_tokenizer(path: Path) -> Tokenizer:
    """Pieces trained on English prose, and every word of the mixture as a piece, scored by its frequency there."""
    space = normalizers.Replace(Regex(r"\s+"), " ")
    normalizer = normalizers.Sequence([normalizers.NFKC(), space, normalizers.Strip()])
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    counts = Counter[str]()
    for e in examples("train", 20_000):
        words = re.findall(r"'s\b|\w+", normalizer.normalize_str(f"{e.prompt} {e.target}"))
        counts.update(word if word == "'s" else f"▁{word}" for word in words)
    known = {word: math.log(n / counts.total()) for word, n in counts.items()}

    prose = Tokenizer(models.Unigram())
    prose.normalizer = normalizer
    # no piece crosses a punctuation mark: "attic" stays "attic" before a full stop
    prose.pre_tokenizer = pre_tokenizers.Sequence([metaspace, pre_tokenizers.Punctuation()])
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        initial_alphabet=[*(chr(c) for c in range(33, 127) if chr(c) not in "{}~"), *"éëñ"],
        show_progress=False,
    )
    prose.train_from_iterator([text for _, text in islice(documents("train"), 120)], trainer)
    trained = json.loads(prose.to_str())["model"]["vocab"]
    special, pieces = trained[:3], [(p, score) for p, score in trained[3:] if p not in known]
    letters = [entry for entry in pieces if len(entry[0]) == 1]
    longer = sorted((entry for entry in pieces if len(entry[0]) > 1), key=lambda entry: -entry[1])
    room = PIECES - EXTRA_IDS - len(special) - len(known) - len(letters)
    vocabulary = sorted([*known.items(), *letters, *longer[:room]], key=lambda entry: (-entry[1], entry[0]))

    tokenizer = Tokenizer(models.Unigram([*map(tuple, special), *vocabulary], unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, metaspace
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (PAD, END, UNKNOWN)])
    sentinels = [f"<extra_id_{i}>" for i in range(EXTRA_IDS)]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, END_ID)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": sentinels,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def new_model(width: int, inner: int, layers: int, decoder_layers: int, heads: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=LOGITS,
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        decoder_start_token_id=PAD_ID,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties a new model's output layer whatever the config says
    model.lm_head.weight = torch.nn.Parameter(torch.randn(LOGITS, width) * width**-0.5)
    torch.nn.init.normal_(model.shared.weight, std=0.3)  # 1.0 moves too slowly under Adam
    start_with_matching(model)
    start_with_copying(model)
    return model


@torch.no_grad()
def start_with_matching(model: T5ForConditionalGeneration) -> None:
    """In the encoder, half of the heads first look at repetitions of their own word, the others to the left or right."""
    config = model.config
    matching = config.num_heads // 2
    rows = matching * config.d_kv
    for block in model.encoder.block:
        attention = block.layer[0].SelfAttention
        attention.k.weight[:rows] = attention.q.weight[:rows] * config.d_kv**0.5  # same word: score sqrt(d_kv)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [bucket, head], all layers
    after = config.relative_attention_num_buckets // 2
    for head in range(matching, config.num_heads):
        near = 1 if (head - matching) % 2 == 0 else after + 1
        bias[near : near + 4, head] += 2.0
    bias[0, :matching] -= 6.0  # bucket 0 is the position itself, which always matches


@torch.no_grad()
def start_with_copying(model: T5ForConditionalGeneration) -> None:
    """What the decoder looks at in the prompt is at first what it writes: a word goes through unchanged."""
    model.lm_head.weight.copy_(model.shared.weight / model.shared.weight.std() * model.config.d_model**-0.5)
    for block in model.encoder.block:  # the word itself outweighs what the layers add to it
        block.layer[0].SelfAttention.o.weight *= 0.3
        block.layer[1].DenseReluDense.wo.weight *= 0.3
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        torch.nn.init.orthogonal_(attention.v.weight)
        attention.o.weight.copy_(attention.v.weight.t())


def padded(rows: Sequence[list[int]], fill: int, width: int = 0) -> torch.Tensor:
    """`[B, T]` with T the longest row, or `width` where that is more."""
    longest = max(width, *map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(list(texts))]  # the post-processor appends END


def losses(model: T5ForConditionalGeneration, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per target token, `[B]` nats, END included; inputs `[B, T]`, labels `[B, n]`."""
    started = torch.cat([torch.full_like(labels[:, :1], PAD_ID), labels[:, :-1].clamp(min=PAD_ID)], dim=1)
    mask = (inputs != PAD_ID).long()
    logits = model(input_ids=inputs, attention_mask=mask, decoder_input_ids=started, use_cache=False).logits
    nll = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none")
    return nll.view(labels.shape).sum(1) / (labels != NO_LABEL).sum(1)


def greedy(model: T5ForConditionalGeneration, prompts: Sequence[list[int]], limit: int = 24) -> list[list[int]]:
    """The most likely token again and again, until END or `limit` tokens."""
    inputs = padded(prompts, PAD_ID)
    mask = (inputs != PAD_ID).long()
    states = model.encoder(input_ids=inputs, attention_mask=mask)
    out = torch.full((len(prompts), 1), PAD_ID)
    for _ in range(limit):
        logits = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=out).logits
        out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if (out == END_ID).any(1).all():
            break
    rows = [row[1:] for row in out.tolist()]
    return [row[: row.index(END_ID)] if END_ID in row else row for row in rows]


@torch.no_grad()
def accuracy(model: T5ForConditionalGeneration, tokenizer: Tokenizer, held_out: Sequence[Example]) -> dict[str, float]:
    """Share of right answers by family; see the module's head."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(held_out), 100):
        batch = held_out[start : start + 100]
        chosen = [e for e in batch if e.choices]
        pairs = [(e.prompt, choice) for e in chosen for choice in e.choices]
        if pairs:
            inputs = padded(encoded(tokenizer, [prompt for prompt, _ in pairs]), PAD_ID)
            rest = losses(model, inputs, padded(encoded(tokenizer, [text for _, text in pairs]), NO_LABEL)).tolist()
            for e in chosen:
                of_example, rest = rest[: len(e.choices)], rest[len(e.choices) :]
                right[e.task].append(of_example.index(min(of_example)) == e.answer)
        written = [e for e in batch if not e.choices]
        if written:
            answers = greedy(model, encoded(tokenizer, [e.prompt for e in written]))
            for e, ids in zip(written, answers, strict=True):
                right[e.task].append(is_right(e, tokenizer.decode(ids)))
    model.train()
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


def save(model: T5ForConditionalGeneration, path: Path) -> None:
    """Write config and float16 weights; training goes on in float32."""
    copy.deepcopy(model).half().save_pretrained(path)


def batches(tokenizer: Tokenizer, size: int, seed: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless batches of `(inputs, labels)` in two halves, the shorter prompts first: less padding, fixed widths."""
    stream = examples("train", 10**9, seed)
    while True:
        batch = list(islice(stream, size))
        prompts, targets = encoded(tokenizer, [e.prompt for e in batch]), encoded(tokenizer, [e.target for e in batch])
        order = sorted(range(size), key=lambda i: len(prompts[i]))
        parts = []
        for half in (order[: size // 2], order[size // 2 :]):
            width = min((w for w in WIDTHS if w >= len(prompts[half[-1]])), default=WIDTHS[-1])
            kept = [i for i in half if len(prompts[i]) <= width]  # none was ever longer than the last width
            parts.append(
                (
                    padded([prompts[i] for i in kept], PAD_ID, width),
                    padded([targets[i] for i in kept], NO_LABEL, TARGET_WIDTH),
                )
            )
        yield parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        default=(192, 384, 4, 2, 4),
        help="Width, inner width, encoder layers, decoder layers, heads.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=300)
    parser.add_argument("--compile", action="store_true", help="Half as fast again; needs a C++ compiler.")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(args.out)
    held_out = list(examples("heldout"))
    model = new_model(*args.shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} pieces", flush=True)
    # T5 folds attention's 1/sqrt(d_kv) into its queries, whose weights are that much smaller than all others: under
    # Adam their steps must be smaller by as much, or attention is thrown about (Adafactor, T5's own, scales by itself)
    queries = [p for name, p in model.named_parameters() if name.endswith(".q.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith(".q.weight")]
    groups = [{"params": others, "share": 1.0}, {"params": queries, "share": model.config.d_kv**-0.5}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    train_losses = torch.compile(losses, dynamic=False) if args.compile else losses
    warmup, start, recent = 50, time.time(), []
    for step, batch in enumerate(batches(tokenizer, args.batch, args.seed)):
        progress = step / args.steps
        rate = args.lr * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        last = step == args.steps
        if not last:
            total = 0.0
            for inputs, labels in batch:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = train_losses(model, inputs, labels).sum() / args.batch
                loss.backward()
                total += loss.item()
            recent.append(total)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if last or (step and step % args.log_every == 0):
            marks = accuracy(model, tokenizer, held_out if last else held_out[:350])
            parts = "  ".join(f"{task} {mark:.2f}" for task, mark in marks.items())
            print(
                f"step {step:5d}  train {sum(recent) / len(recent):.4f} nats/token  {parts}  "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            recent = []
            save(model, args.out)
        if last:
            break


if __name__ == "__main__":
    main()
