"""The page and the figures of `peers.py`, from its raw figures alone: nothing on the page was typed in.

Bars come from `kd.evaluation.report.figures`, as in a report. A part that was not measured is left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_encodings import ENCODINGS

LABELS = {
    "bare": "bare forward pass",
    "kd": "kd cache build",
    "plain": "plain cross-entropy (transformers)",
    "ce": "kd train --loss ce",
    "kl": "kd train --loss kl",
    "uld": "kd train --loss uld",
    "naive": "script, top-k KL on whole logits",
    "trl-sft": "TRL SFTTrainer",
    "trl-gkd": "TRL GKDTrainer, forward KL",
    "trl-gold": "TRL GOLDTrainer, ULD",
    **{name: encoding.label for name, encoding in ENCODINGS.items()},
}
TRL_CASES = ("trl-sft", "trl-gkd", "trl-gold")
HOLDS = {"trl-gkd": "student and teacher", "trl-gold": "student and teacher"}
AXES = {
    "k": "tokens kept per row, k",
    "vocabulary": "vocabulary, entries",
    "length": "sequence length, tokens",
    "rows": "rows in all",
    "batch": "rows per batch",
    "workers": "workers (--shard i/n)",
}
LINES = {"build": "build", "read": "read", "kl": "step, kl", "plain": "step, plain"}


def write_page(results: dict[str, Any], out: Path) -> None:
    """`benchmarks.md` and the figures under `figures/` of the folder `out`."""
    figures = out / "figures"
    parts = [_head(results)]
    if "teacher" in results:
        parts.append(_teacher(results, figures))
    if "stored" in results:
        parts.append(_stored(results, figures))
    if "student" in results:
        parts.append(_student(results, figures))
    if "growth" in results:
        parts.append(_growth(results["growth"], figures))
    (out / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")


def _text(*sentences: str) -> str:
    """One paragraph."""
    return textwrap.fill(" ".join(sentences), 124, break_on_hyphens=False, break_long_words=False) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    versions = {"Python": machine["python"]} | machine["versions"]
    if results.get("trl"):
        versions |= {"trl": results["trl"]["trl"]}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    counts = {
        stage: len(next(iter(results[f"{stage}_turns"].values())))
        for stage in ("teacher", "student")
        if f"{stage}_turns" in results
    }
    turns = f" ({', '.join(f'{stage} {n}' for stage, n in counts.items())})" if counts else ""
    what = _text(
        "The same texts, teacher, k and student through this project and through others. `benchmarks/peers.py` wrote this",
        "page, its figures and the [raw numbers](figures/benchmarks.json), and says what each case does:",
    )
    how = _text(
        f"Machine: {machine['cores']} cores, {machine['cpu']}, no GPU; one thread per case. {listed}. Time is CPU time of a",
        "process of its own, memory its highest resident set above the imports, before any model is loaded.",
        f"Cases take turns{turns}; a ratio is of one turn, shown is the median. The models are",
        "small and their weights random: read the ratios. The larger the model, the less everything beside it weighs.",
    )
    command = "    python benchmarks/peers.py --trl-python PATH    # an interpreter with TRL; without one its rows are left out"
    return f"# Side by side\n\n{what}\n{command}\n\n{how}"


def _teacher(results: Mapping[str, Any], figures: Path) -> str:
    sizes, rows = results["sizes"], results["teacher"]
    width, layers = sizes["teacher"]
    _bars(figures / "teacher.png", rows, "the bare forward pass")
    text = _text(
        f"A GPT-2 of width {width} and {layers} layers with {sizes['vocabulary']:,} entries, batches of",
        f"{sizes['teacher_batch']} x {sizes['length']} tokens, k = {sizes['top_k']}. The bare pass forms all logits and keeps",
        "nothing. `kd cache build` counts everything from a loaded model to committed, checksummed shards: top-k, normalisers",
        "at three temperatures, encoding, text, manifest. The others take log_softmax and top-k of the full logits and write",
        "them in the encoding named; those are re-implementations of ours from their authors' documents",
        "(`benchmarks/peer_encodings.py`), not their programs, and leave out what surrounds them there.",
    )
    return _section(
        "Stage one: the teacher's pass",
        text,
        _ratios(rows, "the bare pass"),
        "teacher.png",
        "Time and memory of the teacher's pass",
    )


def _stored(results: Mapping[str, Any], figures: Path) -> str:
    sizes, rows = results["sizes"], results["stored"]
    table = _table(
        ("", "bytes per row", "KL of what is read back, nats", "to read, CPU µs per row"),
        [(_label(n), f"{r['bytes']:.1f}", f"{r['head_kl']:.1e}", f"{r['read_us']:.2f}") for n, r in _ours_first(rows)],
    )
    _draw_bars(
        figures / "stored.png",
        {
            "bytes per row": [(_label(n), r["bytes"]) for n, r in _ours_first(rows)],
            "to read, CPU µs per row": [(_label(n), r["read_us"]) for n, r in _ours_first(rows)],
        },
    )
    text = _text(
        f"{sizes['stored_texts'] * (sizes['length'] - 1):,} rows of the embedded teacher (trained, 2,048 entries),",
        f"k = {sizes['top_k']}. Ours is the whole folder: text, token ids, normalisers at three temperatures, the gold token's",
        "log-probability and rank, checksums; the others hold ids and log-probabilities only. The KL is between the kept",
        "tokens' probabilities, normalised over them: the teacher's in float32, and what is read back. Read is to arrays in",
        "memory, every file opened anew; ours verifies checksums and tokens. With a larger vocabulary ids take more.",
    )
    return _section("What is stored", text, table, "stored.png", "Bytes and reading time")


def _student(results: Mapping[str, Any], figures: Path) -> str:
    sizes, rows = results["sizes"], results["student"]
    width, layers = sizes["student"]
    _bars(figures / "student.png", rows, "plain cross-entropy")
    missing = [_label(name) for name in TRL_CASES if name not in rows]
    gone = f"\nNot measured for this page: {', '.join(missing)}.\n" if missing else ""
    if len(missing) == len(TRL_CASES):
        gone = "\nTRL was not installed where this page was made: its rows are left out (`--trl-python PATH`).\n"
    text = _text(
        f"A GPT-2 of width {width} and {layers} layers with the teacher's {sizes['vocabulary']:,} entries, batches of",
        f"{sizes['student_batch']} x {sizes['length']} tokens, AdamW, gradients clipped. Ours reads its batches from the cache,",
        "and opening, verifying and decoding it count. The script reads `torch.save` files and forms all logits. TRL's",
        "trainers are as they come, metrics included; GKD and GOLD hold the teacher in memory and run it for every batch (on",
        "the data's own targets, `lmbda=0`). A teacher as small as this one makes that cheap: its cost grows with the teacher,",
        "while a step from the cache stays the same. The teacher's",
        "pass, once per cache, is stage one's.",
    )
    return _section(
        "Stage two: a training step",
        text + gone,
        _ratios(rows, "plain"),
        "student.png",
        "Time and memory of a training step",
    )


def _growth(growth: Mapping[str, Any], figures: Path) -> str:
    _draw_growth(figures / "growth.png", growth)
    tables = []
    for axis, series in growth.items():
        names = list(series["lines"])
        rows = [(f"{x:,}", *(f"{series['lines'][n][i]:,.1f}" for n in names)) for i, x in enumerate(series["x"])]
        heads = [n if n == "bytes" else LINES.get(n, n) for n in names]
        tables.append(_table((AXES[axis], *heads), rows))
    text = _text(
        "CPU microseconds per row, and bytes on disk: one size at a time changes from k = 64, 8,192 entries, 128 tokens, 2,048",
        "rows, 512 rows per batch, with a GPT-2 of width 64 and two layers as teacher and student (`benchmarks/growth.py`).",
        "Workers are processes that build every n-th shard of one cache (32,768 entries); each tokenises the text for itself.",
    )
    return _section("How cost grows", text, "\n".join(tables), "growth.png", "How cost grows")


def _section(title: str, text: str, table: str, figure: str, caption: str) -> str:
    return f"## {title}\n\n{text}\n{table}\n![{caption}](figures/{figure})\n"


def _label(name: str) -> str:
    return LABELS[name]


def _ours_first(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(rows.items(), key=lambda item: item[0] != "kd")


def _ratios(rows: Mapping[str, Mapping[str, float]], base: str) -> str:
    body = [
        (
            _label(n),
            f"{r['us_ratio']:.2f}",
            f"{r['peak_mb_ratio']:.2f}",
            f"{r['us']:,.0f}",
            f"{r['peak_mb']:,.0f}",
            HOLDS.get(n, "student") if base == "plain" else None,
        )
        for n, r in rows.items()
    ]
    head = ("", f"time, {base} = 1", f"memory, {base} = 1", "CPU µs per token", "peak, MB", "models in memory")
    used = len(head) if base == "plain" else len(head) - 1
    return _table(head[:used], [row[:used] for row in body])


def _table(head: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def _bars(path: Path, rows: Mapping[str, Mapping[str, float]], base: str) -> None:
    _draw_bars(
        path,
        {
            f"CPU time, {base} = 1": [(_label(n), round(r["us_ratio"], 2)) for n, r in rows.items()],
            f"peak memory, {base} = 1": [(_label(n), round(r["peak_mb_ratio"], 2)) for n, r in rows.items()],
        },
        longest=LONGEST,
    )


LONGEST = 4.0
"""Ratio at which bars are cut."""


def _draw_bars(path: Path, panels: Mapping[str, Sequence[tuple[str, float]]], longest: float = math.inf) -> None:
    from kd.evaluation.report.figures import Bar, draw_bars

    def short(label: str) -> str:  # the table has all of it
        return label.partition(" (")[0].partition(", ")[0]

    bars = {title: [Bar(short(label), value, None) for label, value in values] for title, values in panels.items()}
    draw_bars(path, bars, longest=longest)


def _draw_growth(path: Path, growth: Mapping[str, Any]) -> None:
    """One panel per axis, both scales logarithmic, two panels in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from kd.evaluation.report.figures import COLOURS, DPI, WIDTH

    path.parent.mkdir(parents=True, exist_ok=True)
    height = 3.0 * ((len(growth) + 1) // 2)
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for number, (axis, series) in enumerate(growth.items()):
        axes = figure.add_subplot((len(growth) + 1) // 2, 2, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6ea")
        lines = {name: values for name, values in series["lines"].items() if name != "bytes"}
        for (name, values), colour, mark in zip(lines.items(), COLOURS, "os^D", strict=False):
            axes.plot(series["x"], values, color=colour, marker=mark, markersize=4, label=LINES.get(name, name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = min(map(min, lines.values())), max(map(max, lines.values()))
        axes.set_ylim(low / 1.5, high * 1.5)  # a flat line is to look flat
        axes.xaxis.set_major_locator(FixedLocator(series["x"]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 2048 else f"{x:g}"))
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("CPU µs per row")
        if number == 0 or axis == "workers":
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=DPI, format="png")
