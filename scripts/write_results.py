"""Write docs/results.md from finished experiments: `python scripts/write_results.py RUNS docs`.

RUNS holds a folder per experiment, by the experiment's name, as `kd experiment NAME --out RUNS/NAME` leaves it; the tables are
those of its `report/report.json` and report.md, the pictures go to docs/figures. What is written by hand are the words in
READING: what to look at, no number. Experiments that are not in RUNS keep their part of the page; without one, the page says how
to make it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from textwrap import wrap
from typing import Any

from PIL import Image

from kd.recipes.experiment_file import load_experiment

COMMANDS = {
    "answers-mini": "kd experiment answers-mini",
    "unsure-mini": "kd experiment unsure-mini",
    "reader-prose": "kd experiment reader-prose",
    "kl-prose": "kd experiment kl-prose",
    "text-kl-prose": "kd experiment text-kl-prose",
    "conditions-prose": "kd experiment conditions-prose",
    "curves-prose": "kd experiment curves-prose",
    "text-prose": "kd experiment text-prose",
    "uld-mini": "kd experiment uld-mini",
    "kl-wikitext": "kd experiment kl-wikitext --set data=DATA/wikitext-2/wiki.train.tokens "
    "--set eval-data=DATA/wikitext-2/wiki.valid.tokens --set eval-split=train",
    "uld-tasks": "python scripts/split_tasks.py DATA/tasks tasks boolq paws anli_r1 cosmos_qa\n"
    "    kd experiment uld-tasks --set task-root=tasks",
}
READING = {
    "answers-mini": "This is the practical case: few labels, and a teacher that answers questions without labels. A "
    "thousand of its answers are worth about as much as a thousand labels. A few dozen labels do not say "
    "what the questions are about, however long one trains. The teacher's predictions (`text-kl`) add to "
    "its answers in every seed, over another tokenizer. One answer names one right animal, and the "
    "predictions name all of them. Perplexity does not gain from them. Every pair here is against the "
    "fewest labels. `kd report RUNS/answers-mini/{answers,text-kl}-seed* --baseline answers` compares "
    "the last two.",
    "unsure-mini": "Here the teacher is unsure with good reason: several answers are right, and it knows all of them. "
    "`text-kl` gives more right answers than fine-tuning on the same text in four seeds of five, and only "
    "leans to better. One answer names one right animal, and the predictions name all. Perplexity leans the other way. `uld` gives "
    "fewer right answers in every seed, and far fewer at the weight of its paper. Sorted probabilities "
    "say how many answers are right, but not which. So a student is rewarded for being as unsure about "
    "wrong ones.",
    "reader-prose": "The student has read prose before, in its own tokenizer, so its probabilities mean something from "
    "the first step. Nothing that compares by rank gains from that. `uld` does harm, more at the weight "
    "of its paper (`uld-paper`) than at half. `hybrid` and `alm` do a little harm. Only `text-kl`, which "
    "keeps the names, leans to better, in four seeds of five. The student has met much of this prose before, so "
    "no arm moves far.",
    "kl-prose": "The teacher has read this text, and is unsure enough to say more than the text does. The larger the share of KL "
    "in the loss, the better. Cross-entropy on the one token that came (`kl-half`) adds noise to what the teacher already says.",
    "text-kl-prose": "The student's tokenizer is a small Unigram model, and the teacher's a byte-level BPE. Every seed of "
    "`text-kl` gains on cross-entropy. With one tokenizer KL gains more (`kl-prose`): a set of tokens says less than a token, "
    "and tokens that begin inside a token of the teacher learn from the text alone.",
    "conditions-prose": "Nothing makes `uld` pay here. A temperature of 2 takes off a third of its harm. More tokens or "
    "more rank bands do not matter. Fewer groups (`uld-first`, `uld-single`) make it worse. Added with a small weight to a whole "
    "cross-entropy, it changes nothing. `text-kl` gains at T = 1 whether it takes half of the cross-entropy's place "
    "or is added, and from 16 tokens as well. At T = 2 it does harm: the softened teacher is another distribution "
    "than the one that perplexity asks for.",
    "curves-prose": "The curves do not cross. `text-kl` is ahead of cross-entropy at every step that is scored, and the others "
    "stay behind it. All distances shrink as the students learn, but for that of `text-kl`, which stays from step 200 on.",
    "text-prose": "`uld` and `hybrid` do harm at their default weights, and `alm` changes nothing. A rank does not say which "
    "token it belongs to, and a student of random weights does not know that yet. Four seeds of `text-kl` gain, and one loses: "
    "it started slowly, with the gradient norms of the others, and never caught up. With a longer warm-up it gains too "
    "(`text-kl-prose`), and plain fine-tuning is better as well.",
    "uld-mini": "Nothing differs beyond its error. The students start from random weights. After so few steps they guess, with the "
    "teacher or without. The teacher is nearly certain of every answer (last table), so its sorted probabilities are those of a "
    "one-hot vector, whatever the answer is. ULD then asks the student to be certain, but not of what.",
    "kl-wikitext": "The teacher was trained on more of the same text than the students see. The students gain what it learned from "
    "the rest. `kl-t2` is the setting that leans to worse, and the agreement with the teacher shows why. It follows the softened "
    "teacher (T = 2) more closely than `kl` does, and the teacher itself less closely. After so few steps, the student learns the "
    "shape of the tail at the expense of the head. Perplexity is measured at T = 1.",
    "uld-tasks": "A teacher of this size does not know the answers. It guesses on the held-out rows, and so do its students: they "
    "give one answer to all of BoolQ and one to all of PAWS, in every seed. What is not there cannot be distilled.",
}
SAMPLES = """kd eval RUNS/kl-wikitext/teacher-model RUNS/kl-wikitext/finetuned-seed0 RUNS/kl-wikitext/kl-seed0 \\
        --tasks samples --prompts docs/prompts.txt --max-new-tokens 24 --out RUNS/samples/evals
    kd report RUNS/samples/evals/* --out RUNS/samples/report"""
HEAD = """# Results

`python scripts/write_results.py RUNS docs` writes this page from finished experiments, whatever their outcome. `kd
experiment NAME` runs an experiment. Its file is in `recipes/experiments/`, and [Experiments and
reports](experiments.md) explains how to write another.

All students of an experiment begin alike seed by seed, and take the same number of steps. They read one cache, but in
`answers-mini`, where the arms differ in it. The teachers are tiny and were made on a CPU, so the page shows the
method and not the state of the art. ± beside a difference is one standard error of the paired difference, over seeds
and documents together. `p` is that of the paired t test over seeds, then of the exact permutation test, which cannot
fall below 2/2^seeds. A student is `better` or `worse` where the 95 % interval of the difference leaves zero after
Holm's correction over all differences of its experiment; only then is a figure bold. A difference that only exceeds
its standard error `leans` to one side.

[Seven small classifiers, merged](results-merging.md) has classifiers on GLUE, merged seven ways with both sweeps, and
distilled through a cache.

"""


def table(name: str, text: str) -> list[str]:
    """The lines of one table of report.md, by its heading."""
    lines = text.split("\n")
    start = next(n for n, line in enumerate(lines) if line == f"## {name}")
    rows = []
    for line in lines[start + 1 :]:
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            break
    return rows


SUMMARY = [
    "| experiment | pair | figure | difference | seeds better | p (t / permutation) | verdict |",
    "|---|---|---|--:|--:|--:|---|",
]


def summary(name: str, document: dict[str, Any]) -> list[str]:
    """One line per pair of an experiment: its chief figure, the mean where there is one, else the first column."""
    lines = []
    for pair in document["reference"]["pairs"]:
        means = [d for d in pair["differences"] if d["column"].startswith("mean of")]
        d = (means or pair["differences"])[0]
        p = [("–" if x is None else "< 0.001" if x < 0.001 else f"{x:.3f}") for x in (d["p_t"], d["p_permutation"])]
        error = "unknown" if d["error"] is None else f"{d['error']:.2g}"
        shown = [
            f"[{name}](#{name})",
            f"{pair['other']} against {pair['baseline']}",
            d["column"],
            f"{d['difference']:+.3g} ± {error}",
        ]
        shown += [f"{d['seeds_better']} of {len(pair['seeds'])}", " / ".join(p), d["verdict"]]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def missing(name: str) -> list[str]:
    """The section of an experiment that has no outcome here."""
    about = load_experiment(name).about
    words = f"No table of it is here now. The command makes it, in `runs/{name}/report`."
    return [f"## {name}", "", f"{about}.", "", f"    {COMMANDS[name]}", "", words, ""]


def kept(name: str, page: str) -> tuple[list[str], list[str]]:
    """The lines of the summary and the section that a page has of an experiment already; empty where it has none."""
    lines = page.split("\n")
    rows = [line for line in lines if line.startswith(f"| [{name}](#{name})")]
    if f"## {name}" not in lines:
        return [], []
    start = lines.index(f"## {name}")
    end = next((n for n in range(start + 1, len(lines)) if lines[n].startswith("## ")), len(lines))
    return rows, lines[start:end]


def experiment(name: str, folder: Path, figures: Path) -> list[str]:
    """The section of one experiment; its pictures are copied."""
    report = folder / "report"
    text = (report / "report.md").read_text(encoding="utf-8")
    document = json.loads((report / "report.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    lines = [
        f"## {name}",
        "",
        f"{state['about']}. Seeds: {', '.join(map(str, state['seeds']))}.",
        "",
        f"    {COMMANDS[name]}",
        "",
    ]
    lines += [*table("Models and metrics", text), ""]
    for pair in document["reference"]["pairs"]:
        lines += [*table(f"{pair['other']} against {pair['baseline']}", text), ""]
    for picture in ("deltas", "loss", "progress"):
        if (report / f"{picture}.png").exists():
            shrink(report / f"{picture}.png", figures / f"results-{name}-{picture}.png")
            lines += [f"![{name}: {picture}](figures/results-{name}-{picture}.png)", ""]
    for line in text.split("\n"):
        if line.startswith("## Progress, "):
            lines += [
                f"Scores by step, {line.removeprefix('## Progress, ')}:",
                "",
                *table(line.removeprefix("## "), text),
                "",
            ]
    if "## What the cache holds" in text:
        lines += [*table("What the cache holds", text), ""]
    return [*lines, *wrap(READING[name], 120), ""]


def side_by_side(text: str) -> list[str]:
    """The part of report.md that shows what models wrote."""
    lines = text.split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("## Side by side"))
    end = next((n for n in range(start + 1, len(lines)) if lines[n].startswith("## ")), len(lines))
    return ["## Side by side", "", f"    {SAMPLES}", "", *lines[start + 1 : end]]


def shrink(source: Path, target: Path) -> None:
    """As wide as a page shows it, in 64 colours as far apart as they can be: a quarter of the bytes."""
    picture = Image.open(source).convert("RGB")
    picture = picture.resize((800, round(800 * picture.height / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("docs", type=Path)
    args = parser.parse_args()
    path = args.docs / "results.md"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    (args.docs / "figures").mkdir(parents=True, exist_ok=True)
    written, rows, parts = [], list(SUMMARY), list[str]()
    for name in COMMANDS:
        folder = args.runs / name
        if not (folder / "report" / "report.json").exists():
            of_summary, section = kept(name, page)
            section = section or missing(name)
        else:
            document = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
            of_summary, section = summary(name, document), experiment(name, folder, args.docs / "figures")
            written.append(name)
        rows += of_summary
        parts += section
    if (args.runs / "samples" / "report" / "report.md").exists():
        parts += side_by_side((args.runs / "samples" / "report" / "report.md").read_text(encoding="utf-8"))
    path.write_text(HEAD + "\n".join([*rows, "", *parts]).rstrip() + "\n", encoding="utf-8")
    print(f"{path}: {', '.join(written)}")


if __name__ == "__main__":
    main()
