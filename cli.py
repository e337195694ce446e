"""The `kd` command: options become one config, one call is made, what it yields is printed.

Results go to stdout (one JSON document with --json), progress and messages to stderr. Exit codes: 0 done, 1 a clear
error, 2 wrong usage, 3 a check found damage, 130 interrupted (run the same command again: it continues).
Heavy imports live inside the commands, so that `kd --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from kd.cache_builder.build import BuildPlan, BuildProgress, BuildRequest
    from kd.data.rendering import InstructionConfig
    from kd.evaluation.results import EvalReport

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def main() -> None:
    """Entry point: errors the user can cause become a few lines on stderr and an exit code."""
    from kd.data.errors import KdError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read-ahead threads and its fork check do not mix
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue", err=True)
        sys.exit(130)
    except KdError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="kd-logit-cache", prog_name="kd")
def cli() -> None:
    """Distil language models through a teacher-logit cache: run the teacher once, train many students.

    \b
    kd demo                                              the whole pipeline, offline, in minutes
    kd cache build --teacher ID --data SPEC --out DIR    stage one
    kd train --cache DIR --student ID --out RUN          stage two
    kd eval RUN --tasks perplexity --data SPEC           scores
    """


# ---------------------------------------------------------------------------------------------- printing


def emit(result: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print one result: a JSON document, or aligned lines."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    if title:
        click.echo(title)
    width = max((len(k) for k in result), default=0) + 2
    for key, value in result.items():
        click.echo(f"  {key.replace('_', ' '):<{width}}{_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_readable(v) for v in value)
    return str(value)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A rich bar on stderr where that is a terminal; elsewhere a plain line about every ten per cent."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        shown = -1

        def plain(done: int, total: int, note: str) -> None:
            nonlocal shown
            tenth = 10 * done // max(total, 1)
            if tenth > shown:
                shown = tenth
                click.echo(f"{label} {10 * tenth}%  {note}", err=True)

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off stderr; errors stay."""
    import logging

    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels on every import
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _columns(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in value.split(",")] if value else []
    if any(not field or not sign or not column for field, sign, column in pairs):
        raise click.BadParameter("expected FIELD=COLUMN,…, e.g. prompt=question,target=answer")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _floats(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(v) for v in value.split(","))
    except ValueError as error:
        raise click.BadParameter("expected numbers separated by commas, e.g. 1,2,4") from error


