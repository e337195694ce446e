"""kd cache: build, inspect and check teacher-logit caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit, follow, quiet_libraries
from kd.commands.lazy import LazyCommands
from kd.commands.options import RECORDED, RecordedCommand, build_options, json_option, running_options, unescaped

if TYPE_CHECKING:
    from kd.cache_builder.build.builder import BuildProgress
    from kd.cache_builder.build.plan import BuildPlan
    from kd.cache_builder.build.request import BuildRequest
    from kd.data.data_settings import InstructionConfig

NOT_RECORDED = {"out", "as_json", "shard", "profile_build", "extend", "reuse", "workers", "engine"}
"""Options of a build that say nothing about what is in it."""


ELSEWHERE = {
    "ls": "kd.commands.cache_copies:cache_ls",
    "merge": "kd.commands.cache_copies:cache_merge",
    "pull": "kd.commands.cache_share:cache_pull",
    "push": "kd.commands.cache_share:cache_push",
    "repair": "kd.commands.cache_check:cache_repair",
    "slice": "kd.commands.cache_copies:cache_slice",
    "verify": "kd.commands.cache_check:cache_verify",
}
"""The group's commands in other modules."""


@click.group(commands=LazyCommands(ELSEWHERE))
def cache() -> None:
    """Build, inspect, check and share teacher-logit caches."""


def _request(
    teacher: str,
    spec: str,
    out: Path,
    split: str | None,
    columns: dict[str, str],
    limit: int | None,
    instructions: InstructionConfig | None,
    profile: str,
    top_k: int | None,
    samples: int | None,
    tail_bands: int | None,
    temperatures: tuple[float, ...],
    band_temperatures: tuple[float, ...] | None,
    logprob_codec: str | None,
    seq_len: int | None,
    target_source: str,
    sample_temperature: float,
    target_len: int | None,
    overlong: str,
    stride: int | None,
    bos: bool,
    eos: bool,
    separator: str,
    load_in_4bit: bool,
    dtype: str,
    device: str,
    revision: str | None,
    tokenizer: str | None,
    tokens_per_batch: int | None,
    shard_rows: int | None,
    shard: tuple[int, int],
    seed: int,
) -> BuildRequest:
    quiet_libraries()
    from kd.cache_builder.build.request import BuildRequest, GenerationConfig
    from kd.cache_builder.store.manifest import Layout
    from kd.cache_builder.store.targets import TargetConfig
    from kd.common.errors import DataError, unknown_name
    from kd.data.blocks import BlockConfig
    from kd.data.sources import load_classes, load_corpus
    from kd.models.loading import ModelRequest, is_classifier, is_encoder_decoder, load_config, max_positions

    request = ModelRequest(teacher, revision, dtype, device, load_in_4bit, tokenizer, seed)
    config = load_config(request)
    classes = is_classifier(config)
    if classes:  # a handful of numbers per text: all of them, as they are
        top_k = int(config.num_labels) if top_k is None else top_k
        logprob_codec = logprob_codec or "float32"
    targets = TargetConfig.of_profile(
        profile,
        top_k=top_k,
        samples=samples,
        tail_bands=tail_bands,
        temperatures=temperatures,
        band_temperatures=band_temperatures or (1.0,),
        logprob_codec=logprob_codec,
        seed=seed,
    )
    window, encoder = max_positions(config), is_encoder_decoder(config)
    most = 1024 if encoder else 512
    blocks = BlockConfig(
        seq_len or min(most, window or most),
        stride,
        bos,
        eos,
        unescaped(separator),
        encoder,
        target_len or (256 if encoder else None),
        overlong,
    )
    layout = None if shard_rows is None else Layout(shard_rows, min(4096, shard_rows))
    if target_source == "teacher" and "prompt" in columns:  # prompts are enough: the answers become the targets
        columns = {"target": columns["prompt"], **columns}
    if classes:
        corpus = load_classes(spec, split=split, columns=columns, limit=limit, instructions=instructions)
    else:
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


def plan_of(**options: Any) -> BuildPlan:
    """The plan of a build; an upper bound where the teacher is to write the targets and has not."""
    from kd.cache_builder.build.generate import answered
    from kd.cache_builder.build.plan import plan_build

    request = _request(**options)
    return plan_build(_generated(request) if request.generation is not None and answered(request) else request)


def _generated(request: BuildRequest) -> BuildRequest:
    """Drive the generation of targets and its progress bar to the end."""
    from kd.cache_builder.build.generate import generate

    last = follow("generating", generate(request), lambda p: (p.done, p.total, f"{p.done:,} of {p.total:,} answers"))
    assert last.request is not None
    return last.request


