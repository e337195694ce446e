"""What a row of adaptive length costs and is worth beside a fixed top-k: bytes per token, and the error of a student's gradient.

    python benchmarks/train_teacher.py --tokenizer PATH/gpt2 --data wiki.train.tokens --steps 4110 --out teacher
    python benchmarks/train_teacher.py --tokenizer PATH/gpt2 --data wiki.train.tokens --steps 200 --out student
    python benchmarks/adaptive.py --teacher teacher --student student --data wiki.valid.tokens --limit 8

Every cache is written from the same scored rows, as `sizes.py` does, with every file counted; what a cache has once is spread over
a million rows. The error is the definition used everywhere here: for the first `--positions` rows, the gradient of the loss with
respect to the student's logits from the *decoded* cache is compared with that of the dense KL, in float64, as
RMS(difference) / RMS(dense), at temperatures 1 and 2. Beside it, at T = 1, stands the same of the gradient summed over all
positions: a bias stays there, and what draws scatter averages out. `--rules tails` are heads with draws from their tails
(`--tail-samples`), which train `kl` at T = 1.

    python benchmarks/adaptive.py --teacher demo --data demo --limit 20 --seq-len 128 --positions 1500 --rules certain

makes the table of certain rows in docs/how-to/choose-k-and-profile.md, without a cache or a student: `usual_student` of
`kd.cache_builder.teacher.fidelity` stands for one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sizes import kept_by, parser_of, plan_of, plan_with, read_rate, score, write
from torch import Tensor

from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.store.profiles import ID_CODECS
from kd.cache_builder.store.readers.reader import CacheReader, quality_means
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.teacher.fidelity import Pilot, error_of_first, lengths_kept
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets

WIDEST = 256
"""Tokens per row that are scored, the most that an adaptive row may keep."""
ROWS = 1_000_000
"""Rows over which the files are spread that a cache has once."""
CERTAIN = (0.0, 0.1, 0.3, 0.5, 1.0)
"""Nats below which a row is certain."""
DRAWN = ("tail_ids", "tail_draws", "sample_ids", "sample_counts")
FIXED = (8, 16, 32, 64, 128)
LEAST = (0.01, 0.005, 0.003, 0.002, 0.0015, 0.001)
TAILS = (
    (16, 0.0, 50),
    (64, 0.0, 50),
    (WIDEST, 0.05, 25),
    (WIDEST, 0.02, 50),
    (WIDEST, 0.01, 100),
    (WIDEST, 0.005, 200),
)
"""Most tokens kept, their least probability, and `tail_samples`."""


def configs(
    codecs: tuple[str, ...], ids: str, fixed: tuple[int, ...], rules: tuple[str, ...]
) -> Iterator[tuple[str, TargetConfig]]:
    for k, least, draws in TAILS if "tails" in rules else ():
        profile, rule = ("adaptive", f"p >= {least:g}") if least else ("kl", f"k = {k}")
        given = {"min_probability": least} if least else {}
        config = TargetConfig.of_profile(profile, top_k=k, tail_samples=draws, id_codec=ids, **given)  # type: ignore[arg-type]
        yield f"{rule}, {draws} draws", config
    if "draws" in rules:
        yield "50 draws of the whole row", TargetConfig.of_profile("sampled", samples=50)
    for k in fixed if "fixed" in rules else ():
        yield f"k = {k}", TargetConfig(top_k=k, id_codec=ids)
    for codec in codecs if "adaptive" in rules else ():
        for least in LEAST:
            config = TargetConfig.of_profile(
                "adaptive", top_k=WIDEST, min_probability=least, logprob_codec=codec, id_codec=ids
            )
            yield f"p >= {least:g}, {codec}", config


def scored(plan: BuildPlan, shards: list[RawTargets], config: TargetConfig) -> list[RawTargets]:
    """The rows as the teacher would hand them on for these settings; draws need a pass of their own."""
    if config.uniforms:
        return score(plan_with(plan, config))
    return [kept_by(first_tokens(raw, config.top_k), config) for raw in shards]


def first_tokens(raw: RawTargets, k: int) -> RawTargets:
    assert raw.token_ids is not None
    assert raw.relative is not None
    return replace(raw, token_ids=raw.token_ids[:, :k], relative=raw.relative[:, :k])


@torch.no_grad()
def dense_logits(name: str, plan: BuildPlan, positions: int) -> Tensor:
    """`[positions, V]` float64 logits of the first rows of the plan."""
    model, size = load_model(ModelRequest(name, device="cpu")), plan.manifest.vocabulary_size
    parts, count = list[Tensor](), 0
    for row in plan.rows:
        if count >= positions:
            break
        ids = torch.from_numpy(np.concatenate([row.context_ids, row.target_ids])).long()
        logits = model(ids[None]).logits[0, len(row.context_ids) - 1 : -1, :size]
        parts.append(logits)
        count += len(logits)
    return torch.cat(parts)[:positions].double()


def print_certain(logits: Tensor) -> None:
    """The table of rows that are called certain: their share, tokens kept per row, and the error for `usual_student`."""
    p, ids = logits.softmax(dim=1).sort(dim=1, descending=True)
    pilot = Pilot(p, ids)
    print(f"{len(p):,} rows, {pilot.entropy:.2f} nats\n\n| rows | bound | certain rows, tokens, error |\n|---|--:|---|")
    for name, most, rule in (("k = 16", 16, {"min_k": 16}), ("p >= 0.002", WIDEST, {"min_probability": 0.002})):
        for bound in CERTAIN:
            config = TargetConfig.of_profile("adaptive", top_k=most, certain_below=bound, **rule)
            kept = lengths_kept(pilot, config)
            share = f"{float((pilot.entropies < bound).double().mean()):.0%}" if bound else "none"
            print(
                f"| {name} | {bound or 'none'} | {share}, {float(kept.double().mean()):.1f}, {error_of_first(pilot, kept):.3f} |"
            )


def gradient(objective: Objective, student: Tensor, targets: LossTargets) -> Tensor:
    logits = student.clone()
    objective.gradient_(logits, targets)
    return logits


def errors(reader: CacheReader, teacher: Tensor, student: Tensor, temperature: float) -> tuple[float, float]:
    """RMS of the gradient's difference over that of the dense gradient: over rows, and of the sum of all rows."""
    positions, blocks = len(teacher), []
    summed, dense_sum = torch.zeros_like(teacher[0]), torch.zeros_like(teacher[0])
    tail = "sampled" if temperature == 1.0 and reader.config.uniforms else "ghost"
    whole = targets_of(reader.read_rows(range(min(len(reader), positions))), temperature)
    for rows in (slice(start, min(start + 64, positions)) for start in range(0, positions, 64)):
        part = whole[rows]
        estimate = gradient(Objective("kl", tail, temperature=temperature), student[rows], part)
        p, q = ((logits[rows] / temperature).softmax(1) for logits in (teacher, student))
        dense = temperature * (q - p)
        blocks.append((float((estimate - dense).square().sum()), float(dense.square().sum())))
        summed += (estimate - dense).sum(0)
        dense_sum += dense.sum(0)
    wrong, dense_square = np.sum(blocks, axis=0)
    return float(np.sqrt(wrong / dense_square)), float(summed.norm() / dense_sum.norm())