def _escaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _part(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    index, _sign, count = value.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise click.BadParameter("expected I/N, e.g. 2/8")
    return int(index), int(count)


# ------------------------------------------------------------------------------------------------- data


@cli.group()
def data() -> None:
    """Look at text sources."""


@data.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def data_ls(as_json: bool) -> None:
    """List the named sources, the instruction tasks and mixtures, and the file types.

    Example: kd data ls
    """
    from kd.data.clusters import flan_clusters
    from kd.data.mixtures import PRESETS
    from kd.data.sources import FILE_READERS, SOURCES, WIKITEXT_CONFIG, WIKITEXT_ID, WIKITEXT_REVISION
    from kd.data.task_files import load_task, task_names

    about = {
        "demo": "the standard library's own English; offline; splits train, heldout",
        "mini": "seven small instruction tasks made up by rule; offline; splits train, heldout",
        "wikitext-2": f"{WIKITEXT_ID}:{WIKITEXT_CONFIG}@{WIKITEXT_REVISION[:8]}; splits train, validation, test",
    }
    result = {name: about.get(name, "") for name in SOURCES}
    result["flan"] = "flan:ten"
    result |= {f"flan:{name}": ", ".join(preset.tasks) for name, preset in PRESETS.items()}
    result |= {f"flan:{name}": load_task(name).about for name in task_names()}
    result["flan:all"] = "every task above"
    result["flan:all-but=CLUSTER"] = "the tasks of no held-out cluster: " + ", ".join(flan_clusters().clusters)
    result["FILE.yaml"] = "a task of your own (docs/extending.md)"
    result["FILE or FOLDER"] = " ".join(FILE_READERS)
    result["hub-id[:config][@revision]"] = "any data set on the hub that loads without code"
    if as_json:
        emit(result, as_json)
        return
    for name, text in result.items():
        click.echo(f"  {name:<29}{text}")


def _template(_: click.Context, __: click.Parameter, value: str) -> str | int:
    return int(value) if value.lstrip("-").isdigit() else value


def instruction_options(function: Function) -> Function:
    """How tasks become text; the function gets one `instructions`, an `InstructionConfig`."""

    @wraps(function)
    def gathered(*arguments: Any, template: str | int, options: bool | None, labels: str, task_root: Path | None,
                 max_per_task: int | None, mix_maximum: int | None, mix_draws: int | None, data_seed: int,
                 **rest: Any) -> Any:  # fmt: skip
        from kd.data.rendering import InstructionConfig

        config = InstructionConfig(
            template, options, labels, task_root, max_per_task, mix_maximum, mix_draws, data_seed
        )
        return function(*arguments, instructions=config, **rest)

    decorated: Any = gathered
    for option in (
        click.option("--data-seed", type=int, default=0, show_default=True, help="Tasks: of templates, order and draws."),
        click.option("--mix-draws", type=click.IntRange(min=1), metavar="N",
                     help="Tasks: draws of a mixture with a maximum; sum of min(rows, maximum) by default."),
        click.option("--mix-maximum", type=click.IntRange(min=1), metavar="N",
                     help="Tasks: draw in proportion to min(rows, N) (FLAN: 3000), instead of every example once."),
        click.option("--max-per-task", type=click.IntRange(min=1), metavar="N",
                     help="Tasks: first N rows of each; for train the mixture's own number by default."),
        click.option("--task-root", type=PATH, metavar="DIR",
                     help="Tasks: DIR/TASK/SPLIT.jsonl, .csv, .parquet, instead of the hub."),
        click.option("--labels", default="original", show_default=True, help="Tasks: wording of fixed labels, original or flan."),
        click.option("--options/--no-options", default=None,
                     help="Tasks: list the choices after the prompt; by default where there are any."),
        click.option("--template", default="random", show_default=True, callback=_template, metavar="random|round-robin|INDEX",
                     help="Tasks: which wording an example gets; random (seeded), round-robin, or one of them."),
    ):  # fmt: skip
        decorated = option(decorated)
    return cast(Function, decorated)


def corpus_options(function: Function) -> Function:
    """--data and what belongs to it."""
    function = instruction_options(function)
    for option in (
        click.option("--limit", type=click.IntRange(min=1), help="Use the first N documents or pairs."),
        click.option(
            "--columns", callback=_columns, help="Where names differ: text=…, or prompt=…,target=…, and id=…."
        ),
        click.option("--split", help="Split of the source; train by default. Tasks: train, dev or test."),
    ):
        function = option(function)
    return function


@data.command("show")
@click.argument("spec")
@corpus_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def data_show(spec: str, split: str | None, columns: dict[str, str], limit: int | None,
              instructions: InstructionConfig, as_json: bool) -> None:  # fmt: skip
    """Show the first examples of SPEC, its size and its digest.

    Example: kd data show demo --limit 3
    """
    from kd.data.sources import load_corpus

    corpus = load_corpus(spec, split=split, columns=columns, instructions=instructions)
    shown = corpus.examples[: limit or 3]
    size = sum(len(e.target.encode()) + len(e.prompt.encode()) for e in corpus.examples)
    result = {"spec": spec, "split": corpus.split, "kind": corpus.kind, "examples": len(corpus.examples),
              "bytes": size, "text_digest": corpus.digest}  # fmt: skip
    if as_json:
        result["source"] = corpus.source
        click.echo(json.dumps(result | {"shown": [asdict(e) for e in shown]}, indent=2))
        return
    emit(result, False)
    for example in shown:
        prompt = f"{_clip(example.prompt)!r} -> " if example.prompt else ""
        click.echo(f"  [{example.id}] {prompt}{_clip(example.target)!r}")


@data.command("templates")
@click.argument("task")
@click.option(
    "--options/--no-options", default=None, help="List the choices after the prompt; by default where there are any."
)
@click.option("--labels", default="original", show_default=True, help="Wording of fixed labels, original or flan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def data_templates(task: str, options: bool | None, labels: str, as_json: bool) -> None:
    """Show the templates of TASK (a name, or a .yaml file) on an example row; needs no data.

    Example: kd data templates boolq
    """
    from kd.data.mixtures import check_options
    from kd.data.rendering import InstructionConfig, show_templates
    from kd.data.task_files import load_task

    found = load_task(task.removeprefix("flan:"))
    config = InstructionConfig(options=options, labels=labels)
    check_options([found], config)
    shown = show_templates(found, config)
    if as_json:
        settings = {"task": found.name, "about": found.about, "clusters": found.clusters, "metrics": found.metrics,
                    "hub": None if found.hub is None else asdict(found.hub), "columns": found.columns,
                    "splits": {name: str(part) for name, part in found.splits.items()},
                    "example": found.example}  # fmt: skip
        rendered = [asdict(t) | {"shown": asdict(e)} for t, e in zip(found.templates, shown, strict=True)]
        click.echo(json.dumps(settings | {"templates": rendered}, indent=2, ensure_ascii=False))
        return
    click.echo(f"{found.name}: {found.about}")
    for index, (template, example) in enumerate(zip(found.templates, shown, strict=True)):
        click.echo(f"\n[{index}]{' inverted' if template.inverted else ''}\n{example.prompt}\n=> {example.target}")


def _clip(text: str, width: int = 160) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------------ cache


@cli.group()
def cache() -> None:
    """Build, inspect and check teacher-logit caches."""


def build_options(function: Function) -> Function:
    """Options that `plan` and `build` share."""
    options = (
        click.option("--teacher", required=True, help="Hub id, folder, demo, demo-t5, or random:NAME."),
        click.option("--data", "spec", required=True,
                     help="demo, wikitext-2, flan[:MIXTURE], a file or folder, or a hub id[:config][@revision]."),
        click.option("--out", required=True, type=PATH, help="Directory of the cache."),
        corpus_options,
        click.option("--profile", default="kl", show_default=True, help="What is kept: kl, compact, uld, sampled or full."),
        click.option("--top-k", type=int, help="Tokens kept per row; the profile's own number by default."),
        click.option("--samples", type=int, help="Draws from p per row (profiles sampled, full)."),
        click.option("--tail-bands", type=int, help="Rank bands beyond k (profiles uld, full)."),
        click.option("--temperatures", callback=_floats, default="1,2,4", show_default=True,
                     help="Temperatures whose exact normaliser is stored."),
        click.option("--band-temperatures", callback=_floats, help="Temperatures whose rank bands are stored; 1 by default."),
        click.option("--logprob-codec", help="graded, graded-fine, graded-coarse, linear8, float16 or float32; "
                     "the profile's own by default."),
        click.option("--seq-len", type=int, help="Tokens per block, context included; 512, or the teacher's window if "
                     "smaller. Of an encoder: 1024."),
        click.option("--targets", "target_source", default="data", show_default=True,
                     help="data, or teacher: it answers the prompts (--columns prompt=… is enough), and its answers are scored."),
        click.option("--sample-temperature", type=float, default=0.0, show_default=True,
                     help="Sample the teacher's answers at this temperature; 0 = greedy."),
        click.option("--target-len", type=int, help="Most tokens of a target, EOS included; 256 for an encoder-decoder."),
        click.option("--overlong", default="error", show_default=True,
                     help="error, drop or truncate: prompt/target pairs that are too long."),
        click.option("--stride", type=int, help="New tokens scored per block; seq-len - 1 by default."),
        click.option("--bos/--no-bos", default=True, show_default=True, help="Open documents and prompts with BOS."),
        click.option("--eos/--no-eos", default=False, show_default=True, help="Score an EOS token after each document."),
        click.option("--separator", default="\\n", show_default=True, help="Text between prompt and target of a pair."),
        click.option("--load-in-4bit", is_flag=True, help="Load the teacher in nf4 with double quantisation (bitsandbytes)."),
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--revision", help="Branch, tag or commit of a hub teacher."),
        click.option("--tokenizer", help="Folder or hub id, where the tokenizer is not beside the teacher."),
        click.option("--tokens-per-batch", type=click.IntRange(min=1), default=4096, show_default=True,
                     help="Tokens per forward pass, padding included; halved on out-of-memory."),
        click.option("--shard-rows", type=click.IntRange(min=1), help="Rows per shard; 32768 by default."),
        click.option("--shard", callback=_part, default="1/1", show_default=True, metavar="I/N",
                     help="Build every N-th shard, starting with the I-th."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of draws and of random weights."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _request(teacher: str, spec: str, out: Path, split: str | None, columns: dict[str, str], limit: int | None,
          instructions: InstructionConfig | None, profile: str, top_k: int | None, samples: int | None,
          tail_bands: int | None,
          temperatures: tuple[float, ...], band_temperatures: tuple[float, ...] | None, logprob_codec: str | None,
          seq_len: int | None, target_source: str, sample_temperature: float,
          target_len: int | None, overlong: str, stride: int | None,
          bos: bool, eos: bool, separator: str, load_in_4bit: bool,
          dtype: str, device: str, revision: str | None, tokenizer: str | None, tokens_per_batch: int,
          shard_rows: int | None, shard: tuple[int, int], seed: int) -> BuildRequest:  # fmt: skip
    quiet_libraries()
    from kd.cache_builder.build import BuildRequest
    from kd.cache_builder.generate import GenerationConfig
    from kd.cache_builder.manifest import Layout
    from kd.cache_builder.targets import TargetConfig
    from kd.data.blocks import BlockConfig
    from kd.data.errors import DataError, unknown_name
    from kd.data.models import ModelRequest, is_encoder_decoder, load_config, max_positions
    from kd.data.sources import load_corpus

    request = ModelRequest(teacher, revision, dtype, device, load_in_4bit, tokenizer, seed)
    targets = TargetConfig.of_profile(
        profile, top_k=top_k, samples=samples, tail_bands=tail_bands, temperatures=temperatures,
        band_temperatures=band_temperatures or (1.0,), logprob_codec=logprob_codec, seed=seed,
    )  # fmt: skip
    config = load_config(request)
    window, encoder = max_positions(config), is_encoder_decoder(config)
    most = 1024 if encoder else 512
    blocks = BlockConfig(
        seq_len or min(most, window or most), stride, bos, eos, _escaped(separator),
        encoder, target_len or (256 if encoder else None), overlong,
    )  # fmt: skip
    layout = None if shard_rows is None else Layout(shard_rows, min(4096, shard_rows))
    if target_source == "teacher" and "prompt" in columns:  # prompts are enough: the answers become the targets
        columns = {"target": columns["prompt"], **columns}
    corpus = load_corpus(spec, split=split, columns=columns, limit=limit, instructions=instructions)
    if target_source not in ("data", "teacher"):
        raise unknown_name("source of targets", target_source, ("data", "teacher"))
    generation = None
    if target_source == "teacher":
        generation = GenerationConfig(target_len - 1 if target_len else 255, sample_temperature, seed)
    elif sample_temperature:
        raise DataError(
            "nothing is sampled", found="--sample-temperature with --targets data", try_="--targets teacher"
        )
    return BuildRequest(out, request, corpus, blocks, targets, layout, tokens_per_batch, shard, generation)


def _plan(**options: Any) -> BuildPlan:
    """The plan of a build; where the teacher is to write the targets and has not, the data's own stand in for them."""
    from kd.cache_builder.build import plan_build
    from kd.cache_builder.generate import answered

    request = _request(**options)
    if request.generation is not None:
        if answered(request):
            return plan_build(_generated(request))
        click.echo("the teacher has not answered yet: the data's own targets stand in for its answers", err=True)
        request = replace(request, generation=None)
    return plan_build(request)


def _generated(request: BuildRequest) -> BuildRequest:
    """Drive the generation of targets and its progress bar to the end."""
    from kd.cache_builder.generate import generate

    last = None
    with progress_bar("generating") as advance:
        for last in generate(request):
            advance(last.done, last.total, f"{last.done:,} of {last.total:,} answers")
    assert last is not None
    assert last.request is not None
    return last.request


@cache.command("plan")
@build_options
def cache_plan(as_json: bool, **options: Any) -> None:
    """Say what a build would cost: rows, bytes, time. Loads no model weights, writes nothing.

    Example: kd cache plan --teacher demo --data demo --out runs/cache
    """
    from kd.cache_builder.build import estimate

    emit(estimate(_plan(**options)), as_json, "This build would make")


@cache.command("build")
@build_options
@click.option("--profile-build", is_flag=True, help="Say where the time went.")
def cache_build(as_json: bool, profile_build: bool, **options: Any) -> None:
    """Run the teacher over the text and write its soft targets. The same command again continues.

    Example: kd cache build --teacher demo --data demo --limit 20 --out runs/cache
    """
    from kd.cache_builder.build import plan_build

    request = _request(**options)
    plan = plan_build(request if request.generation is None else _generated(request))
    last = run_build(plan)
    result = cache_summary(options["out"]) | {"tokens_per_second": last.tokens_per_second, "reused": last.reused}
    if profile_build and last.seconds is not None:
        result["seconds"] = last.seconds
    heading = "nothing left to do here" if last.reused else "built"
    if not as_json:
        click.echo(f"{options['out']}: " + ("complete" if last.complete else "not complete") + f" ({heading})")
    emit(result, as_json)


def run_build(plan: BuildPlan) -> BuildProgress:
    """Drive a build and its progress bar to the end."""
    from kd.cache_builder.build import build

    last = None
    with progress_bar("building") as advance:
        for last in build(plan):
            rate = f"{last.tokens_per_second:,.0f} tokens/s, shard {last.shards_done}/{last.shards_total}"
            advance(last.rows_done, last.rows_total, rate)
    assert last is not None
    return last


def cache_summary(path: Path) -> dict[str, Any]:
    """What `kd cache info` prints: identity, sizes, measured quality."""
    from kd.cache_builder import store
    from kd.cache_builder.manifest import load_manifest
    from kd.cache_builder.reader import quality_means

    manifest = load_manifest(path)
    means, targets = quality_means(manifest), manifest.targets
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    done = store.committed(path, len(manifest.shards))
    rows = sum(manifest.shards[i][2] for i in done)
    arrays = {}
    for spec in manifest.arrays:
        stored = sum(store.file_size(path, store.shard_files([spec], i)[spec.name], shard=i) for i in done)
        arrays[spec.name] = round(stored / rows, 2) if rows else None
    return {
        "fingerprint": manifest.fingerprint,
        "complete": manifest.complete,
        "examples": manifest.examples,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "shards_committed": len(done),
        "bytes": size,
        "bytes_per_token": size / rows if rows else None,
        "bytes_expected": round(size / rows * manifest.rows) if rows else None,
        "profile": targets.profile,
        "top_k": targets.top_k,
        "samples": targets.samples,
        "tail_bands": targets.tail_bands,
        "temperatures": list(targets.temperatures),
        "logprob_codec": targets.logprob_codec,
        "teacher": manifest.provenance.get("teacher"),
        "teacher_class": manifest.identity["teacher"].get("model_class"),
        "dtype": manifest.identity["teacher"].get("dtype"),
        "quantization": manifest.identity["teacher"].get("quantization"),
        "vocabulary_size": manifest.vocabulary_size,
        "corpus": manifest.provenance.get("corpus"),
        "pairs_dropped": manifest.provenance.get("overlong", {}).get("dropped"),
        "pairs_truncated": manifest.provenance.get("overlong", {}).get("truncated"),
        "split": manifest.provenance.get("split"),
        "seq_len": manifest.blocks.seq_len,
        "mass_kept_mean": means.get("mass_kept"),
        "head_kl_mean": means.get("head_kl"),
        "teacher_nll_mean": means.get("gold_nll"),
        "teacher_top1": means.get("top1"),
        "array_bytes_per_token": arrays,
    }


@cache.command("info")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cache_info(path: Path, as_json: bool) -> None:
    """Show a cache's identity, bytes per token, mass kept and decoding error, as measured during the build.

    Example: kd cache info runs/cache
    """
    result = cache_summary(path)
    if not as_json:
        result["array_bytes_per_token"] = ", ".join(f"{k} {v}" for k, v in result["array_bytes_per_token"].items())
    emit(result, as_json, str(path))


@cache.command("verify")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cache_verify(path: Path, as_json: bool) -> None:
    """Check every checksum and promise; name the damaged shard, array and rows. Exit code 3 on damage.

    Example: kd cache verify runs/cache
    """
    from kd.cache_builder.verify import verify

    last = None
    with progress_bar("verifying") as advance:
        for last in verify(path):
            advance(last.bytes_done, last.bytes_total, f"{len(last.findings)} findings")
    assert last is not None
    findings = [asdict(f) for f in last.findings]
    if as_json:
        click.echo(
            json.dumps(
                {"path": str(path), "bytes": last.bytes_total, "sound": not findings, "findings": findings}, indent=2
            )
        )
    else:
        for finding in last.findings:
            place = [f"shard {finding.shard}" if finding.shard is not None else "", finding.array or "",
                     f"rows {finding.rows}" if finding.rows else ""]  # fmt: skip
            click.echo(f"{finding.where}: {finding.problem} ({', '.join(p for p in place if p) or 'whole file'})")
        click.echo(
            f"{path}: {'sound' if not findings else f'{len(findings)} findings'}, {last.bytes_total:,} bytes checked"
        )
    if findings:
        sys.exit(3)


# ------------------------------------------------------------------------------------------------ train


@cli.command()
@click.option("--cache", help="Path of the cache.")
@click.option("--student", help="Hub id, folder, demo, demo-t5, or random:NAME.")
@click.option("--out", help="Folder of the run.")
@click.option(
    "--loss",
    help="With the teacher's tokenizer: kl, reverse-kl, jsd. With any: uld, hybrid, alm. ce fine-tunes on the same text: "
    "the baseline. Default: kl.",
)
@click.option("--alpha", type=float, help="Weight of the distillation loss. Default: 1; 0.5 for uld, hybrid and alm.")
@click.option("--ce-weight", type=float, help="Weight of the cross-entropy. Default: 1 - alpha.")
@click.option(
    "--temperature",
    type=float,
    help="Temperature on the cache's grid; divergences are multiplied by its square. Default: 1.",
)
@click.option("--tail", help="auto, ghost, sampled or renorm: what makes up for the cut tail of kl. Default: auto.")
@click.option("--beta", type=float, help="Of jsd and hybrid: weight of KL(teacher || mixture). Default: 0.5.")
@click.option(
    "--alignment", help="Of uld, hybrid and alm: bytes (the same text), or positional (token by token). Default: bytes."
)
@click.option("--align-eos/--no-align-eos", default=None, help="Compare the ends of text too. Default: yes.")
@click.option(
    "--ranking", help="How uld orders the student's probabilities: fast, or exact (full sort). Default: fast."
)
@click.option("--prompt-loss", is_flag=True, default=None, help="Cross-entropy over the prompt's tokens too.")
@click.option("--separator", help="Text between prompt and target for the student. Default: as in the cache.")
@click.option("--seq-len", type=int, help="Most tokens of an example in the student's own cut. Default: its positions.")
@click.option("--top-k", type=int, help="Use fewer tokens per row than stored.")
@click.option("--epochs", type=float, help="Passes over the cache. Default: 1.")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--tokens-per-batch", type=int, help="Tokens per micro-batch and device. Default: 4096.")
@click.option("--batch-size", type=int, help="Examples per micro-batch and device, instead of a token budget.")
@click.option("--accumulate", type=int, help="Micro-batches per optimizer step. Default: 1.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 5e-4.")
@click.option("--weight-decay", type=float, help="Default: 0.01.")
@click.option("--max-grad-norm", type=float, help="Gradient clipping. Default: 1.")
@click.option("--optimizer", help="adamw, adafactor or adamw8bit. Default: adamw.")
@click.option("--schedule", help="linear, cosine or constant. Default: linear.")
@click.option("--warmup", type=float, help="Steps, or a share of all steps when below 1. Default: 0.")
@click.option("--precision", help="bf16 (autocast) or fp32. Default: fp32.")
@click.option("--lora", type=int, metavar="R", help="Train LoRA adapters of rank R (peft), merged into the output.")
@click.option("--lora-targets", help="Modules to adapt, separated by commas. Default: by the student's family.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Trade time for memory.")
@click.option(
    "--head-chunk", type=int, help="Rows of the output layer computed at once. Default: by vocabulary and device."
)
@click.option("--revision", help="Branch, tag or commit of a hub student.")
@click.option("--tokenizer", help="Tokenizer of a random student.")
@click.option("--device", help="auto, cpu or cuda. Default: auto.")
@click.option("--seed", type=int, help="Of order, dropout and random weights. Default: 0.")
@click.option("--save-every", type=int, help="Steps between checkpoints; 0 = at the end only. Default: 0.")
@click.option("--log-every", type=int, help="Steps between lines of metrics.jsonl. Default: 10.")
@click.option("--report-to", help="A tracker transformers knows: tensorboard, wandb, …. Default: none.")
@click.option("--config", "config_file", type=PATH, help="YAML or JSON file with these settings; options override it.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --out.")
@click.option("--eval-data", help="Held-out data spec: perplexity before and after, in the result and the model card.")
@click.option("--eval-split", help="Split of --eval-data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train(config_file: Path | None, resume: bool, eval_data: str | None, eval_split: str | None, as_json: bool,
          **options: Any) -> None:  # fmt: skip
    """Train a student from a cache; the teacher is never loaded. Runs as is under accelerate launch or torchrun.

    Example: kd train --cache runs/cache --student demo --out runs/student --max-steps 20
    """
    quiet_libraries()
    from kd.student_trainer.config import config_from

    if options["separator"] is not None:
        options["separator"] = _escaped(options["separator"])
    config = config_from(options, config_file)
    scores: list[tuple[str, str]] = []
    result: dict[str, Any] = {}
    alike = {"data": eval_data, "split": eval_split, "device": config.device, "dtype": "float32"}
    if eval_data:
        student = "random:demo-student" if config.student == "demo" else config.student
        result["perplexity_before"] = held_out_perplexity(
            student, revision=config.revision, tokenizer=config.tokenizer, seed=config.seed, **alike
        )
    result = asdict(run_training(config, resume)) | result
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if eval_data:
        result["perplexity_after"] = held_out_perplexity(config.out, **alike)
        scores = [
            (f"perplexity on {eval_data}, {when}", f"{result[f'perplexity_{when}']:.3f}")
            for when in ("before", "after")
        ]
    from kd.student_trainer.card import write_card

    write_card(Path(config.out), scores)
    emit(result, as_json, f"{config.out}: trained")


def run_training(config: Any, resume: bool = False) -> Any:
    """Drive a training run and its progress bar to the end."""
    from kd.student_trainer.train import train as run

    with progress_bar(f"training ({config.loss})") as advance:
        return run(config, resume=resume, on_step=lambda s: advance(
            s.step, s.steps_total, f"loss {s.loss:.4f}, {s.tokens_per_second:,.0f} tokens/s"))  # fmt: skip


def held_out_perplexity(model: str, **options: Any) -> float:
    """Perplexity of a model on a data spec, with a progress bar; options of `run_tasks`."""
    report = run_evaluation(model, ["perplexity"], **options)
    return float(report.tasks["perplexity"]["perplexity"]["value"])


# ------------------------------------------------------------------------------------------- evaluation


def run_evaluation(model: str, tasks: list[str], **options: Any) -> Any:
    """Drive an evaluation and its progress bar to the end; returns an `EvalReport`."""
    from kd.evaluation.tasks import run_tasks

    last = None
    with progress_bar(f"evaluating {model}") as advance:
        for last in run_tasks(model, tasks, **options):
            advance(last.done, last.total, last.task)
    assert last is not None
    assert last.report is not None
    return last.report


@cli.command("eval")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--tasks",
    default="perplexity",
    show_default=True,
    help="Comma-separated: perplexity, agreement, choices, generation.",
)
@click.option(
    "--data",
    "spec",
    help="Data spec for perplexity, choices (examples with choices) and generation (prompt and target).",
)
@click.option("--cache", type=PATH, help="Cache for agreement: KL to the teacher and top-1.")
@corpus_options
@click.option("--seq-len", type=int, help="Window in tokens; the model's positions, at most 1024, by default.")
@click.option("--stride", type=int, help="New tokens scored per window; seq-len - 1 by default.")
@click.option("--bos/--no-bos", default=True, show_default=True, help="Open documents and prompts with BOS.")
@click.option("--separator", default="\\n", show_default=True, help="Text between prompt and target of a pair.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Of a generated answer, EOS included; by default as the longest reference needs.",
)
@click.option("--stop", help="Cut a generated answer at this text too, e.g. \\n, where no reference holds it.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the agreement's KL.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--load-in-4bit", is_flag=True, help="Load the models in nf4 with double quantisation (bitsandbytes).")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--tokenizer", help="Tokenizer of a random model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights.")
@click.option(
    "--out", type=PATH, help="Folder for eval.json (a sub-folder per model, numbered, when there are several)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evaluate(models: tuple[str, ...], tasks: str, spec: str | None, cache: Path | None, out: Path | None, as_json: bool,
             separator: str, stop: str | None, **options: Any) -> None:  # fmt: skip
    """Score one or more models.

    Example: kd eval demo --tasks perplexity --data demo --split heldout
    """
    quiet_libraries()
    from kd.evaluation.comparison import with_error

    options |= {"separator": _escaped(separator), "stop": stop and _escaped(stop)}
    reports: list[EvalReport] = []
    for model in models:
        report = run_evaluation(model, [t.strip() for t in tasks.split(",")], data=spec, cache=cache, **options)
        if out is not None:
            report.save(out if len(models) == 1 else out / f"{len(reports)}-{Path(model).name.replace(':', '-')}")
        reports.append(report)
    if as_json:
        click.echo(json.dumps([r.to_dict() for r in reports], indent=2))
        return
    for report in reports:
        click.echo(f"{report.model} ({report.parameters:,} parameters)")
        width = max(22, *(len(name) + 2 for metrics in report.tasks.values() for name in metrics))
        for task, metrics in report.tasks.items():
            for name, metric in metrics.items():
                click.echo(
                    f"  {task:<12}{name:<{width}}{with_error(metric)} {metric['unit']}, {metric['n']:,} {metric['over']}s"
                )


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder of the report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def report(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare runs and evaluations: table, loss curves and bars as PNG, Markdown, CSV, JSON and one HTML page.

    Example: kd report demo-out/distilled demo-out/finetuned --out runs/report
    """
    from kd.evaluation.report import write_report

    files = write_report(list(runs), out)
    if not as_json:
        click.echo(files.markdown.read_text(encoding="utf-8"))
    emit({name: str(path) for name, path in asdict(files).items() if path is not None}, as_json)


# ---------------------------------------------------------------------------------------------- recipes


@cli.group()
def recipe() -> None:
    """Run the reference systems' settings, command by command."""


@recipe.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def recipe_ls(as_json: bool) -> None:
    """List the recipes.

    Example: kd recipe ls
    """
    from kd.data.recipes import load_recipe, recipe_names

    emit({name: load_recipe(name).about for name in recipe_names()}, as_json)


def recipe_options(function: Function) -> Function:
    """What `show` and `run` share."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", callback=_settings,
                     help="Give a variable of the recipe another value; may be repeated."),
        click.option("--out", type=PATH, help="Folder of the run; runs/NAME by default."),
        click.argument("name"),
    ):  # fmt: skip
        function = option(function)
    return function


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not name or not sign for name, sign, _value in pairs):
        raise click.BadParameter("expected NAME=VALUE, e.g. student=EleutherAI/pythia-410m")
    return {name: value for name, _sign, value in pairs}


@recipe.command("show")
@recipe_options
def recipe_show(name: str, out: Path | None, settings: dict[str, str], as_json: bool) -> None:
    """Print a recipe's commands, as one would type them.

    Example: kd recipe show neo-wikitext --set student=EleutherAI/pythia-160m
    """
    import shlex

    from kd.data.recipes import load_recipe

    found = load_recipe(name)
    commands = found.commands(out or Path("runs") / found.name, settings)
    if as_json:
        click.echo(json.dumps({"name": found.name, "about": found.about, "variables": dict(found.variables),
                               "commands": commands}, indent=2))  # fmt: skip
        return
    click.echo(f"# {found.about}\n# variables: {', '.join(f'{k}={v}' for k, v in found.variables.items())}")
    for command in commands:
        click.echo(shlex.join(["kd", *command]))


@recipe.command("run")
@recipe_options
def recipe_run(name: str, out: Path | None, settings: dict[str, str], as_json: bool) -> None:
    """Run a recipe. The same command again continues: finished trainings are passed over, others resumed.

    Example: kd recipe run oscarnav-four --out runs/four
    """
    from kd.data.recipes import load_recipe

    found = load_recipe(name)
    folder = out or Path("runs") / found.name
    commands = found.commands(folder, settings)
    for number, command in enumerate(commands, 1):
        click.echo(f"{number}/{len(commands)}  kd {' '.join(command)}", err=True)
        _run_step(command)
    emit({"recipe": found.name, "out": str(folder), "steps": len(commands)}, as_json, f"{found.name}: done")


def _run_step(command: list[str]) -> None:
    """One command of a recipe; a training run that is finished is passed over, one that was begun is resumed."""
    if command[0] == "train":
        state = Path(command[command.index("--out") + 1]) / "run.json"
        if state.exists():
            if json.loads(state.read_text(encoding="utf-8")).get("complete"):
                return
            command = [*command, "--resume"]
    cli.main(args=command, standalone_mode=False)


# ------------------------------------------------------------------------------------------------- demo


@cli.command()
@click.option(
    "--out", type=PATH, default=Path("demo-out"), show_default=True, help="Folder for cache, runs and report."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def demo(out: Path, as_json: bool) -> None:
    """Run the whole pipeline on the embedded teachers and texts, offline, in minutes.

    Example: kd demo --out demo-out
    """
    from kd.evaluation import demo as settings
    from kd.student_trainer.card import write_card

    quiet_libraries()
    settings.require_fresh(out)
    started = time.perf_counter()
    measured: list[Any] = []
    for act in settings.acts():
        click.echo(f"== {act.title}", err=True)
        click.echo("1/3  the teacher runs once over the text; its soft targets go into a cache", err=True)
        built = run_build(_plan(**act.build_options(out)))
        click.echo("2/3  students from one start, on the same text: without and with the teacher", err=True)
        results = {Path(config.out).name: run_training(config) for config in act.train_configs(out)}
        click.echo("3/3  scores on what no model was trained on", err=True)
        reports = {}
        for name, model in act.models(out).items():
            quantised = {"load_in_4bit": act.load_in_4bit and name == act.teacher_name}
            report = run_evaluation(model, list(act.tasks), **act.evaluation, **quantised)
            reports[name] = replace(report, model=name)
            reports[name].save(out / name)
            if name in results:
                write_card(out / name, settings.card_scores(reports[name]))
        measured.append(
            settings.ActResult(act, cache_summary(out / act.cache), built.tokens_per_second, results, reports)
        )
    outcome = settings.write_outcome(out, measured, seconds=time.perf_counter() - started)
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
        return
    click.echo("\n".join(settings.outcome_lines(measured, outcome)))


if __name__ == "__main__":
    main()