@cache.command("plan")
@build_options
@running_options
def cache_plan(
    as_json: bool, profile_build: bool, extend: Path | None, reuse: bool, workers: int, engine: str, **options: Any
) -> None:
    """Say what a build would cost one builder: rows, bytes, time. Loads no model weights, writes nothing.

    With --targets teacher: an upper bound, from the longest answers there may be, until the teacher has answered.

    Example: kd cache plan --teacher demo --data demo --out runs/cache
    """
    from kd.cache_builder.build.estimate import estimate

    cost = estimate(plan_of(**options))
    bound = "" if cost["targets_known"] else " at most (the teacher has not answered yet: this is an upper bound)"
    emit(cost, as_json, f"This build would make{bound}")


@cache.command("build", cls=RecordedCommand)
@build_options
@running_options
def cache_build(
    as_json: bool, profile_build: bool, extend: Path | None, reuse: bool, workers: int, engine: str, **options: Any
) -> None:
    """Run the teacher over the text and write its soft targets. The same command again continues.

    Example: kd cache build --teacher demo --data demo --limit 20 --out runs/cache
    """
    from kd.cache_builder.upkeep.summary import cache_summary

    last = _build(options, extend, reuse, workers, engine)
    result = cache_summary(options["out"]) | {"tokens_per_second": last.tokens_per_second, "reused": last.reused}
    if profile_build and last.seconds is not None:
        result |= {"seconds": last.seconds, "padding_share": last.padding_share}
    heading = "nothing left to do here" if last.reused or last.elsewhere else "built"
    if not as_json:
        click.echo(f"{options['out']}: " + ("complete" if last.complete else "not complete") + f" ({heading})")
    if last.copied:
        result["shards_copied"] = last.copied
    if last.elsewhere:
        result["elsewhere"] = {str(shard): who for shard, who in last.elsewhere.items()}
        if not as_json:
            del result["elsewhere"]
            for who in sorted(set(last.elsewhere.values())):
                shards = ", ".join(str(i) for i, other in last.elsewhere.items() if other == who)
                click.echo(f"  being built by {who}: shards {shards}; the same command again finishes what is left")
    emit(result, as_json)


def _build(options: dict[str, Any], extend: Path | None, reuse: bool, workers: int, engine: str) -> BuildProgress:
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.store.commits import OWN_NAMES
    from kd.cache_builder.store.manifest import existing_cache
    from kd.cache_builder.upkeep.cache_registry import remember

    given = click.get_current_context().meta[RECORDED]
    request = replace(
        _request(**options), extend=extend, options={k: v for k, v in given.items() if k not in NOT_RECORDED}
    )
    plan = plan_build(request if request.generation is None else _generated(request))
    if reuse and extend is None and existing_cache(request.out, OWN_NAMES) is None:
        plan = reused(plan)
    last = run_build(plan, workers, engine)
    if last.complete:
        remember(request.out)
    return last


def reused(plan: BuildPlan) -> BuildPlan:
    """The plan, to be filled from a cache of the same fingerprint, where one was finished on this machine."""
    from kd.cache_builder.build.plan import plan_build
    from kd.cache_builder.store.manifest import load_manifest
    from kd.cache_builder.upkeep.cache_registry import found

    request = plan.request
    for path in found(plan.manifest.fingerprint):
        if request.layout in (None, load_manifest(path).layout) and path != request.out.resolve():
            click.echo(f"the same cache was built at {path}: its shards are copied", err=True)
            return plan_build(replace(request, extend=path))
    return plan


@click.command("build", cls=RecordedCommand)
@build_options
@running_options
def rebuild(
    as_json: bool, profile_build: bool, extend: Path | None, reuse: bool, workers: int, engine: str, **options: Any
) -> None:
    """Build without a word: what `kd cache repair` does with the options that a cache was built with."""
    _build(options, extend, reuse, workers, engine)


def run_build(plan: BuildPlan, workers: int = 1, engine: str = "local") -> BuildProgress:
    """Drive a build and its progress bar to the end."""
    from kd.cache_builder.build.builder import build
    from kd.cache_builder.build.engines import build_together

    def show(step: BuildProgress) -> tuple[int, int, str]:
        rate = f"{step.tokens_per_second:,.0f} tokens/s, shard {step.shards_done}/{step.shards_total}"
        return step.rows_done, step.rows_total, rate

    alone = workers == 1 and engine == "local"
    return follow("building", build(plan) if alone else build_together(plan, workers=workers, engine=engine), show)


@cache.command("info")
@click.argument("path", metavar="PATH_OR_URL")
@json_option
def cache_info(path: str, as_json: bool) -> None:
    """Show a cache's identity, bytes per token, mass kept and decoding error, as measured during the build.

    Example: kd cache info runs/cache
    """
    from kd.cache_builder.opening import cache_folder
    from kd.cache_builder.upkeep.summary import cache_summary

    emit(cache_summary(cache_folder(path)), as_json, path)
