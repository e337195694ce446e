"""`EvalReport`: one model's figures as they lie on disk, written by `kd eval`, read by `kd report`.

    DIR/documents.json   per task and metric, how far each document moves the figure: what a report needs to
                         give the error of the *difference* of two models, which share their hard documents; and
                         for people, of some tasks, `samples`: the first prompts, what was expected, what came
    DIR/eval.json        everything else; written last

A report names model, text or cache, settings and versions, and holds no date: the same evaluation is the same file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd.common.disk.digests import checked_digest, document_digest, with_digest
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.errors import DamagedFilesError, DataError
from kd.common.files import canonical_json, read_object, sweep, write_atomic
from kd.common.shown_text import redacted
from kd.evaluation.tasks.agreement_task import figures_now, names_now

FORMAT, FORMAT_VERSION = "kd-eval", 1
EVAL, DOCUMENTS = "eval.json", "documents.json"
DOCUMENTS_DIGEST = "documents_digest"
"""Key of `eval.json`: the digest of the documents that belong to it."""


@dataclass(frozen=True)
class EvalReport:
    """One model's results; the document in `eval.json`.

    >>> import kd
    >>> from pathlib import Path
    >>> report = kd.evaluate("demo", "perplexity", data="demo", split="heldout", limit=1)
    >>> isinstance(report, kd.EvalReport), report.parameters
    (True, 2667072)
    >>> sorted(report.tasks["perplexity"])
    ['bits_per_byte', 'ece', 'nll_per_token', 'perplexity']
    >>> report.save(Path("scores")).name
    'eval.json'
    """

    model: str
    """Name of the model, as the user wrote it."""
    parameters: int
    """Number of parameters; tied weights count once."""
    identity: dict[str, Any]
    """Class, dtype, quantisation and weight digests of the model: see `kd.models.identity.model_identity`."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    tasks: dict[str, dict[str, dict[str, Any]]]
    """task -> metric -> value, stderr (None for one document), n, over, unit, better, title.

    A metric `METRIC/TASK` is that of the examples of one task of the text. `trained_cluster` is `seen` or `unseen` where it
    is known whether the model was trained on tasks of its FLAN clusters."""
    settings: dict[str, dict[str, Any]]
    """task -> settings that must be equal for two results to be comparable, text or cache included."""
    data: dict[str, Any] | None
    """spec, split, kind, examples and text_digest of the text; None where no task needed a text."""
    cache: dict[str, Any] | None
    """path, fingerprint, teacher, examples and rows of the cache; None where no task needed a cache."""
    versions: dict[str, str]
    documents: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """task -> digest of the documents, metric -> influences, and samples; saved beside the report."""

    def to_dict(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "parameters": self.parameters,
            "identity": self.identity,
            "tokenizer": self.tokenizer,
            "tasks": self.tasks,
            "settings": self.settings,
            "data": self.data,
            "cache": self.cache,
            "versions": self.versions,
        }

    def save(self, out_dir: Path) -> Path:
        """Write `documents.json`, then `eval.json`, each whole or absent; returns the latter's path. Raises WriteError."""
        documents = with_digest(self.documents)
        report = with_digest({**redacted(self.to_dict()), DOCUMENTS_DIGEST: documents["digest"]})
        with clear_write_errors(out_dir, "make room or name another --out, then run the same command again"):
            sweep(out_dir)
            write_atomic(out_dir / DOCUMENTS, json.dumps(documents, sort_keys=True, allow_nan=False) + "\n")
            write_atomic(out_dir / EVAL, canonical_json(report))
        return out_dir / EVAL


def load_report(folder: Path) -> EvalReport:
    """Read what `save` wrote; the documents of an earlier release may be gone.

    Raises DataError, naming the file, and DamagedFilesError for one that was changed.
    """
    path = folder / EVAL
    document = _unchanged(path)
    if (document.get("format"), document.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            "this is not an evaluation that this release reads",
            where=path,
            found=f"format {document.get('format')!r} version {document.get('format_version')!r}",
            expected=f"{FORMAT!r} version {FORMAT_VERSION}",
        )
    documents = _documents(folder, document.get(DOCUMENTS_DIGEST))
    names = [n for n in EvalReport.__dataclass_fields__ if n != "documents"]
    missing = [n for n in names if n not in document]
    if missing or not isinstance(document["tasks"], dict) or not isinstance(document["settings"], dict):
        raise DataError("an evaluation is not complete", where=path, found=f"no {', '.join(missing) or 'tasks'}")
    return with_names_now(EvalReport(**{n: document[n] for n in names}, documents=documents))


def with_names_now(report: EvalReport) -> EvalReport:
    """The same report where earlier releases had one name for divergences from a cache and from a teacher at hand."""
    if "agreement" not in report.tasks:
        return report
    settings = report.settings.get("agreement", {})
    names, figures = names_now(settings), figures_now(report.tasks["agreement"], settings)
    kept = report.documents.get("agreement", {})
    if "influence" in kept:
        kept = kept | {"influence": {names.get(metric, metric): u for metric, u in kept["influence"].items()}}
    documents = report.documents | ({"agreement": kept} if kept else {})
    return replace(report, tasks=report.tasks | {"agreement": figures}, documents=documents)


def _documents(folder: Path, digest: str | None) -> dict[str, Any]:
    """The documents that belong to an evaluation; None as `digest`: it is of an earlier release, and they may be gone."""
    path = folder / DOCUMENTS
    documents = _unchanged(path) if digest is not None or path.is_file() else {}
    if digest is not None and document_digest(documents) != digest:
        raise DamagedFilesError("the documents belong to another evaluation", where=path)
    return documents


def _unchanged(path: Path) -> dict[str, Any]:
    """A JSON document that holds its own digest, without it; one of an earlier release has none."""
    try:
        return checked_digest(read_object(path))
    except ValueError as error:
        raise DamagedFilesError(
            "an evaluation was changed", where=path, found=str(error), try_="kd eval again, or a copy of the folder"
        ) from error


def folders_of(out: Path, models: Sequence[str]) -> list[Path]:
    """Where each model's `eval.json` goes: `out` itself, or `0-NAME`, `1-NAME`, … in it where there are several."""
    if len(models) == 1:
        return [out]
    return [out / f"{number}-{Path(model).name.replace(':', '-')}" for number, model in enumerate(models)]


def numbered(out: Path) -> list[Path]:
    """The folders of `folders_of` that are in `out`, in the order of their numbers."""
    folders = [path.parent for path in out.glob(f"*-*/{EVAL}") if path.parent.name.partition("-")[0].isdigit()]
    return sorted(folders, key=lambda folder: (int(folder.name.partition("-")[0]), folder.name))


def refuse_other_scores(out: Path, models: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise DataError where `out` holds scores of other models, or of tasks that are not measured again: they would be lost."""
    planned = dict(zip(folders_of(out, models), models, strict=True))
    for folder in [*([out] if (out / EVAL).is_file() else []), *numbered(out)]:
        before = load_report(folder)
        if planned.get(folder) != before.model or not set(before.tasks) <= set(tasks):
            scores, expected = (
                f"{before.model}: {', '.join(before.tasks)}",
                f"{planned.get(folder)}: {', '.join(tasks)}",
            )
            raise DataError(
                "the output folder holds other scores",
                where=folder,
                found=scores,
                expected=expected if folder in planned else "nothing",
                try_="another --out",
            )
