"""`kd report`: evaluations and training runs become tables, pictures and one page that can be mailed.

    report.md  report.html   the same content; the page holds its pictures and asks for nothing else
    report.csv               one line per model and metric, for a spreadsheet
    reference.csv            the reference table: models down, metrics across
    system.csv               the table of a system in its own form, where one was asked for: one line per cell
    report.json              everything, for a program
    metrics.png  loss.png    where there were evaluations, and where there were training runs
    deltas.png               where a fine-tuned and a distilled student make a pair

What may lie in an input folder is said in `runs.py`, which students make a pair in `pairs.py`. Students over several seeds
are one line of the reference table, one curve and one bar; each by itself is in the tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kd.common.disk.disk_errors import clear_write_errors
from kd.common.errors import DataError
from kd.common.files import canonical_json, sweep, write_atomic
from kd.common.shown_text import redacted
from kd.evaluation.report.comparison import Comparison, Entry, compare, short_name
from kd.evaluation.report.exports import csv_text, metrics_csv, report_document, report_markdown
from kd.evaluation.report.page import ReportContent, Sample, Section, Table, render_page
from kd.evaluation.report.pairs import Arm, Pair, arms_of, pairs_of
from kd.evaluation.report.pictures import gains_picture, loss_picture, metrics_picture
from kd.evaluation.report.reference import Reference, reference_of
from kd.evaluation.report.runs import Run, collect_runs, commands_of, input_folders, is_number, versions_of
from kd.evaluation.report.score_curves import progress_sections
from kd.evaluation.report.systems.merged_models import is_merged, merged_sections, read_merged
from kd.evaluation.report.systems.report_settings import ReportSettings
from kd.evaluation.report.systems.system_table import block_rows
from kd.evaluation.report.systems.table_blocks import asked_blocks

SIDE_BY_SIDE = ("samples", "generation")
"""Tasks whose answers are shown side by side, at most MOST_SAMPLES of each."""
MOST_SAMPLES = 12
MARK = (
    "A figure is marked best only when it is better than every other: the 95 % interval of each difference leaves zero after "
    "Holm's correction over the table. Differences are paired over documents where both models saw the same; ± is one "
    "standard error, clustered by document."
)
MARK_PAIRS = (
    "A student is called better or worse than the one it is paired with only where the 95 % interval of the difference leaves "
    "zero after Holm's correction over all cells of the table; only then is it marked. A difference that only exceeds its "
    "standard error leans to one side. Differences are paired over documents and seeds where both saw the same; ± is one "
    "standard error, clustered by document, and over seeds where there are several."
)


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    markdown: Path
    page: Path
    csv: Path
    reference_csv: Path
    json: Path
    loss_png: Path | None
    """Loss curves; None without training runs."""
    metrics_png: Path | None
    """Bars; None without evaluations."""
    deltas_png: Path | None
    """Gains; None without pairs."""
    system_csv: Path | None
    """The system's own table; None where none was asked for."""
    content: ReportContent = field(repr=False)
    """What the report says."""

    def paths(self) -> dict[str, str]:
        """Name -> path of every file."""
        return {name: str(path) for name, path in vars(self).items() if isinstance(path, Path)}


def write_report(
    inputs: Sequence[Path],
    out: Path,
    *,
    title: str = "Distillation report",
    lead: Sequence[Section] = (),
    after: Sequence[Section] = (),
    baseline: str | Sequence[str] | None = None,
    table: str | None = None,
    published: bool = False,
    other_students: bool = False,
) -> ReportFiles:
    """Read every input directory and write the report under `out`.

    lead, after   sections of the caller's, at the top and after the results
    baseline      names of the arms that the others are compared with; None = those trained with `ce`
    table         name or file of a system's own table, which then leads the results
    published     whether that table has the published figures too
    other_students  whether arms that began with another student are compared with the baseline, too: those of a sweep
    Raises DataError, naming what cannot be read; then nothing is written. Raises WriteError where `out` cannot be written.
    """
    with clear_write_errors(out, "make room or name another --out, then run the same command again"):
        asked = ReportSettings(out, table=table, published=published)
        return _written(inputs, title, lead, after, baseline, asked, other_students)


