"""The demo's settings and its outcome: what `kd demo` builds, trains, compares and draws.

Two students start from the same random weights and see the same rows in the same order for the same number of
steps; one learns from the text alone (cross-entropy), one from the teacher's cached predictions (KL). Both are
scored on modules of the standard library that neither they nor the teacher were trained on. Every number in the
outcome is measured in that run. The composition itself (build, train, evaluate) is `kd.cli.demo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cache_builder.files import canonical_json, write_atomic
from kd.data.errors import DataError
from kd.evaluation.comparison import Entry, compare
from kd.evaluation.page import Section, Table
from kd.evaluation.report import write_report

if TYPE_CHECKING:
    from kd.evaluation.results import EvalReport
    from kd.student_trainer.config import TrainConfig
    from kd.student_trainer.train import TrainResult

SEQ_LEN = 128
DOCUMENTS = 160
"""Documents of the training split that are cached: about 300,000 tokens."""
STEPS = 600
RUNS = {"finetuned": "ce", "distilled": "kl"}


def build_options(out: Path) -> dict[str, Any]:
    """The options of `kd cache build` that the demo uses."""
    return {
        "teacher": "demo", "spec": "demo", "out": out / "cache", "split": "train", "columns": {}, "limit": DOCUMENTS,
        "instructions": None,
        "profile": "kl", "top_k": None, "samples": None, "tail_bands": None, "temperatures": (1.0, 2.0, 4.0),
        "band_temperatures": None, "logprob_codec": "linear8", "seq_len": SEQ_LEN, "target_len": None,
        "target_source": "data", "sample_temperature": 0.0,
        "overlong": "error", "stride": None, "bos": True,
        "eos": False, "separator": "\\n", "load_in_4bit": False, "dtype": "auto", "device": "cpu", "revision": None,
        "tokenizer": None, "tokens_per_batch": 4096, "shard_rows": None, "shard": (1, 1), "seed": 0,
    }  # fmt: skip


def train_configs(out: Path, seed: int = 0) -> list[TrainConfig]:
    """One run per entry of RUNS, alike in everything but the loss."""
    from kd.student_trainer.config import TrainConfig

    return [
        TrainConfig(
            cache=str(out / "cache"), student="demo", out=str(out / name), loss=loss, max_steps=STEPS,
            tokens_per_batch=2048, lr=2e-3, schedule="cosine", warmup=0.05, weight_decay=0.1, seed=seed, device="cpu",
        )
        for name, loss in RUNS.items()
    ]  # fmt: skip


def models(out: Path) -> dict[str, str]:
    """Name in the outcome -> model to evaluate."""
    return {"teacher": "demo"} | {name: str(out / name) for name in RUNS}


def evaluation_options() -> dict[str, Any]:
    """The options of `kd eval` that the demo uses: the held-out modules, windows as long as the cached blocks."""
    return {"data": "demo", "split": "heldout", "seq_len": SEQ_LEN, "device": "cpu"}


def require_fresh(out: Path) -> None:
    """Make the folder; raise DataError when a finished or half-finished demo lies there."""
    taken = [name for name in RUNS if (out / name).exists()]
    if taken:
        raise DataError("the demo was run here before", where=out, found=", ".join(taken),
                        try_="another --out, or remove the folder")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)


def write_outcome(out: Path, cache: Mapping[str, Any], build_speed: float, results: Mapping[str, TrainResult],
                  reports: Mapping[str, EvalReport], *, seconds: float) -> dict[str, Any]:  # fmt: skip
    """Write `report/` and `outcome.json`; returns the latter's document: all figures of this run."""
    entries = [Entry(name, report) for name, report in reports.items()]
    comparison = compare(entries)[0]
    names = list(reports)
    finetuned, distilled = names.index("finetuned"), names.index("distilled")
    perplexity = {name: report.tasks["perplexity"]["perplexity"] for name, report in reports.items()}
    gap = perplexity["finetuned"]["value"] - perplexity["distilled"]["value"]
    outcome: dict[str, Any] = {
        "perplexity": {name: figure["value"] for name, figure in perplexity.items()},
        "perplexity_stderr": {name: figure["stderr"] for name, figure in perplexity.items()},
        "bits_per_byte": {n: r.tasks["perplexity"]["bits_per_byte"]["value"] for n, r in reports.items()},
        "parameters": {name: report.parameters for name, report in reports.items()},
        "gain": gap,
        "gain_stderr": comparison.difference_error(finetuned, distilled, "perplexity"),
        "cache": {k: cache[k] for k in ("fingerprint", "rows", "bytes", "bytes_per_token", "top_k",
                                        "mass_kept_mean", "head_kl_mean")},
        "build_tokens_per_second": build_speed,
        "train_tokens_per_second": {name: result.tokens_per_second for name, result in results.items()},
        "steps": {name: result.steps for name, result in results.items()},
        "seconds": seconds,
        "report": str(out / "report" / "report.html"),
    }  # fmt: skip
    lead = Section(
        "What happened",
        text="One pass of the teacher made the cache; both students started from the same random weights and saw the "
        "same rows in the same order for the same number of steps.",
        table=_facts(outcome),
    )
    write_report([out / name for name in names], out / "report", title="kd demo", lead=[lead])
    write_atomic(out / "outcome.json", canonical_json(outcome))
    return outcome


def _facts(outcome: Mapping[str, Any]) -> Table:
    cache, speed = outcome["cache"], outcome["train_tokens_per_second"]
    return Table(
        ["", "measured"],
        [
            ["cached tokens", f"{cache['rows']:,}"],
            ["cache size", f"{cache['bytes'] / 1e6:.1f} MB"],
            ["bytes per token, everything counted", f"{cache['bytes_per_token']:.1f}"],
            [f"teacher's mass in the top {cache['top_k']}", f"{cache['mass_kept_mean']:.4f}"],
            ["KL(teacher || decoded)", f"{cache['head_kl_mean']:.1e} nats"],
            ["teacher pass", f"{outcome['build_tokens_per_second']:,.0f} tokens/s"],
            ["training without teacher", f"{speed['finetuned']:,.0f} tokens/s"],
            ["training from the cache", f"{speed['distilled']:,.0f} tokens/s"],
        ],
    )


def outcome_lines(outcome: Mapping[str, Any]) -> list[str]:
    """The outcome for a terminal."""
    lines = [f"{'':<12}{'parameters':>12}{'held-out perplexity':>24}{'bits per byte':>16}"]
    for name, value in outcome["perplexity"].items():
        figure = f"{value:.2f} ± {outcome['perplexity_stderr'][name]:.2f}"
        lines.append(f"{name:<12}{outcome['parameters'][name]:>12,}{figure:>24}{outcome['bits_per_byte'][name]:>16.3f}")
    better = "lower" if outcome["gain"] > 0 else "HIGHER"
    lines += ["", f"distilled is {abs(outcome['gain']):.2f} ± {outcome['gain_stderr']:.2f} {better} than fine-tuned, "
              "same start, rows and steps (error: paired over documents)", ""]  # fmt: skip
    lines += [f"{row[0]:<40}{row[1]}" for row in _facts(outcome).rows]
    return [*lines, "", f"report: {outcome['report']}   ({outcome['seconds']:.0f} s in all)"]
