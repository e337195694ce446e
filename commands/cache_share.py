"""kd cache push, kd cache pull: copy a cache to where others find it, and from there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.terminal.console import emit, outcome, say
from kd.commands.terminal.options import FOLDER, PATH, dry_run_option, json_option, parse_range
from kd.common.paths import as_path

if TYPE_CHECKING:
    from kd.cache_builder.share.transfer import Transferred
    from kd.cache_builder.store.records.manifest import CacheManifest

OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What a repository of the hub is called. It is also a path."""

workers_option = click.option(
    "--workers", type=click.IntRange(1, 256), default=8, show_default=True, help="Files to transfer at the same time."
)


@click.command("push")
@click.argument("path", type=PATH)
@click.argument("url")
@click.option(
    "--license",
    metavar="ID",
    help="Licence to state on the hub's dataset card, e.g. cc-by-4.0. By default none is stated.",
)
@click.option("--private", is_flag=True, help="Make a new repository on the hub private.")
@workers_option
@dry_run_option
@json_option
def cache_push(
    path: Path, url: str, license: str | None, private: bool, workers: int, dry_run: bool, as_json: bool
) -> None:
    """Copy a whole cache to hf://datasets/OWNER/NAME, s3://BUCKET/PATH or a folder. The same command continues a cut copy.

    Every file is checked before it is sent. The manifest is sent last, so an unfinished copy is never taken for a cache.

    Example: kd cache push runs/cache runs/copy
    """
    from kd.cache_builder.share.push import planned_push, push

    if OWNER_AND_NAME.fullmatch(url) and not as_path(url).parent.exists():
        say(f"{url} is a folder on this machine; hf://datasets/{url} is a dataset on the hub", err=True)
    if dry_run:
        emit(asdict(planned_push(path, url)) | {"url": url}, as_json, f"{url}: nothing was written. A push would send")
        return
    picture = _picture(path) if url.startswith("hf://") else None
    done = outcome("pushing", push(path, url, license=license, private=private, workers=workers, picture=picture))
    emit(_result(done) | {"url": url}, as_json, f"{url}: complete")


@click.command("pull")
@click.argument("url")
@click.argument("path", type=FOLDER)
@click.option(
    "--examples", callback=parse_range, metavar="A:B", help="Copy only the shards that hold examples A to B - 1."
)
@click.option(
    "--arrays",
    metavar="NAMES",
    help="Copy only these arrays (comma-separated), and the few bytes per token that every reader needs.",
)
@click.option(
    "--for",
    "losses",
    multiple=True,
    metavar="LOSS",
    help="Copy only the arrays that kd train --loss LOSS reads. Repeatable. Needs the extra train.",
)
@click.option(
    "--top-k",
    type=int,
    help="Keep fewer tokens per row: every shard is sliced when it arrives, and a smaller cache is written.",
)
@workers_option
@dry_run_option
@json_option
def cache_pull(
    url: str,
    path: Path,
    examples: tuple[int, int] | None,
    arrays: str | None,
    losses: tuple[str, ...],
    top_k: int | None,
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy a cache, or a part of one, from hf://datasets/…, s3://…, https://… or a folder. The same command continues a cut copy.

    Every file is compared with its commit when it arrives. A part lists what it holds; pulling more of the cache adds to it.

    Example: kd cache pull runs/cache runs/part --examples 0:10 --for ce
    """
    from kd.cache_builder.share.pull import planned_pull, pull
    from kd.common.errors import DataError

    if top_k is not None:
        if arrays or losses:
            raise DataError(
                "a slice chooses its arrays itself", found="--top-k with --arrays or --for", try_="one of them"
            )
        if dry_run:
            raise DataError(
                "the size of a slice is known when it is written",
                found="--top-k with --dry-run",
                try_="--dry-run without --top-k, for what would be fetched",
            )
        _slice(url, path, top_k, examples, as_json)
        return
    if dry_run:
        planned = planned_pull(url, path, examples=examples, arrays=_choice(arrays, losses))
        emit(asdict(planned) | {"path": str(path)}, as_json, f"{path}: nothing was written. A pull would fetch")
        return
    steps = pull(url, path, examples=examples, arrays=_choice(arrays, losses), workers=workers)
    done = outcome("pulling", steps)
    part = {} if done.part is None else {"part": {"shards": len(done.part.shards), "arrays": list(done.part.arrays)}}
    result = _result(done) | part
    if not as_json and done.part is not None:
        result |= {"part": f"{len(done.part.shards)} shards of arrays {', '.join(done.part.arrays)}"}
    emit(result, as_json, f"{path}: {'complete' if done.part is None else 'a part of the cache'}")


def _picture(path: Path) -> bytes | None:
    """The card's picture as a PNG; None, with a word, where matplotlib is not installed or the cache is not one to draw."""
    from kd.cache_builder.look.row_statistics import row_statistics
    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.common.errors import CacheError
    from kd.common.extras import MissingPackageError, require_package

    try:
        require_package("matplotlib", "the picture of the dataset card")
        figures = outcome("drawing the card's picture", row_statistics(CacheReader(path)))
    except MissingPackageError as error:
        say(f"the dataset card gets no picture: {error.headline}", err=True)
        return None
    except CacheError:  # the push itself says what is wrong with the cache
        return None
    from kd.evaluation.cache_figures import draw_entropy

    with tempfile.TemporaryDirectory() as folder:
        return draw_entropy(Path(folder) / "entropy.png", figures).read_bytes()


def _slice(url: str, path: Path, top_k: int, examples: tuple[int, int] | None, as_json: bool) -> None:
    """Slice a cache through a mirror. All columns of an array are fetched, as they lie in the same chunks; K are kept."""
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.upkeep.cache_registry import remember
    from kd.cache_builder.upkeep.slice_cache import slice_cache
    from kd.cache_builder.upkeep.summary import cache_summary

    steps = slice_cache(open_files(url), path, top_k=top_k, examples=examples)
    outcome("pulling", steps)
    remember(path)
    emit(cache_summary(path), as_json, f"{path}: a slice of the cache, complete")


def _choice(arrays: str | None, losses: tuple[str, ...]) -> Callable[[CacheManifest], Collection[str]] | None:
    """A function that names the arrays to pull, given the manifest; None for all arrays."""
    if arrays is None and not losses:
        return None

    def choose(manifest: CacheManifest) -> Collection[str]:
        wanted = [name.strip() for name in arrays.split(",")] if arrays else []
        if losses:
            from kd.common.settings import make
            from kd.student_trainer.batches.compatibility import needed_arrays, refuse_unknown_parts, resolve_objective
            from kd.student_trainer.configuration.learning_settings import LossSettings

            for loss in losses:
                settings = make(LossSettings, {"loss": loss})
                objective = resolve_objective(manifest.targets, settings, logprobs_only=manifest.logprobs_only)
                if not manifest.tail_unknown:  # then nothing but --tail renorm will do, which reads the same arrays
                    refuse_unknown_parts(manifest, objective)
                wanted += needed_arrays(objective, manifest)
        return wanted

    return choose


def _result(done: Transferred) -> dict[str, Any]:
    return {k: v for k, v in asdict(done).items() if k != "part"}
