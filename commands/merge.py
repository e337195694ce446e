"""kd merge: one model out of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kd.commands.terminal.console import emit, emit_json, outcome, quiet_libraries, say
from kd.commands.terminal.options import dry_run_option, json_option
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.evaluation.merged.merged_settings import MergeRun

if TYPE_CHECKING:
    from kd.evaluation.merged.merge_run import MergeResult


@click.command(cls=SettingsCommand)
@settings_options(MergeRun)
@dry_run_option
@json_option
def merge(settings: MergeRun, dry_run: bool, as_json: bool) -> None:
    """Merge models of one architecture: classifiers keep a head per task, language models are merged whole.

    Example: kd merge --method task-arithmetic --pool pool.yaml --sweep 0:1:0.1 --select-on dev-half --out runs/merged
    """
    quiet_libraries()
    from kd.evaluation.merged.merge_run import merge_cost, run_merge

    if dry_run:
        emit(merge_cost(settings), as_json, f"{settings.out}: nothing was written. A merge would write")
        return
    steps = run_merge(settings)
    result = outcome(f"merging ({settings.merge.method})", steps)
    if as_json:
        emit_json(result.to_dict())
    else:
        print_merge(result)
    if result.warning:
        say(f"warning: {result.warning}", err=True)


def print_merge(result: MergeResult) -> None:
    """Print the outcome of a merge and its tables."""
    kind = "scored, no weights" if result.parameters is None else f"merged {result.parameters:,} parameters"
    say(f"{result.out}: {result.method} of {', '.join(result.models)}; {kind}")
    if result.table is not None:
        say(f"\n{result.table.markdown()}")
    if result.even is not None and result.odd is not None:
        say(f"\nscaling {result.scaling:g}, chosen on the even rows:\n\n{result.even.markdown()}")
        say(f"\nand scored on the odd rows:\n\n{result.odd.markdown()}")
