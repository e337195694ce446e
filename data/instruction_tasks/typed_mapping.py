"""Typed access to the mappings of a YAML file, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd.common.errors import DataError, unknown_name


class TypedMapping:
    """Typed access to the keys of a mapping. Methods raise DataError naming the file and the key."""

    def __init__(self, data: Any, where: str, keys: Sequence[str]) -> None:
        """`where` names the file, and the key that holds the mapping. Raises DataError for a key that is not in `keys`."""
        self.where = where
        if not isinstance(data, dict):
            raise DataError("a mapping is missing", where=where, found=_kind(data), expected="keys and values")
        self.data: dict[Any, Any] = data
        self._refuse_boolean_keys(data, where)
        for key in data:
            if key not in keys:
                raise unknown_name("key in a task file", str(key), keys, where=where)

    @staticmethod
    def _refuse_boolean_keys(data: dict[Any, Any], where: str) -> None:
        """Raise DataError for a key that was written as yes, no, on, off, true or false without quotes."""
        for key in data:
            if isinstance(key, bool):
                raise DataError(
                    "a name in a YAML file became true or false",
                    where=where,
                    found=f"{str(key).lower()}, as YAML reads {'yes, on and true' if key else 'no, off and false'}",
                    expected="a name",
                    try_=f'quotes around it, such as "{"yes" if key else "no"}"',
                )

    def wrong(self, key: str, expected: str) -> DataError:
        """The error for a value of another type."""
        return DataError(
            "a setting has the wrong type",
            where=f"{self.where} {key}",
            found=_kind(self.data.get(key)),
            expected=expected,
        )

    def optional_text(self, key: str) -> str | None:
        """A text, or None where the key is absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default the key is required."""
        value = self.optional_text(key)
        if value is None and default is None:
            raise self.wrong(key, "a string")
        return value if value is not None else default or ""

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the key is absent."""
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of strings")
        return value

    def optional_size(self, key: str) -> int | None:
        """A whole number of at least 1, or None where the key is absent."""
        value = self.data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.wrong(key, "a number from 1")
        return value

    def optional_seed(self, key: str) -> int | None:
        """A whole number, or None where the key is absent."""
        value = self.data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.wrong(key, "a whole number")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping with texts as keys; empty where the key is absent."""
        value = self.data.get(key, {})
        if isinstance(value, dict):
            self._refuse_boolean_keys(value, f"{self.where} {key}")
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.wrong(key, "a mapping")
        return value

    def mapping_of_texts(self, key: str) -> dict[str, str]:
        """A mapping of texts to texts; empty where the key is absent."""
        value = self.mapping(key)
        if not all(isinstance(v, str) for v in value.values()):
            raise self.wrong(key, "a mapping of strings")
        return value

    def mapping_of_lists(self, key: str) -> dict[str, tuple[str, ...]]:
        """A mapping of texts to a text or a list of texts; empty where the key is absent."""
        lists = {}
        for name, value in self.mapping(key).items():
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
                raise self.wrong(key, "a mapping of strings, or of lists of strings")
            lists[name] = tuple(items)
        return lists


def _kind(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, bool) for item in value):
        return 'a list with true or false (put quotes around "yes", "no", "on" and "off")'
    if isinstance(value, bool):
        return f'{str(value).lower()} (put quotes around "yes", "no", "on" and "off")'
    return "nothing" if value is None else type(value).__name__
