"""A class of settings with every kind of field and groups in groups, for the tests of settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd.common.byte_sizes import byte_count
from kd.common.setting_values import unescaped
from kd.common.settings import check, make, setting

COLOURS = ("red", "green")


@dataclass(frozen=True)
class Point:
    """A value that is a class of its own, and no group, because it has a parser and stands in a tuple."""

    x: int
    y: int = 0

    def __str__(self) -> str:
        return f"{self.x}:{self.y}"


def points_from(text: str) -> tuple[Point, ...]:
    return tuple(Point(*map(int, part.split(":"))) for part in text.split(","))


@dataclass(frozen=True)
class Inner:
    """A group in a group."""

    weights: tuple[float, ...] = (1.0, 2.0)
    """Weights of the parts."""
    mode: Literal["slow", "fast"] = "slow"
    """How fast it goes."""
    points: tuple[Point, ...] = setting((), multiple=True, parse=points_from)
    """Points to visit."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Group:
    """Settings of every type."""

    rate: float = setting(5e-4, above=0)
    """Learning rate."""
    steps: int | None = setting(None, minimum=1)
    """Number of steps."""
    size: int | None = setting(None, parse=byte_count)
    """Bytes that are kept."""
    every: int | Literal["epoch"] = "epoch"
    """Steps between, or epoch."""
    folder: Path | None = None
    """Where things lie."""
    careful: bool = True
    """Whether to look twice."""
    colour: str = setting("red", choices=COLOURS)
    """Name of a registry."""
    separator: str = setting("\n", typed=unescaped)
    """Text in between."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Outer:
    """The outermost class."""

    name: str = setting(flag="--called")
    """Name of the thing,
    over two lines."""
    group: Group = field(default_factory=Group)
    hidden: int = setting(3, hidden=True)
    """Not an option."""

    def __post_init__(self) -> None:
        check(self)


def outer(**values: Any) -> Outer:
    return make(Outer, {"name": "n"} | values)
