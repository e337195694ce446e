"""Read a file of settings, YAML or JSON, with errors that name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.common.errors import DataError


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises DataError."""
    import yaml

    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        _refuse_twice(tree, path)
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise DataError("cannot read the configuration file", where=path, found=f"{line}{error.problem}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError("cannot read the configuration file", where=path, found=str(error).splitlines()[0]) from error
    if not isinstance(document, dict):
        found = "an empty file" if document is None else type(document).__name__
        raise DataError("the configuration file is not a mapping", where=path, found=found, expected="name: value")
    return {str(key): value for key, value in document.items()}


def _refuse_twice(node: Any, path: Path) -> None:
    """Raise DataError for a name that stands twice in one mapping: YAML itself would keep the last value."""
    names: set[str] = set()
    for key, value in node.value if getattr(node, "id", "") == "mapping" else ():
        if key.value in names:
            found = f"line {key.start_mark.line + 1}: {key.value}"
            raise DataError("a setting is given twice", where=path, found=found)
        names.add(key.value)
        _refuse_twice(value, path)