def targets_of(targets: SoftTargets, temperature: float) -> LossTargets:
    def tensor(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(values.astype(np.int64))

    if targets.token_ids is None:
        ids, counts = tensor(targets.sample_ids), tensor(targets.sample_counts)
        return LossTargets(torch.from_numpy(targets.gold_ids), sample_ids=ids, sample_counts=counts)
    return LossTargets(
        torch.from_numpy(targets.gold_ids),
        torch.from_numpy(targets.token_ids.astype(np.int64)),
        torch.from_numpy(targets.logprobs_at(temperature)),
        torch.from_numpy(targets.tail_mass_at(temperature)),
        kept=tensor(targets.kept),
        tail_ids=tensor(targets.tail_ids),
        tail_draws=tensor(targets.tail_draws),
    )


def weights(root: Path) -> dict[str, float]:
    """Bytes per token by part."""
    rows = load_manifest(root).rows
    parts = {"ids": 0.0, "values": 0.0, "draws": 0.0, "rest": 0.0, "text": 0.0}
    for path in (p for p in root.rglob("*") if p.is_file()):
        name, size = path.relative_to(root).parts, path.stat().st_size
        if name[0] == "targets.zarr" and path.name != "zarr.json":
            kinds = {"token_ids": "ids", "followers": "ids", "logprobs": "values"} | dict.fromkeys(DRAWN, "draws")
            kind = kinds.get(name[1], "rest")
            parts[kind] += size / rows
        elif name[0] in ("examples", "commits"):
            parts["text" if name[0] == "examples" else "rest"] += size / rows
        else:
            parts["once"] = parts.get("once", 0.0) + size / ROWS
    return parts


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--student", help="not needed for --rules certain")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--rules", default="fixed,adaptive,draws,tails")
    parser.add_argument("--codecs", default="graded,graded-coarse", help="of the adaptive rows")
    parser.add_argument("--id-codec", default="frequency", choices=ID_CODECS)
    parser.add_argument("--fixed", default=",".join(map(str, FIXED)), help="k of the rows of one length")
    args = parser.parse_args()
    fixed = tuple(int(k) for k in args.fixed.split(",") if k)
    with tempfile.TemporaryDirectory() as folder:
        args.work = folder
        plan = plan_of(args, TargetConfig(top_k=WIDEST))
        if args.rules == "certain":
            print_certain(dense_logits(args.teacher, plan, args.positions))
            return
        if args.student is None:
            parser.error("errors of these rules need a --student")
        shards = score(plan)
        teacher, student = (dense_logits(name, plan, args.positions) for name in (args.teacher, args.student))
        print(f"{plan.manifest.rows:,} rows; errors over {len(teacher):,}\n")
        header = ("rule", "tokens, draws", "ids", "values", "draws", "rest", "text", "all, B/token")
        print("| " + " | ".join((*header, "error, T = 1", "of the sum", "T = 2", "read, k/s")) + " |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        rules = tuple(args.rules.split(","))
        for name, config in configs(tuple(args.codecs.split(",")), args.id_codec, fixed, rules):
            root = Path(folder) / "cache"
            write(plan_with(plan, config), scored(plan, shards, config), root)
            reader, sizes = CacheReader(root), weights(root)
            means = quality_means(reader.manifest)
            tokens, draws = means.get("tokens_kept", config.top_k), means.get("tail_draws", config.samples)
            one = errors(reader, teacher, student, 1.0)
            two = f"{errors(reader, teacher, student, 2.0)[0]:.4f}" if config.top_k else ""
            columns = " | ".join(f"{sizes[part]:.1f}" for part in ("ids", "values", "draws", "rest", "text"))
            rate = max(read_rate(root) for _ in range(2)) / 1000
            print(
                f"| {name} | {tokens:.1f}, {draws:.1f} | {columns} | **{sum(sizes.values()):.1f}** | {one[0]:.4f} | {one[1]:.4f} | "
                f"{two} | {rate:,.0f} |",
                flush=True,
            )
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
