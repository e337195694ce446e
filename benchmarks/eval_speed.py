"""Rank classification and HellaSwag against lm-evaluation-harness: the same model, rows and numbers, as a ratio.

    python benchmarks/eval_speed.py --shared ../shared/data              # needs lm-eval and the shared rows

Both sides score the same strings (`harness` protocol, `together` encoding) and the largest difference of a
log-probability (nats) is printed. They take turns; CPU seconds of the process, medians, one thread: what waits is not
counted. lm-eval is given the best of several batch sizes, tried first; tokenisation counts on both sides. `separate`
is ours with every option passing through the model together with its own copy of the context.

    stories260K   the real 260 K model, 512 ids           gpt2-small   random, GPT-2's tokenizer and 50,257 ids
    neox-small    random, Pythia's, 50,304                t5-small     random T5, 32,128
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, T5Config

from kd.common.progress import final
from kd.data.corpus import Corpus
from kd.data.rows.example import Example
from kd.evaluation.measures.choices import evaluate_choices
from kd.evaluation.measures.hellaswag import Scenes, evaluate_hellaswag, load_scenes
from kd.evaluation.scoring import shared_context
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.loading import random_model
from kd.models.tokenizer import load_tokenizer

CONFIGS = {
    "gpt2-small": ("gpt2", GPT2Config(n_embd=256, n_layer=4, n_head=4)),
    "neox-small": (
        "gpt-neox-20b",
        GPTNeoXConfig(
            vocab_size=50304, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        ),
    ),
    "t5-small": (
        "t5",
        T5Config(
            vocab_size=32128,
            d_model=256,
            d_kv=64,
            d_ff=512,
            num_layers=4,
            num_heads=4,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        ),
    ),
}
BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def load(name: str, shared: Path) -> tuple[Any, Any]:
    if name == "stories260K":
        folder = str(shared / "weights" / name)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    tokenizer, config = CONFIGS[name]
    torch.manual_seed(0)
    return random_model(config, torch.float32).eval(), load_tokenizer(str(shared / "tokenizers" / tokenizer))


def boolq(shared: Path, limit: int) -> Corpus:
    """A passage, a question and four answers: a long context, options of a few tokens."""
    lines = (shared / "tasks/boolq/sample200.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:limit]]
    choices = (" yes", " no", " it is not possible to say", " that depends on the passage")
    examples = tuple(
        Example(
            f"boolq/{i}",
            choices[0],
            f"{row['passage'][:600]}\n\nQuestion: {row['question']}?\nAnswer:",
            choices=choices,
            answer=0,
        )
        for i, row in enumerate(rows)
    )
    return Corpus("boolq", "dev", "pairs", examples, {})


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def contenders(
    model: Any, tokenizer: Any, work: Scenes | Corpus
) -> tuple[Callable[[], np.ndarray], list[tuple[str, str]]]:
    """Ours, and the strings (context, continuation) that lm-eval is given."""
    if isinstance(work, Scenes):

        def ours() -> np.ndarray:
            steps = evaluate_hellaswag(model, tokenizer, work, protocol="harness")
            return np.concatenate(final(steps).nats)

        asked = final(evaluate_hellaswag(model, tokenizer, work, protocol="harness")).asked
        return ours, [(a.context, f" {e}") for a in asked for e in a.endings]

    def ranked() -> np.ndarray:
        steps = evaluate_choices(model, tokenizer, work, reading=ReadingOptions(separator=""), encoding="together")
        return np.concatenate(final(steps).option_nats)

    return ranked, [(e.prompt, choice) for e in work.examples for choice in e.choices]


def compare(name: str, task: str, shared: Path, rows: int, repeats: int) -> str:
    model, tokenizer = load(name, shared)
    work = load_scenes(shared / "tasks", rows) if task == "hellaswag" else boolq(shared, rows)
    ours, strings = contenders(model, tokenizer, work)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in strings]
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"

    def theirs(size: int, some: int | None = None) -> Callable[[], np.ndarray]:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=size, device="cpu")
        return lambda: np.array([nats for nats, _ in lm.loglikelihood(requests[:some], disable_tqdm=True)])

    tried = {size: timed(theirs(size, len(requests) // 4))[0] for size in BATCH_SIZES}
    size = min(tried, key=lambda s: tried[s])
    shares = shared_context.shares_context

    def separate() -> np.ndarray:
        shared_context.shares_context = lambda head: False
        try:
            return ours()
        finally:
            shared_context.shares_context = shares

    runs = {"ours": ours, "separate": separate, "lm-eval": theirs(size)}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    scores_of: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for key, run in runs.items():
            taken, scores_of[key] = timed(run)
            seconds[key].append(taken)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    difference = np.abs(scores_of["ours"] - scores_of["lm-eval"]).max()
    return (
        f"{name:<13}{task:<11}{middle['ours']:>8.2f}{middle['separate']:>10.2f}{middle['lm-eval']:>9.2f} ({size:>2})"
        f"{middle['lm-eval'] / middle['ours']:>8.2f}{middle['separate'] / middle['ours']:>10.2f}{difference:>12.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", default="stories260K,gpt2-small,neox-small,t5-small")
    parser.add_argument("--tasks", default="hellaswag,boolq")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print("model        task           ours  separate  lm-eval (b)   ratio  separate  difference")
    for name in options.models.split(","):
        for task in options.tasks.split(","):
            print(compare(name, task, options.shared, options.rows, options.repeats), flush=True)


if __name__ == "__main__":
    main()
