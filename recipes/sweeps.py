"""Sweeps: the arms of an experiment as the values of one parameter.

    sweep:
      arm: "{value}-templates"                     name of each arm; may be left out where the values have names
      values: [1, 2, 4, 7, 10]                     the values, or NAME: VALUE for each; the first is the baseline
      cache: {first-templates: "{value}"}          options of kd cache build in which the arms differ
      train: {max-steps: 300}                      options of kd train, likewise

`{value}` stands for the arm's value wherever it occurs. A text that is `{value}` alone becomes the value itself, so that true and
false stay switches. Arms with options of the cache have a cache each; without, all arms share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name

KEYS = ("arm", "values", "cache", "train")
VALUE = "{value}"
"""What stands for the value of an arm."""


def arms_of_sweep(sweep: Any, where: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Arm -> its options of kd train, and arm -> its options of kd cache build, where the sweep has any.

    Raises DataError, naming the key that is wrong.
    """
    if not isinstance(sweep, dict):
        raise DataError("a sweep is not a mapping", where=f"{where}: sweep", found=sweep, expected=", ".join(KEYS))
    for key in sweep:
        if key not in KEYS:
            raise unknown_name("key of a sweep", str(key), KEYS, where=where)
    parts = {part: sweep.get(part) or {} for part in ("cache", "train")}
    for part, options in parts.items():
        if not isinstance(options, dict):
            raise DataError("options are not a mapping", where=f"{where}: sweep.{part}", found=options)
    if "cache" in parts["train"]:
        raise DataError("the experiment sets this option itself", where=f"{where}: sweep.train", found="--cache")
    if not any(VALUE in str(value) for options in parts.values() for value in options.values()):
        raise DataError(
            "no option of the sweep uses its value",
            where=f"{where}: sweep",
            found="cache, train without {value}",
            expected='cache: {first-templates: "{value}"}',
        )
    values = _named_values(sweep, where)
    arms = {arm: _with_value(parts["train"], value) for arm, value in values.items()}
    if not parts["cache"]:
        return arms, {}
    caches = {arm: _with_value(parts["cache"], value) for arm, value in values.items()}
    return {arm: {**options, "cache": arm} for arm, options in arms.items()}, caches


def _named_values(sweep: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Arm -> its value."""
    values = sweep.get("values")
    pattern = sweep.get("arm", VALUE)
    if isinstance(values, list) and isinstance(pattern, str) and VALUE in pattern:
        named = {pattern.replace(VALUE, str(value)): value for value in values}
    elif isinstance(values, dict) and "arm" not in sweep:
        named = {str(name): value for name, value in values.items()}
    else:
        named = {}
    if len(named) < 2 or len(named) < len(values or ()) or any(isinstance(v, dict | list) for v in named.values()):
        raise DataError(
            "a sweep has at least two values, each of which makes an arm",
            where=f"{where}: sweep",
            found=f"arm {pattern!r}, values {values!r:.80}",
            expected='arm: "{value}-templates" and values: [1, 2, 4], or values: {NAME: VALUE, …}',
        )
    return named


def _with_value(options: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """The options with the value filled in."""
    return {
        option: value if given == VALUE else given.replace(VALUE, str(value)) if isinstance(given, str) else given
        for option, given in options.items()
    }
