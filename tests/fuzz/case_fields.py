"""Cases: how they are drawn and how they are made smaller.

A case is a dict of plain values (numbers, strings, lists), one for each field of its family. A
field draws its value and lists simpler ones; shrinking puts those in as long as the case still
fails in the same way. `Random(f"{seed}/{index}")` draws case `index` of a run, so that a seed and a
number name it, whatever came before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Case = dict[str, Any]


class Field(Protocol):
    def draw(self, rng: random.Random) -> Any: ...

    def simpler(self, value: Any) -> Iterator[Any]: ...


class Choice:
    """One of the options, which stand in order: the simplest first. `plain`: how often that one is
    drawn whatever the number of the others."""

    def __init__(self, *options: Any, plain: float = 0.0) -> None:
        self.options = options
        self.plain = plain

    def draw(self, rng: random.Random) -> Any:
        return self.options[0] if rng.random() < self.plain else rng.choice(self.options)

    def simpler(self, value: Any) -> Iterator[Any]:
        yield from self.options[: self.options.index(value)]


@dataclass(frozen=True)
class Extent:
    """A size from `low` to `high`, a multiple of `step`: small and odd ones, multiples of 16 and
    their neighbours, and now and then anything."""

    low: int
    high: int
    step: int = 1

    def draw(self, rng: random.Random) -> int:
        kind = rng.random()
        if kind < 0.15:
            size = rng.choice((self.low, self.step))
        elif kind < 0.45:
            size = rng.randint(1, 20) * self.step
        elif kind < 0.75:
            size = 16 * rng.randint(1, 9)
        elif kind < 0.85:
            size = 128 * rng.randint(1, 2) + rng.choice((-1, 0, 1))
        else:
            size = rng.randint(self.low, self.high)
        return max(self.low, min(self.high, size // self.step * self.step))

    def simpler(self, value: int) -> Iterator[int]:
        smaller = (self.step, 2 * self.step, value // 2, value - 16, value - self.step)
        fits = {s // self.step * self.step for s in smaller}
        yield from sorted(s for s in fits if self.low <= s < value)


@dataclass(frozen=True)
class Listed:
    """`low` to `high` values of one field."""

    field: Field
    low: int
    high: int

    def draw(self, rng: random.Random) -> list[Any]:
        return [self.field.draw(rng) for _ in range(rng.randint(self.low, self.high))]

    def simpler(self, value: list[Any]) -> Iterator[list[Any]]:
        half = len(value) // 2
        if half >= max(self.low, 1):
            yield from (value[:half], value[-half:])
        if len(value) > self.low:
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for i, one in enumerate(value):
            yield from ([*value[:i], small, *value[i + 1 :]] for small in self.field.simpler(one))


@dataclass(frozen=True)
class Lead:
    """Leading dimensions, none to three, of at most `high` rows together."""

    high: int

    def draw(self, rng: random.Random) -> list[int]:
        dims = rng.choice((0, 1, 1, 1, 2, 2, 3))
        each = Extent(0, round(self.high ** (1 / max(dims, 1))))
        return [each.draw(rng) for _ in range(dims)]

    def simpler(self, value: list[int]) -> Iterator[list[int]]:
        yield from Listed(Extent(0, self.high), 0, 3).simpler(value)


class Seed:
    """Of the random values of the tensors."""

    def draw(self, rng: random.Random) -> int:
        return rng.randrange(10_000)

    def simpler(self, value: int) -> Iterator[int]:
        yield from range(min(value, 3))


class Family(NamedTuple):
    """Cases of one operator. `check(case, device)` raises where the result is wrong, an
    AssertionError that begins with what is wrong and a colon; any other error is a finding too."""

    name: str
    fields: dict[str, Field]
    check: Callable[[Case, str], None]
    share: float = 1.0  # how often it is drawn, against the others

    def draw(self, rng: random.Random) -> Case:
        return {name: field.draw(rng) for name, field in self.fields.items()}


def failure_of(check: Callable[[Case], None], case: Case) -> Exception | None:
    try:
        check(case)
    except Exception as error:
        return error
    return None


def kind_of(error: Exception) -> str:
    """What two failures of the same fault share: the type and the first words."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].partition(':')[0] if lines else ''}"


def shrink(case: Case, family: Family, check: Callable[[Case], None], seconds: float) -> Case:
    """The smallest case found within `seconds` that fails as `case` does."""
    error = failure_of(check, case)
    if error is None:  # it does not fail again: nothing to go by
        return case
    kind, end = kind_of(error), time.monotonic() + seconds

    def fails(smaller: Case) -> bool:
        found = failure_of(check, smaller)
        return found is not None and kind_of(found) == kind

    changed = True
    while changed:
        changed = False
        for name, field in family.fields.items():
            for value in field.simpler(case[name]):
                if time.monotonic() > end:
                    return case
                if fails(case | {name: value}):
                    case, changed = case | {name: value}, True
                    break
    return case
