"""kd cache: build, inspect and check teacher-logit caches."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit, emit_json, follow, quiet_libraries
from kd.commands.lazy import LazyCommands
from kd.commands.options import build_options, json_option, unescaped

if TYPE_CHECKING:
    from kd.cache_builder.build import BuildPlan, BuildProgress, BuildRequest
    from kd.data.rendering import InstructionConfig


SHARING = {"pull": "kd.commands.share:cache_pull", "push": "kd.commands.share:cache_push"}


@click.group(commands=LazyCommands(SHARING))
def cache() -> None:
    """Build, inspect, check and share teacher-logit caches."""


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
        seq_len or min(most, window or most), stride, bos, eos, unescaped(separator),
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


def plan_of(**options: Any) -> BuildPlan:
    """The plan of a build; an upper bound where the teacher is to write the targets and has not."""
    from kd.cache_builder.build import plan_build
    from kd.cache_builder.generate import answered

    request = _request(**options)
    return plan_build(_generated(request) if request.generation is not None and answered(request) else request)


def _generated(request: BuildRequest) -> BuildRequest:
    """Drive the generation of targets and its progress bar to the end."""
    from kd.cache_builder.generate import generate

    last = follow("generating", generate(request), lambda p: (p.done, p.total, f"{p.done:,} of {p.total:,} answers"))
    assert last.request is not None
    return last.request


@cache.command("plan")
@build_options
def cache_plan(as_json: bool, **options: Any) -> None:
    """Say what a build would cost: rows, bytes, time. Loads no model weights, writes nothing.

    With --targets teacher: an upper bound, from the longest answers there may be, until the teacher has answered.

    Example: kd cache plan --teacher demo --data demo --out runs/cache
    """
    from kd.cache_builder.estimate import estimate

    cost = estimate(plan_of(**options))
    bound = "" if cost["targets_known"] else " at most (the teacher has not answered yet: this is an upper bound)"
    emit(cost, as_json, f"This build would make{bound}")


@cache.command("build")
@build_options
@click.option("--profile-build", is_flag=True, help="Say where the time went.")
def cache_build(as_json: bool, profile_build: bool, **options: Any) -> None:
    """Run the teacher over the text and write its soft targets. The same command again continues.

    Example: kd cache build --teacher demo --data demo --limit 20 --out runs/cache
    """
    from kd.cache_builder.build import plan_build
    from kd.cache_builder.summary import cache_summary

    request = _request(**options)
    plan = plan_build(request if request.generation is None else _generated(request))
    last = run_build(plan)
    result = cache_summary(options["out"]) | {"tokens_per_second": last.tokens_per_second, "reused": last.reused}
    if profile_build and last.seconds is not None:
        result |= {"seconds": last.seconds, "padding_share": last.padding_share}
    heading = "nothing left to do here" if last.reused else "built"
    if not as_json:
        click.echo(f"{options['out']}: " + ("complete" if last.complete else "not complete") + f" ({heading})")
    emit(result, as_json)


def run_build(plan: BuildPlan) -> BuildProgress:
    """Drive a build and its progress bar to the end."""
    from kd.cache_builder.build import build

    def show(step: BuildProgress) -> tuple[int, int, str]:
        rate = f"{step.tokens_per_second:,.0f} tokens/s, shard {step.shards_done}/{step.shards_total}"
        return step.rows_done, step.rows_total, rate

    return follow("building", build(plan), show)


@cache.command("info")
@click.argument("path", metavar="PATH_OR_URL")
@json_option
def cache_info(path: str, as_json: bool) -> None:
    """Show a cache's identity, bytes per token, mass kept and decoding error, as measured during the build.

    Example: kd cache info runs/cache
    """
    from kd.cache_builder.mirror import open_cache
    from kd.cache_builder.summary import cache_summary

    result = cache_summary(open_cache(path))
    if not as_json:
        result["array_bytes_per_token"] = ", ".join(f"{k} {v}" for k, v in result["array_bytes_per_token"].items())
    emit(result, as_json, path)


@cache.command("verify")
@click.argument("path", metavar="PATH_OR_URL")
@json_option
def cache_verify(path: str, as_json: bool) -> None:
    """Check every checksum and promise; name the damaged shard, array and rows. Exit code 3 on damage.

    Example: kd cache verify runs/cache
    """
    from kd.cache_builder.manifest import load_manifest
    from kd.cache_builder.mirror import open_cache
    from kd.cache_builder.part import load_part
    from kd.cache_builder.verify import verify

    root = open_cache(path)
    part = load_part(root, load_manifest(root))
    last = follow("verifying", verify(root), lambda p: (p.bytes_done, p.bytes_total, f"{len(p.findings)} findings"))
    findings = [asdict(f) for f in last.findings]
    if as_json:
        emit_json({"path": path, "bytes": last.bytes_total, "sound": not findings, "findings": findings}
                  | ({} if part is None else {"part": {"shards": len(part.shards), "arrays": list(part.arrays)}}))  # fmt: skip
    else:
        for finding in last.findings:
            place = [f"shard {finding.shard}" if finding.shard is not None else "", finding.array or "",
                     f"rows {finding.rows}" if finding.rows else ""]  # fmt: skip
            click.echo(f"{finding.where}: {finding.problem} ({', '.join(p for p in place if p) or 'whole file'})")
        if part is not None:
            click.echo(f"{path}: a part of a cache, {len(part.shards)} shards of arrays {', '.join(part.arrays)}")
        click.echo(
            f"{path}: {'sound' if not findings else f'{len(findings)} findings'}, {last.bytes_total:,} bytes checked"
        )
    if findings:
        sys.exit(3)