def _written(
    inputs: Sequence[Path],
    title: str,
    lead: Sequence[Section],
    after: Sequence[Section],
    baseline: str | Sequence[str] | None,
    settings: ReportSettings,
    other_students: bool,
) -> ReportFiles:
    out = settings.out
    sweep(out)
    folders = input_folders(inputs, is_merged)
    merged = [read_merged(folder) for folder in folders if is_merged(folder)]
    inputs = [folder for folder in folders if not is_merged(folder)]
    runs, entries = collect_runs(inputs)
    if not runs and not entries and not merged:
        raise DataError("there is nothing to report", expected="at least one evaluation, training run or merge")
    comparisons = compare(entries)
    arms = arms_of(entries)
    pairs = pairs_of(arms, baseline, other_students=other_students)
    reference = reference_of(comparisons, arms, pairs)
    blocks = asked_blocks(settings, entries, comparisons, arms, pairs)
    files = ReportFiles(
        out / "report.md",
        out / "report.html",
        out / "report.csv",
        out / "reference.csv",
        out / "report.json",
        loss_picture(out / "loss.png", runs, reference),
        metrics_picture(out / "metrics.png", comparisons, reference),
        gains_picture(out / "deltas.png", reference),
        out / "system.csv" if blocks else None,
        ReportContent(title, [], []),
    )
    sections = [*lead, *(block.section(published=settings.published) for block in blocks), *merged_sections(merged)]
    sections += [*_results(reference, comparisons, files), *after, *_side_by_side(comparisons, arms)]
    sections += _details(comparisons, pairs)
    if runs:
        sections.append(
            Section(
                "Training",
                table=_run_table(runs),
                note="Losses at the end, smoothed, in nats per token.",
                folded=len(runs) > 4,
            )
        )
    if files.loss_png is not None:
        note = "Faint: every logged step; solid: two-sided exponential mean, half-life 1 % of the run. Students over "
        note += "several seeds: their mean, and the range of the seeds."
        sections.append(Section("Loss curves", image=files.loss_png, note=note))
    sections += progress_sections(inputs, arms, out)
    sections += _how_made(runs, entries, inputs)
    models = len({e.name for e in entries})
    intro = [
        f"{_count(len(entries), 'evaluation')} of {_count(models, 'model')} and {_count(len(runs), 'training run')}"
        + (f", {_count(len(merged), 'merge or matrix', 'merges and matrices')}." if merged else ".")
    ]
    intro += [MARK_PAIRS if pairs else MARK] if comparisons else []
    write_atomic(files.markdown, report_markdown(title, intro, sections))
    write_atomic(files.csv, metrics_csv(comparisons))
    write_atomic(files.reference_csv, csv_text(reference.csv_rows()))
    document = report_document(runs, entries, comparisons, reference)
    if blocks:
        document["system"] = [block.document(published=settings.published) for block in blocks]
        write_atomic(out / "system.csv", csv_text(block_rows(blocks, published=settings.published)))
    write_atomic(files.json, canonical_json(redacted(document)))
    write_atomic(files.page, render_page(title, intro, sections))
    return replace(files, content=ReportContent(title, intro, sections))


def _results(reference: Reference, comparisons: Sequence[Comparison], files: ReportFiles) -> list[Section]:
    """The reference table, each pair's differences, and the pictures of both."""
    sections = []
    if reference.columns:
        mean = next((c for c in reference.columns if len(c.parts) > 1), None)
        note = "Parameters are counted in the weights, tied ones once. "
        if mean is not None:
            note += f"The mean is that of the {len(mean.parts)} columns that are shares, each counted alike. "
        note += " ".join(dict.fromkeys(f"{c.title}." for c in comparisons))
        sections.append(Section("Models and metrics", table=reference.table(), note=note.strip()))
    for pair in reference.pairs:
        if reference.differences(pair):
            heading = f"{pair.other.name} against {pair.baseline.name}"
            sections.append(Section(heading, table=reference.pair_table(pair), note=reference.pair_note(pair)))
    if files.deltas_png is not None:
        note = "What each kind of distilled student gained on its fine-tuned partner, right of 0 is better; whiskers are one "
        note += "standard error of the paired difference, strokes the seeds."
        sections.append(Section("Gains", image=files.deltas_png, note=note))
    if files.metrics_png is not None:
        note = "Bars start at zero; whiskers are one standard error."
        sections.append(Section("Figures", image=files.metrics_png, note=note))
    return sections


def _details(comparisons: Sequence[Comparison], pairs: Sequence[Pair]) -> list[Section]:
    """Every task with all its metrics, model by model."""
    named = [names for pair in pairs for names in pair.models]
    return [
        Section(c.title, table=c.table(named), note=c.note(), folded=len(c.entries) > 8) for c in comparisons if c.shown
    ]


def _side_by_side(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Section]:
    """What models wrote after the same prompts; of several seeds the first."""
    shown = {next(iter(arm.models.values())): arm.name for arm in arms}
    sections = []
    for comparison in comparisons:
        kept = {
            shown[e.name]: e.report.documents.get(comparison.task, {}).get("samples", [])[:MOST_SAMPLES]
            for e in comparison.entries
            if e.name in shown and comparison.task in SIDE_BY_SIDE
        }
        places: dict[tuple[str, str | None], list[tuple[str, str]]] = {}
        for name, samples in kept.items():
            for sample in samples:
                places.setdefault((sample["prompt"], sample.get("expected")), []).append((name, sample["got"]))
        if places:
            samples_shown = [Sample(prompt, expected, answers) for (prompt, expected), answers in places.items()]
            note = "Of students over several seeds the first." if any(len(a.models) > 1 for a in arms) else None
            sections.append(Section(f"Side by side, {comparison.title}", samples=samples_shown, note=note))
    return sections


def _how_made(runs: Sequence[Run], entries: Sequence[Entry], inputs: Sequence[Path]) -> list[Section]:
    """The commands and versions behind the figures; no section where neither is known."""
    lines, versions = commands_of(runs, inputs), versions_of(runs, entries)
    if not lines and not versions:
        return []
    text = f"Versions: {versions}." if versions else None
    return [Section("How it was made", text=text, lines=lines, folded=True)]


def _run_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        ends = [run.last(key) for key in ("loss", "ce", "kd")]
        final = run.records[-1] if run.records else {}
        seconds = (run.fact("result") or {}).get("seconds")
        rows.append(
            [
                run.name,
                short_name(str(run.fact("student") or "–")),
                str(run.fact("loss") or "–"),
                f"{final.get('step', 0):,}",
                f"{final['tokens']:,}" if is_number(final.get("tokens")) else "–",
                *("–" if end is None else f"{end:.4f}" for end in ends),
                f"{seconds:,.0f} s" if is_number(seconds) else "–",
            ]
        )
    return Table(
        ["run", "student", "trained with", "steps", "tokens", "loss", "cross-entropy", "distillation", "time"], rows
    )


def _count(number: int, noun: str, several: str | None = None) -> str:
    return f"{number} {noun if number == 1 else several or noun + 's'}"
