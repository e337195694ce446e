"""kd cache: build, inspect and check teacher-logit caches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.cache_builder.build.build_settings import RECORDED, BillSettings, BuildSettings, PlanSettings
from kd.commands.terminal.console import emit, emit_json, follow, outcome, quiet_libraries, say
from kd.commands.terminal.lazy import LazyCommands
from kd.commands.terminal.options import FOLDER, dry_run_option, json_option
from kd.commands.terminal.settings_options import GIVEN, RecordingCommand, SettingsCommand, settings_options
from kd.common.paths import StoreAddress

if TYPE_CHECKING:
    from kd.cache_builder.build.builder import BuildProgress

ELSEWHERE = {
    "export": "kd.commands.cache_copies:cache_export",
    "import": "kd.commands.cache_copies:cache_import",
    "ls": "kd.commands.cache_copies:cache_ls",
    "merge": "kd.commands.cache_copies:cache_merge",
    "pull": "kd.commands.cache_share:cache_pull",
    "push": "kd.commands.cache_share:cache_push",
    "repair": "kd.commands.cache_check:cache_repair",
    "search": "kd.commands.looking.cache_search:cache_search",
    "show": "kd.commands.looking.cache_show:cache_show",
    "slice": "kd.commands.cache_copies:cache_slice",
    "status": "kd.commands.cache_builders:cache_status",
    "unlock": "kd.commands.cache_builders:cache_unlock",
    "verify": "kd.commands.cache_check:cache_verify",
}
"""The group's commands in other modules."""

FILES_OF_A_CACHE = 8
"""Most files of a cache beside those of its shards and arrays: manifest, tables, vocabulary, answers."""

profile_build_option = click.option("--profile-build", is_flag=True, help="Print where the time of the build went.")


@click.group(commands=LazyCommands(ELSEWHERE))
def cache() -> None:
    """Build, inspect, check and share teacher-logit caches."""


@cache.command("plan", cls=SettingsCommand)
@settings_options(PlanSettings)
@profile_build_option
@json_option
def cache_plan(settings: PlanSettings, profile_build: bool, as_json: bool) -> None:
    """Print what a build would cost one builder: rows, bytes, time. Writes nothing, and loads no weights without --fidelity.

    With --fidelity ERROR some hundred rows pass through the teacher, and a profile and a k are proposed for that error of the
    gradient, with what the teacher's entropy means for the gain to expect.

    With --plan-sample N the text is read whole and N of its examples are tokenised: rows, bytes and time are estimates.

    With --targets teacher the numbers are an upper bound, from the longest possible answers, until the teacher has
    answered.

    Example: kd cache plan --teacher demo --data demo --out runs/cache
    """
    quiet_libraries()
    from kd.cache_builder.build.estimate import planned_cost

    cost = planned_cost(settings, follow)
    if as_json:
        emit_json(cost)
        return
    proposal = cost.pop("fidelity", None)
    bound = "" if cost["targets_known"] else " at most (the teacher has not answered yet: this is an upper bound)"
    if settings.plan_sample is not None:
        bound = (
            f", judged by {cost['sampled_examples']:,} of {cost['text_examples']:,} examples.\nAll of them were read and counted; "
            "the others were not tokenised. An error is half of a 95 % interval"
        )
    emit(cost, as_json, f"This build would make{bound}")
    if proposal is not None:
        say("\n".join(proposal_lines(proposal)))


def print_build_plan(settings: BuildSettings, *, as_json: bool) -> None:
    """Print what a build would write. Raises CacheMismatchError where its folder holds another cache."""
    quiet_libraries()
    from kd.cache_builder.build.estimate import estimate
    from kd.cache_builder.build.from_settings import plan_of
    from kd.cache_builder.build.object_store.s3_traces import existing_in_store
    from kd.cache_builder.store.records.cache_identity import refuse_mismatch
    from kd.cache_builder.store.records.commits import existing_cache

    plan = plan_of(settings, watch=follow)
    out = settings.out
    existing = existing_in_store(out) if isinstance(out, StoreAddress) else existing_cache(out)
    if existing is not None and plan.targets_known:
        refuse_mismatch(settings.out, plan.manifest.identity, existing)
    cost = estimate(plan)
    shards, arrays = len(plan.manifest.shards), len(plan.manifest.arrays)
    files = shards * (arrays + 3) + arrays + FILES_OF_A_CACHE  # a shard has its examples, its commit and lengths too
    result = {"out": str(settings.out), "files_at_most": files, **cost}
    emit(result, as_json, f"{settings.out}: nothing was written. A build would write")


