"""Is this cache made for this student? Every answer "no" stops the run before its first step.

"The same tokenizer" means that every id the data can hold stands for the same piece: the cache carries the bytes
of every teacher id, and the student's ids must stand for the same ones. More ids on the student's side (a pad
token, padded logits) do no harm.
"""

from __future__ import annotations

from typing import Any

from kd.cache_builder.reader import CacheReader
from kd.cache_builder.targets import TargetConfig
from kd.data.errors import CacheMismatchError, DataError
from kd.data.models import max_positions
from kd.data.tokenizer import Tokenizer, token_bytes
from kd.student_trainer.losses import LOSSES, Objective


def refuse_other_tokenizer(reader: CacheReader, tokenizer: Tokenizer, *, purpose: str, advice: str) -> None:
    """Raise CacheMismatchError unless every id of the cache stands for the same bytes in the model's tokenizer.

    `purpose` says what compares token by token, `advice` what to try.
    """
    teacher, student = reader.vocabulary(), token_bytes(tokenizer)
    differing = [i for i, piece in enumerate(teacher) if i >= len(student) or student[i] != piece]
    if differing:
        first = differing[0]
        other = repr(student[first].decode("utf-8", "replace")) if first < len(student) else "no such id"
        raise CacheMismatchError(
            f"the model's tokenizer is not the teacher's, and {purpose} compares token by token",
            cache=reader.root,
            differs=f"{len(differing)} of {len(teacher)} ids",
            first=f"id {first}: teacher {teacher[first].decode('utf-8', 'replace')!r}, model {other}",
            teacher=reader.manifest.provenance.get("teacher"),
            try_=advice,
        )


def refuse_narrow_student(reader: CacheReader, config: Any, longest: int) -> None:
    """Raise DataError when the student has fewer logits than the cache has ids, or too few positions."""
    if int(config.vocab_size) < reader.manifest.vocabulary_size:
        raise CacheMismatchError("the student has fewer logits than the cache has ids", cache=reader.root,
                                 found=config.vocab_size, expected=f"at least {reader.manifest.vocabulary_size}")  # fmt: skip
    limit = max_positions(config)
    if limit is not None and longest > limit:
        raise DataError("the cache's examples are longer than the student's window", cache=reader.root,
                        found=f"{longest} tokens", expected=f"at most {limit}",
                        try_=f"a cache built with --seq-len {limit}, or another student")  # fmt: skip


def resolve_objective(
    config: TargetConfig, *, loss: str, tail: str, alpha: float | None, temperature: float
) -> Objective:
    """Fill in `auto`: ghost where top-k ids are stored, sampled where only draws are.

    `alpha` is the weight of the distillation loss; None = 1 for kl, 0 for ce. Raises DataError where the cache does
    not hold what the loss needs.
    """
    if loss == "ce":
        unused = {"--alpha": alpha not in (None, 0.0), "--temperature": temperature != 1.0, "--tail": tail != "auto"}
        if any(unused.values()):
            raise DataError("cross-entropy has no teacher to weigh or soften", found="--loss ce with "
                            + ", ".join(k for k, given in unused.items() if given),
                            try_="--loss kl, or leave them out")  # fmt: skip
        return Objective("ce", "none", 0.0, 1.0)
    if loss not in LOSSES:
        return Objective(loss)  # raises with the list of names
    has_top_k, has_samples = bool(config.top_k) and config.profile in ("kl", "full"), bool(config.samples)
    if tail == "auto":
        tail = "ghost" if has_top_k or not has_samples else "sampled"
    if (tail == "sampled" and not has_samples) or (tail != "sampled" and not has_top_k):
        raise DataError(f"this cache cannot serve --loss {loss} --tail {tail}", found=f"profile {config.profile}",
                        expected="profile kl or full for ghost and renorm; sampled or full for sampled",
                        try_="kd cache build --profile kl")  # fmt: skip
    if temperature not in config.temperatures:
        raise DataError("this cache does not hold that temperature", found=f"--temperature {temperature:g}",
                        expected=f"one of {', '.join(f'{t:g}' for t in config.temperatures)}",
                        try_="a temperature of the grid, or build with --temperatures")  # fmt: skip
    if tail == "sampled" and temperature != 1.0:
        raise DataError("draws serve temperature 1 only", found=f"--temperature {temperature:g}", expected="1",
                        try_="--tail ghost with a cache of profile kl")  # fmt: skip
    if alpha is not None and not 0.0 <= alpha <= 1.0:
        raise DataError("alpha is a weight", found=f"--alpha {alpha:g}", expected="0..1")
    return Objective(loss, tail, 1.0 if alpha is None else alpha, temperature)
