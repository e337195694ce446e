"""kd cache slice, merge, import, export and ls: make caches out of caches and of the files of others, and list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.cache_builder.exchange.import_settings import FORMAT_NAMES, ImportSettings
from kd.cache_builder.store.profiles import CODEC_NAMES, ID_CODECS, PROFILES
from kd.commands.terminal.console import emit, emit_json, outcome, quiet_libraries, say
from kd.commands.terminal.options import FOLDER, PATH, dry_run_option, json_option, parse_range
from kd.commands.terminal.settings_options import SettingsCommand, settings_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kd.cache_builder.upkeep.derived_cache import DerivedCache
    from kd.common.progress import Progress


@click.command("slice")
@click.argument("path")
@click.option("--out", required=True, type=FOLDER, help="Directory of the slice.")
@click.option("--top-k", type=int, help="Keep fewer tokens per row; the mass of dropped tokens goes into the tail.")
@click.option(
    "--profile",
    type=click.Choice(tuple(PROFILES)),
    help="A profile that keeps less: compact or adaptive out of kl; kl, uld or sampled out of full.",
)
@click.option(
    "--min-probability",
    type=float,
    help="Least probability of a kept token, with the profile adaptive; the mass of dropped tokens goes into the tail.",
)
@click.option("--min-k", type=int, help="Tokens that every row keeps, however improbable, with the profile adaptive.")
@click.option(
    "--certain-below",
    type=float,
    metavar="NATS",
    help="Rows whose entropy is surely below this keep one token, with the profile adaptive. Of the tail only the mass is known, "
    "so the most that the entropy can be decides.",
)
@click.option("--tail-bands", type=int, metavar="0", help="0 leaves the rank bands out.")
@click.option(
    "--tail-samples",
    type=int,
    help="Fewer draws from the tail; 0 for none. Where the tail grows, its draws are drawn again from the stored row.",
)
@click.option("--logprob-codec", type=click.Choice(CODEC_NAMES), help="Store log-probabilities with another codec.")
@click.option("--id-codec", type=click.Choice(ID_CODECS), help="Store ids in another way; followers takes fewer bytes.")
@click.option(
    "--examples",
    callback=parse_range,
    metavar="A:B",
    help="Keep the cached examples A to B - 1 (kd cache info prints their number).",
)
@dry_run_option
@json_option
def cache_slice(path: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write a smaller cache from a cache, without the teacher. The same command continues a slice that was cut short.

    Example: kd cache slice runs/cache --top-k 16 --out runs/cache-16
    """
    from kd.cache_builder.upkeep.cache_registry import located
    from kd.cache_builder.upkeep.slice_cache import planned_slice, slice_cache

    if dry_run:
        _show_cost(planned_slice(located(path), **options), out, as_json, "slice")
        return
    _derived(slice_cache(located(path), out, **options), out, as_json, "slicing")


@click.command("merge")
@click.argument("paths", nargs=-1, required=True)
@click.option("--out", required=True, type=FOLDER, help="Directory of the merged cache.")
@dry_run_option
@json_option
def cache_merge(paths: tuple[str, ...], out: Path, dry_run: bool, as_json: bool) -> None:
    """Write the examples of several caches to one cache. Their teachers and settings must be equal.

    Example: kd cache merge runs/one runs/two --out runs/both
    """
    from kd.cache_builder.upkeep.cache_registry import located
    from kd.cache_builder.upkeep.merge_caches import merge_caches, planned_merge

    if dry_run:
        _show_cost(planned_merge([located(p) for p in paths]), out, as_json, "merger")
        return
    _derived(merge_caches([located(p) for p in paths], out), out, as_json, "merging")


def _show_cost(planned: DerivedCache, out: Path, as_json: bool, what: str) -> None:
    result = {"out": str(out)} | planned.cost(out)
    emit(result, as_json, f"{out}: nothing was written. A {what} would write")


def _derived(steps: Iterator[Progress[Path]], out: Path, as_json: bool, label: str) -> None:
    from kd.cache_builder.upkeep.cache_registry import remember
    from kd.cache_builder.upkeep.summary import cache_summary

    outcome(label, steps)
    remember(out)
    emit(cache_summary(out), as_json, f"{out}: complete")


@click.command("import", cls=SettingsCommand)
@click.argument("format", type=click.Choice(FORMAT_NAMES))
@click.argument("source", type=PATH)
@settings_options(ImportSettings)
@dry_run_option
@json_option
def cache_import(format: str, source: Path, settings: ImportSettings, dry_run: bool, as_json: bool) -> None:
    """Write a cache from log-probabilities that others have computed. The same command again continues.

    Every row is read and checked before the first one is written. docs/how-to/caches-from-elsewhere.md describes the formats.

    Example: kd cache import npz rows.npz --tokenizer demo --out runs/imported
    """
    quiet_libraries()
    from kd.cache_builder.exchange.import_cache import import_cost, import_steps
    from kd.cache_builder.upkeep.summary import cache_summary

    if dry_run:
        cost = {"out": str(settings.out)} | import_cost(format, source, settings)
        emit(cost, as_json, f"{settings.out}: nothing was written. An import would write")
        return
    outcome("importing", import_steps(format, source, settings))
    emit(cache_summary(settings.out), as_json, f"{settings.out}: complete")


@click.command("export")
@click.argument("format", type=click.Choice(("npz", "parquet")))
@click.argument("path", metavar="PATH_OR_URL")
@click.option("--out", required=True, type=FOLDER, help="New folder for the files, one for each shard.")
@dry_run_option
@json_option
def cache_export(format: str, path: str, out: Path, dry_run: bool, as_json: bool) -> None:
    """Write a cache's ids and log-probabilities as files that other programs read.

    Example: kd cache export parquet runs/cache --out runs/rows
    """
    from kd.cache_builder.exchange.export_cache import export_cost, export_steps

    if dry_run:
        cost = {"out": str(out)} | export_cost(format, path, out)
        emit(cost, as_json, f"{out}: nothing was written. An export would write")
        return
    names = outcome("exporting", export_steps(format, path, out))
    if as_json:
        emit_json({"out": str(out), "files": names})
    else:
        say(f"{out}: {len(names)} files")


@click.command("ls")
@click.argument("root", type=PATH, required=False)
@json_option
def cache_ls(root: Path | None, as_json: bool) -> None:
    """List the caches below ROOT, or those that were finished on this machine (registered in $KD_HOME, ~/.cache/kd).

    Commands that read a cache also take the beginning of its fingerprint in place of its path.

    Example: kd cache ls runs
    """
    from kd.cache_builder.upkeep.cache_registry import listing
    from kd.common.errors import CacheError

    if root is not None and not root.is_dir():
        raise CacheError("there is no such folder", where=root)
    rows = listing(root)
    if as_json:
        emit_json({"caches": rows})
        return
    for row in rows:
        if row["fingerprint"] is None:
            say(f"{'damaged':<12}  {row['path']}: {row['error']}")
            continue
        state = "" if row["complete"] else f", {row['shards_committed']} of {row['shards']} shards"
        kept = row["profile"] + (f" k={row['top_k']}" if row["top_k"] else "")
        name = f"{row['fingerprint'][:12]}  {row['path']}: {row['teacher']} over {row['corpus']}"
        say(f"{name}, {kept}, {row['rows']:,} rows, {row['bytes'] / 1e6:,.1f} MB{state}")
    if not rows:
        say("no caches" + (f" below {root}" if root else " have been finished on this machine"))