def proposal_lines(proposal: Mapping[str, Any]) -> list[str]:
    """What a pilot has found, for people."""
    errors, sizes, k = proposal["errors_by_top_k"], proposal["bytes_by_top_k"], proposal["top_k"]
    lines = [
        f"A pilot of {proposal['rows']:,} rows: entropy {proposal['entropy_nats']:.2f} nats, "
        f"{proposal['rows_with_one_token_above_0.95']:.0%} of rows with one token above 0.95",
        f"  gain to expect: {proposal['gain_to_expect']}",
        f"For a gradient at most {proposal['error_wanted']:g} off, at T = 1, of a student that knows how often each token comes:",
        f"  --profile kl --top-k {k}: {errors[k]:.4f} off, {sizes[k]:,} B a row before compression",
    ]
    if (rule := proposal["adaptive"]) is not None:
        lines.append(
            f"  --profile adaptive --min-probability {rule['min_probability']:g}: {rule['error']:.4f} off, "
            f"{rule['tokens']:.1f} tokens a row"
        )
    if (drawn := proposal["tail_samples"]) is not None:
        rule = f"--min-probability {drawn['min_probability']:g} --tail-samples {drawn['tail_samples']}"
        lines.append(
            f"  --profile adaptive {rule}: {drawn['tokens']:.1f} tokens and {drawn['draws']:.1f} draws a row; "
            f"{drawn['error_without_bias']:.2f} off on each row, but without bias, so that it averages out over a batch; for kl at "
            "T = 1 (all else reads the tokens alone)"
        )
    if (rows := proposal["as_set"]) is not None:
        lines.append(
            f"  as these settings have it: {rows['error']:.4f} off, {rows['tokens']:.1f} tokens a row, "
            f"{rows['rows_of_one_token']:.0%} of rows with one token, "
            f"{rows['bytes_before_compression']:,} B a row before compression"
        )
    lines += [f"  at T = {t:g}: --top-k {size}" for t, size in proposal["top_k_by_temperature"].items()]
    around = [size for size in errors if k // 8 <= size <= 4 * k]
    lines.append("  other k: " + ", ".join(f"{size}: {errors[size]:.2g}" for size in around))
    lines.append(
        f"  --profile sampled --samples 50: {proposal['error_of_50_draws_without_bias']:.2f} off on each row without "
        "bias; for kl at T = 1 alone"
    )
    return lines


@cache.command("bill")
@settings_options(BillSettings)
@json_option
def cache_bill(settings: BillSettings, as_json: bool) -> None:
    """Print what a cache of a given size would cost: disk, files, requests, GPU-hours, reader cores, memory.

    Arithmetic from measured constants; no text and no teacher are needed. kd cache plan knows a text and a teacher.

    Example: kd cache bill --rows 10000000000 --gpu-rate 5000
    """
    from kd.cache_builder.build.bill import bill_of

    emit(bill_of(settings), as_json, f"A cache of {settings.rows:,} rows")


@cache.command("build", cls=RecordingCommand)
@settings_options(BuildSettings)
@profile_build_option
@dry_run_option
@json_option
def cache_build(settings: BuildSettings, profile_build: bool, dry_run: bool, as_json: bool) -> None:
    """Run the teacher over the text and write its soft targets. The same command again continues.

    Exit code 4 where other builders hold shards of this build: --wait waits for them.

    Example: kd cache build --teacher demo --data demo --limit 20 --out runs/cache
    """
    given = {name: value for name, value in click.get_current_context().meta[GIVEN].items() if name != "dry_run"}
    if dry_run:
        print_build_plan(settings, as_json=as_json)
    elif settings.served.processes > 1:
        build_in_a_group(settings, given, profile_build=profile_build, as_json=as_json)
    else:
        build_and_show(settings, given, profile_build=profile_build, as_json=as_json)


def build_in_a_group(
    settings: BuildSettings, given: Mapping[str, str | bool], *, profile_build: bool, as_json: bool
) -> None:
    """One of torchrun's processes of a build: the leader of the first group shows it, other leaders build in silence."""
    quiet_libraries()
    from kd.cache_builder.build.from_settings import build_in_groups, build_of

    kept = {name: value for name, value in given.items() if name != "tensor_parallel"}  # which a repair need not repeat

    def lead(build_settings: BuildSettings, first: bool) -> BuildProgress:
        if first:
            return build_and_show(build_settings, kept, profile_build=profile_build, as_json=as_json)
        return build_of(build_settings, recorded={name: value for name, value in kept.items() if name in RECORDED})

    build_in_groups(settings, lead)


def build_and_show(
    settings: BuildSettings, given: Mapping[str, str | bool], *, profile_build: bool = False, as_json: bool = False
) -> BuildProgress:
    """Build a cache behind progress bars, print the result, and return the last progress record.

    given   options as they were typed; the cache records those that say what is in it

    Raises UnfinishedBuildError, after the result is printed, where other builders hold shards of this build.
    """
    from kd.cache_builder.build.builder import require_finished

    last = build_behind_a_bar(settings, {name: value for name, value in given.items() if name in RECORDED})
    result = summary_of(settings.out, last) | {"tokens_per_second": last.tokens_per_second, "reused": last.reused}
    if profile_build and last.seconds is not None:
        result |= {"seconds": last.seconds, "padding_share": last.padding_share}
    heading = "nothing left to do here" if last.reused else "built"
    if not as_json:
        state = "complete" if last.complete else "not complete"
        say(f"{settings.out}: {state} ({f'{last.left} shards left' if last.left else heading})")
    if last.copied:
        result["shards_copied"] = last.copied
    if last.restarted:
        result["builders_restarted"] = last.restarted
    if last.placed:
        result["weights_on"] = last.placed
    if as_json and last.elsewhere:
        result["elsewhere"] = {str(shard): builder for shard, builder in last.elsewhere.items()}
    emit(result, as_json)
    require_finished(last, settings.out)
    return last


def summary_of(out: Path | StoreAddress, last: BuildProgress) -> dict[str, Any]:
    """What was built, in figures. Of a cache in an object store that is not complete, the counts alone."""
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.upkeep.summary import cache_summary

    if isinstance(out, StoreAddress) and not last.complete:
        return {
            "complete": False,
            "rows": last.rows_total,
            "shards": last.shards_total,
            "shards_committed": last.shards_done,
        }
    return cache_summary(open_files(out) if isinstance(out, StoreAddress) else out)


def build_behind_a_bar(settings: BuildSettings, recorded: Mapping[str, str | bool] | None = None) -> BuildProgress:
    """Build a cache behind progress bars; returns the last progress record."""
    quiet_libraries()
    from kd.cache_builder.build.from_settings import build_of

    return build_of(settings, recorded=recorded, watch=follow, say=lambda message: say(message, err=True))


@cache.command("info")
@click.argument("path", metavar="PATH_OR_URL")
@click.option(
    "--plots",
    type=FOLDER,
    metavar="DIR",
    help="Also read all rows, and draw their entropy, kept mass, ranks, probabilities and calibration as PNG files. Needs "
    "the extra eval.",
)
@json_option
def cache_info(path: str, plots: Path | None, as_json: bool) -> None:
    """Show a cache's identity, bytes per token, mass kept and decoding error, as measured during the build.

    Example: kd cache info runs/cache
    """
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.upkeep.summary import cache_summary

    drawn = None
    if plots is not None:
        from kd.common.extras import require_package

        require_package("matplotlib", "--plots")
        from kd.evaluation.cache_figures import plot_steps

        drawn = outcome("reading", plot_steps(path, plots))
    summary = cache_summary(open_files(path))
    emit(summary | (drawn.document if drawn is not None and as_json else {}), as_json, path)
    if drawn is not None and not as_json:
        say(f"drawn: {', '.join(str(file) for file in drawn.files.values())}")
